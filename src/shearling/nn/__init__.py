"""Linears in training: master weight -> weight transforms -> product, plus additive branches."""

from shearling.nn.branches import Branch, LoRABranch
from shearling.nn.linear import EffectiveLinear, is_linear, unwrap_, wrap_
from shearling.nn.transforms import FakeQuantTransform, MaskTransform, SoftThreshold, StraightMask

__all__ = [
    "Branch",
    "EffectiveLinear",
    "FakeQuantTransform",
    "LoRABranch",
    "MaskTransform",
    "SoftThreshold",
    "StraightMask",
    "is_linear",
    "unwrap_",
    "wrap_",
]
