"""Stages that prune to a share of the channels."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from shearling.recipe.base import Strict, Tokens


class Reconstruct(Strict):
    """Gradient steps on one block's output at a time, after its cut; each reads one batch of the calibration text."""

    steps: Tokens = 200
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3


class _Prune(Strict):
    stage: Literal["prune"] = "prune"
    #: share removed
    sparsity: float
    #: of what: FFN channels, all parameters, or all bytes
    of: Literal["ffn", "parameters", "bytes"] = "ffn"
    #: widths are multiples of this
    round_to: Tokens = 1
    #: one width for all blocks, so that any engine loads the result
    uniform: bool = False

    @field_validator("sparsity")
    @classmethod
    def _share(cls, value: float) -> float:
        if not (math.isfinite(value) and 0 < value < 1):
            raise ValueError("must be above 0 and below 1")
        return value


def _per_layer(value: bool, found: ValidationInfo) -> bool:
    if value and found.data.get("uniform"):
        raise ValueError("needs a width per block; leave uniform off")
    return value


class CFSP(_Prune):
    """CFSP: block importance shares out the channels, a score spends them."""

    method: Literal["cfsp"] = "cfsp"
    score: Literal["act", "wanda", "eq8", "eq8xn", "flap", "obs"] = "act"
    allocation: Literal["sigmoid", "uniform"] = "sigmoid"
    temperature: Annotated[float, Field(gt=0)] = 13.1072
    #: least-squares refit of the down projection on the channels that stay
    refit: bool = True
    #: KV groups go too, out of the same budget (our extension)
    heads: bool = False

    _heads = field_validator("heads")(_per_layer)


class CFSPReference(_Prune):
    """CFSP as released: its score, its allocation, its rounding."""

    method: Literal["cfsp-reference"] = "cfsp-reference"


class Shearling(_Prune):
    """Sequential least squares over heads and channels in one budget, then optional block reconstruction."""

    method: Literal["shearling"] = "shearling"
    #: KV groups go too, out of the same budget
    heads: bool = False
    #: share of what earlier blocks lost that a block makes good
    correction: Annotated[float, Field(ge=0, le=1)] = 0.5
    damping: Annotated[float, Field(gt=0)] = 0.1
    #: windows that the dense model writes itself, measured beside the calibration text
    sampled: Annotated[int, Field(ge=0)] = 0
    reconstruct: Reconstruct | None = None

    _heads = field_validator("heads")(_per_layer)


class Baseline(_Prune):
    """The simple methods, one width for all blocks; FLAP shares channels out globally and adds a bias."""

    method: Literal["wanda-sp", "flap", "magnitude", "random"]
