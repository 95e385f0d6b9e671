"""Named corpora, and how their weights move."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from shearling.recipe.base import Strict


class Domain(Strict):
    """A named corpus: text that is read, held-out text (windows spread over it) that is scored."""

    text: str
    validation: str | None = None
    #: its share of what is read at first, over the sum of all weights; where no domain has one, the root of its size
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class Loading(Strict):
    """Dynamic batch loading: at every validation domains gain by how far their loss lies above its reference."""

    method: Literal["dynamic"] = "dynamic"
    #: losses by domain (see ``reference_table``), a YAML or JSON file of them, or ``source``: those of the dense model
    reference: str | dict[str, float | dict[float, float]]
    #: weights grow by exp(eta * excess)
    eta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    #: a domain that is better than its reference keeps its weight, as in the paper; off, it loses, as in its code
    clamp: bool = True
    #: share of the weights that is dealt out evenly
    smoothing: Annotated[float, Field(ge=0, le=1)] = 1e-4
    #: no domain has less
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0

    @field_validator("reference", mode="before")
    @classmethod
    def _table(cls, value: Any) -> Any:
        return value if isinstance(value, str) else reference_table(value)


def reference_table(content: Any) -> dict[str, float | dict[float, float]]:
    """Losses by domain, of plain values: a loss, or at least three of a model family by their numbers of parameters.

    The latter are extrapolated to the size of the model that is trained. Raises ValueError for anything else.
    """
    if not isinstance(content, dict) or not content:
        raise ValueError("must be a table of losses by domain, a file of one, or source")
    return {str(name): _reference(f"domain {name!r}", entry) for name, entry in content.items()}


def _reference(what: str, entry: Any) -> float | dict[float, float]:
    if not isinstance(entry, dict):
        return _number(f"{what}: loss", entry)
    if len(entry) < 3:
        raise ValueError(f"{what}: {len(entry)} models; a scaling law needs at least 3")
    losses = {_number(f"{what}: parameters", size): _number(f"{what}: loss", loss) for size, loss in entry.items()}
    if 0 in losses:
        raise ValueError(f"{what}: parameters = 0; must be above 0")
    return losses


def _number(what: str, value: Any) -> float:
    try:
        # YAML takes 7e9 for a text
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{what} = {value!r}; must be a finite number, 0 or more")
    return number
