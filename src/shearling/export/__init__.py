"""Checkpoints that others load."""

from shearling.export.adapters import load_adapters, save_adapters
from shearling.export.classes import per_layer_classes, register
from shearling.export.compact import COMPACT, block_weights, load_compact, load_sidecar_, save_compact, save_sidecar
from shearling.export.compressed import check_storable, load_codes
from shearling.export.engines import Engine, engines, plan_record
from shearling.export.formats import FORMATS, GGUF_TYPE, check_format, describe, export_deci, export_gguf, export_onnx
from shearling.export.huggingface import ADAPTER, save_model

__all__ = [
    "ADAPTER",
    "COMPACT",
    "FORMATS",
    "GGUF_TYPE",
    "Engine",
    "block_weights",
    "check_format",
    "check_storable",
    "describe",
    "engines",
    "export_deci",
    "export_gguf",
    "export_onnx",
    "load_adapters",
    "load_codes",
    "load_compact",
    "load_sidecar_",
    "per_layer_classes",
    "plan_record",
    "register",
    "save_adapters",
    "save_compact",
    "save_model",
    "save_sidecar",
]
