"""Checkpoints that others load."""

from shearling.export.classes import per_layer_classes, register
from shearling.export.huggingface import save_model

__all__ = ["per_layer_classes", "register", "save_model"]
