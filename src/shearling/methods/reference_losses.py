"""What the loss on each domain should come down to: given, the source model's own, or that of a size of its family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from shearling.errors import ShearlingError
from shearling.train import TrainSettings, World, validation_loss

#: exponents that are searched, and those that are believed
_SEARCHED = np.geomspace(1e-3, 4, 500)
_BELIEVED = (0.01, 2.0)
#: searches, each in a twenty-fifth of the one before: down to a float's last digit
_REFINED = 12


@dataclass(frozen=True)
class ScalingLaw:
    """Loss ``a / N^b + c`` of a model with N parameters; ``doubts`` say in words what of it is unphysical."""

    a: float
    b: float
    c: float

    def loss(self, parameters: float) -> float:
        return self.a * parameters**-self.b + self.c

    @property
    def doubts(self) -> tuple[str, ...]:
        low, high = _BELIEVED
        found = {
            f"a = {self.a:.3g} is not above 0": not self.a > 0,
            f"b = {self.b:.3g} lies outside {low} to {high}": not low <= self.b <= high,
            f"c = {self.c:.3g} is below 0": self.c < 0,
        }
        return tuple(doubt for doubt, holds in found.items() if holds)


def fit_scaling_law(losses: Mapping[float, float]) -> ScalingLaw:
    """The law nearest, by least squares, to the losses of models by their number of parameters (Sheared LLaMA, 2.2).

    Three losses that fall, and fall ever less over log N, are met exactly. Raises ShearlingError for fewer than three
    models, sizes that are not above 0, and losses that are not finite.
    """
    if len(losses) < 3:
        raise ShearlingError(f"scaling law: {len(losses)} models are too few for its three numbers; give at least 3")
    for size, loss in losses.items():
        if not (0 < size < math.inf and math.isfinite(loss)):
            raise ShearlingError(
                f"scaling law: a loss of {loss} at {size} parameters; both must be finite, sizes above 0"
            )
    sizes, values = np.array(list(losses)), np.array(list(losses.values()))
    middle = np.log(sizes).mean()
    scaled = np.log(sizes) - middle

    def line(b: float) -> tuple[float, float, float]:
        """Squared error, slope and offset of the best line through the losses over (1 - exp(-b scaled)) / b."""
        # unlike a power, this stays a coordinate of its own where b is small: it becomes the logarithm
        x = -np.expm1(-b * scaled) / b
        slope = (x - x.mean()) @ (values - values.mean()) / ((x - x.mean()) @ (x - x.mean()))
        offset = values.mean() - slope * x.mean()
        return float(((offset + slope * x - values) ** 2).sum()), float(slope), float(offset)

    def nearest(grid: np.ndarray) -> int:
        return int(np.argmin([line(b)[0] for b in grid]))

    grid = _SEARCHED
    for _ in range(_REFINED):
        best = nearest(grid)
        grid = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], 50)
    b = float(grid[nearest(grid)])
    _, slope, offset = line(b)
    return ScalingLaw(-slope / b * math.exp(b * middle), b, offset + slope / b)


def reference_losses(
    table: Mapping[str, float | Mapping[float, float]], parameters: int
) -> tuple[dict[str, float], list[str]]:
    """A loss for every domain of a table, and what there is to doubt about them, in words.

    Where the table has losses of models by their number of parameters, theirs is extrapolated to ``parameters``.
    Raises ShearlingError as ``fit_scaling_law`` does.
    """
    found: dict[str, float] = {}
    doubts = []
    for name, entry in table.items():
        if not isinstance(entry, Mapping):
            found[name] = entry
            continue
        law = fit_scaling_law(entry)
        found[name] = law.loss(parameters)
        if law.doubts:
            doubts.append(
                f"scaling law of domain {name!r}: {', '.join(law.doubts)}; its reference is {found[name]:.4f}"
            )
    return found, doubts


def source_losses(
    model: Any, validation: Mapping[str, Tensor], settings: TrainSettings, world: World
) -> dict[str, float]:
    """A model's own losses on the held-out windows [m, T] of every domain."""
    # the same bits everywhere, as weights come of them
    return world.agree({name: validation_loss(model, part, settings, world) for name, part in validation.items()})
