"""Linears in training: master weight -> weight transforms -> product, plus additive branches."""

from shearling.nn.branches import Branch, LoRABranch, LowRankBranch
from shearling.nn.linear import EffectiveLinear, is_linear, plain_state, unwrap_, wrap_, wrapped_linears
from shearling.nn.transforms import MaskTransform

__all__ = [
    "Branch",
    "EffectiveLinear",
    "LoRABranch",
    "LowRankBranch",
    "MaskTransform",
    "is_linear",
    "plain_state",
    "unwrap_",
    "wrap_",
    "wrapped_linears",
]
