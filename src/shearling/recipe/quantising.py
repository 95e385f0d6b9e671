"""The stage that quantises."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shearling.recipe.base import Strict

Scales = Literal["covering", "mse"]


class Quantise(Strict):
    """Weights of the blocks' linears on a grid; what was pruned stays exactly zero."""

    stage: Literal["quantise"] = "quantise"
    method: Literal["rtn", "gptq", "slim"] = "gptq"
    format: Literal["int4", "int8", "uint4", "uint8", "float8_e4m3"] = "int4"
    #: weights along the input that share a scale; none: a row
    group: Annotated[int, Field(ge=1)] | None = None
    #: of a group's range: all of it, or the share with the least squared error; slim has one scale a weight
    scales: Scales = "mse"
    #: rank, as a share of a weight's smaller side, of branches that make up for what pruning and rounding took
    compensate: Annotated[float, Field(gt=0, lt=1)] | None = None
    #: grid of those branches' factors
    branches: Literal["int4", "int8"] | None = None
    #: gptq: columns in falling order of their inputs' energy
    order: bool = True
    damping: Annotated[float, Field(gt=0)] = 0.01

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.branches is not None and self.compensate is None:
            raise ValueError("branches needs compensate, the rank of the branches")
        if self.method == "slim" and self.format not in ("int4", "int8"):
            raise ValueError(f"method = slim is symmetric; format must be int4 or int8, not {self.format}")
        return self

    def rank(self, outputs: int, inputs: int) -> int:
        """Of the branch beside a linear of that shape; 0 where none is wanted."""
        return 0 if self.compensate is None else max(1, round(self.compensate * min(outputs, inputs)))
