"""Stages that keep all shapes: masks, and weights of low rank."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from shearling.recipe.base import UNSTRUCTURED, Strict
from shearling.recipe.pruning import Reconstruct


def pattern_numbers(text: str) -> tuple[int, int] | None:
    """N and M of ``"N:M"``, None unless 0 < N < M."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    keep, of = map(int, found.groups()) if found else (0, 0)
    return (keep, of) if 0 < keep < of else None


class Sparsify(Strict):
    """One-shot masks over all linears of the blocks; no shape changes."""

    stage: Literal["sparsify"] = "sparsify"
    method: Literal["magnitude", "wanda", "sparsegpt", "alps"] = "sparsegpt"
    #: N:M along the input, or ``unstructured``: a share of each row
    pattern: str = "2:4"
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    #: inputs are measured with everything before them pruned, with the blocks before them pruned, or in the dense model
    statistics: Literal["sequential", "block", "dense"] = "sequential"
    damping: Annotated[float, Field(gt=0)] = 0.01
    reconstruct: Reconstruct | None = None

    @field_validator("pattern")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != UNSTRUCTURED and pattern_numbers(value) is None:
            raise ValueError(f"must be N:M with 0 < N < M, such as 2:4, or {UNSTRUCTURED}")
        return value


class Denoise(Strict):
    """Weights of some blocks by tensors or matrices of low rank (TRAWL, LASER); all shapes stay."""

    stage: Literal["denoise"] = "denoise"
    method: Literal["cp", "tucker", "svd"] = "cp"
    #: blocks from 0, or from -1 backwards
    layers: Annotated[tuple[int, ...], Field(min_length=1)]
    part: Literal["ffn", "attention"] = "ffn"
    #: of the smaller side of a weight
    rank: Annotated[float, Field(gt=0, le=1)] = 0.5
