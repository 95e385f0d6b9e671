"""Exact shapes, budgets that come to one, and stages that cut to it at once."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from shearling.recipe.base import Strict, Tokens


class Target(Strict):
    """The shape that a model is cut to, the same in every block; what is not named stays, or follows.

    Without ``heads`` (query heads) they follow ``kv_heads`` as many to each as before; without ``kv_heads`` these stay,
    or follow ``heads`` where each has its own.
    """

    layers: Tokens | None = None
    hidden: Tokens | None = None
    heads: Tokens | None = None
    kv_heads: Tokens | None = None
    ffn: Tokens | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if all(size is None for _, size in self):
            raise ValueError(f"needs at least one of {', '.join(type(self).model_fields)}")
        return self


Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Budget(Strict):
    """What the model may weigh, cost a token, or take: one of four, below 1 a share of what it has, else a number.

    ``propose_shapes`` finds shapes for it; ``profile`` says which of them is taken. ``latency`` is in milliseconds, and
    measured in the recipe's precision on the device that it names, or is run on.
    """

    parameters: Amount | None = None
    bytes: Amount | None = None
    flops: Amount | None = None
    latency: Amount | None = None
    profile: Literal["balanced", "deeper", "shallower", "stream", "depth"] = "balanced"
    #: whose latency: of one token more in every row, or of all tokens of the context at once
    phase: Literal["decode", "prefill"] = "decode"
    #: rows
    batch: Tokens = 1
    #: tokens of a row
    context: Tokens = 1024

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(amount is not None for amount in (self.parameters, self.bytes, self.flops, self.latency)) != 1:
            raise ValueError("needs one of parameters, bytes, flops, latency, and no other of them")
        changed = [name for name in ("phase", "batch", "context") if getattr(self, name) != _default(self, name)]
        if changed and self.latency is None:
            raise ValueError(f"has {', '.join(changed)}, which only a latency is measured by")
        return self

    @property
    def of(self) -> Literal["parameters", "bytes", "flops_per_token", "milliseconds"]:
        """What is bounded."""
        counted = "parameters" if self.parameters else "bytes" if self.bytes else "flops_per_token"
        return "milliseconds" if self.latency else counted

    @property
    def amount(self) -> float:
        """The bound."""
        return self.parameters or self.bytes or self.flops or self.latency or 0.0


def _default(model: BaseModel, field: str) -> Any:
    return type(model).model_fields[field].default


def _named(value: Any, kind: type[BaseModel]) -> list[str]:
    return [name for name in kind.model_fields if name in value] if isinstance(value, dict) else []


def _form(value: Any) -> str:
    return "budget" if isinstance(value, Budget) or _named(value, Budget) else "shape"


def _one_form(value: Any) -> Any:
    shape, budget = _named(value, Target), _named(value, Budget)
    if shape and budget:
        raise ValueError(
            f"has {', '.join(shape)} of a shape and {', '.join(budget)} of a budget; give one or the other"
        )
    return value


ShapeOrBudget = Annotated[
    Annotated[Target, Tag("shape")] | Annotated[Budget, Tag("budget")], Discriminator(_form), BeforeValidator(_one_form)
]


class Ranked(Strict):
    """Cut to an exact shape in one go: units ranked by one forward sweep, or drawn from the seed."""

    stage: Literal["prune"] = "prune"
    method: Literal["minitron", "shortgpt", "random-shape"]
    target: ShapeOrBudget

    @field_validator("target")
    @classmethod
    def _whole_blocks(cls, value: Target | Budget, found: ValidationInfo) -> Target | Budget:
        if isinstance(value, Budget):
            whole = value.profile == "depth"
        else:
            whole = {size for size, wanted in value if wanted is not None} == {"layers"}
        if found.data.get("method") == "shortgpt" and not whole:
            raise ValueError(
                "shortgpt drops whole blocks; name layers alone, or give a budget profile: depth, or use minitron"
            )
        return value
