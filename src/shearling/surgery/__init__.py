"""Carrying edits out."""

from shearling.surgery.adapters import adapters_of, attach_adapters_
from shearling.surgery.cut import cut_, cut_block_, write_values_
from shearling.surgery.gate import gate_
from shearling.surgery.modules import config_after, conform_, set_parameter
from shearling.surgery.resize import resize_
from shearling.surgery.slicing import slice_tensor

__all__ = [
    "adapters_of",
    "attach_adapters_",
    "config_after",
    "conform_",
    "cut_",
    "cut_block_",
    "gate_",
    "resize_",
    "set_parameter",
    "slice_tensor",
    "write_values_",
]
