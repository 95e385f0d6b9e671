"""Linears in training: master weight -> weight transforms -> product, plus additive branches."""

from shearling.nn.branches import Branch, LoRABranch
from shearling.nn.linear import EffectiveLinear, is_linear, unwrap_, wrap_
from shearling.nn.transforms import FakeQuantTransform, MaskTransform

__all__ = [
    "Branch",
    "EffectiveLinear",
    "FakeQuantTransform",
    "LoRABranch",
    "MaskTransform",
    "is_linear",
    "unwrap_",
    "wrap_",
]
