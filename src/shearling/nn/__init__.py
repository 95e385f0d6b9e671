"""Linears in training (weight transforms -> product, plus additive branches) and gates along the residual stream."""

from shearling.nn.branches import Branch, LoRABranch, LowRankBranch
from shearling.nn.hidden_gates import GatedLayerNorm, GatedRMSNorm, HiddenGates, OutputGates
from shearling.nn.linear import EffectiveLinear, is_linear, plain_state, unwrap_, wrap_, wrapped_linears
from shearling.nn.transforms import (
    FakeQuantTransform,
    InputGate,
    MaskTransform,
    MultiplicativeAdapter,
    SoftThreshold,
    StraightMask,
)

__all__ = [
    "Branch",
    "EffectiveLinear",
    "FakeQuantTransform",
    "GatedLayerNorm",
    "GatedRMSNorm",
    "HiddenGates",
    "InputGate",
    "LoRABranch",
    "LowRankBranch",
    "MaskTransform",
    "MultiplicativeAdapter",
    "OutputGates",
    "SoftThreshold",
    "StraightMask",
    "is_linear",
    "plain_state",
    "unwrap_",
    "wrap_",
    "wrapped_linears",
]
