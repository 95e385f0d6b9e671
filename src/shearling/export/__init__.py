"""Checkpoints that others load."""

from shearling.export.adapters import load_adapters, save_adapters
from shearling.export.classes import per_layer_classes, register
from shearling.export.compressed import check_storable
from shearling.export.huggingface import ADAPTER, save_model

__all__ = ["ADAPTER", "check_storable", "load_adapters", "per_layer_classes", "register", "save_adapters", "save_model"]
