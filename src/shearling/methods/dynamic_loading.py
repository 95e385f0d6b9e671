"""Dynamic batch loading (Sheared LLaMA, arXiv 2310.06694, section 2.2): more of what lags furthest behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shearling.errors import ShearlingError, check_domains
from shearling.train import Policy, TrainSettings


class DynamicLoading(Policy):
    """Multiplies, at every validation, each domain's weight by ``exp(eta * excess)``, its loss above the reference.

    ``reference`` has a loss (nats) for every domain; settings are as ``reweighted`` has them. Events tell the excess,
    not clamped, as ``excess_loss/<domain>``. There is no state to save: the sampler keeps the weights.

    Raises ShearlingError for a reference that is no finite loss and settings that make no sense.
    """

    def __init__(
        self,
        reference: Mapping[str, float],
        *,
        eta: float = 1.0,
        clamp: bool = True,
        smoothing: float = 1e-4,
        floor: float = 0.0,
    ) -> None:
        for name, loss in reference.items():
            if not 0 <= loss < torch.inf:
                raise ShearlingError(f"reference: domain {name!r} has {loss}; must be a finite loss, 0 or more")
        if not 0 < eta < torch.inf:
            raise ShearlingError(f"eta={eta}: must be above 0")
        if not 0 <= smoothing <= 1:
            raise ShearlingError(f"smoothing={smoothing}: must lie in 0 to 1")
        if not 0 <= floor * len(reference) <= 1:
            raise ShearlingError(f"floor={floor}: must lie in 0 to 1 over the number of domains, {len(reference)}")
        self.reference = dict(reference)
        self._settings: dict[str, Any] = {"eta": eta, "clamp": clamp, "smoothing": smoothing, "floor": floor}

    def check_domains(self, domains: Sequence[str], validated: Sequence[str]) -> None:
        if not domains:
            raise ShearlingError("dynamic loading: the windows have no domains; give Domains")
        check_domains("validation", validated, domains)
        check_domains("reference", self.reference, domains)

    def attach(self, model: nn.Module, settings: TrainSettings) -> None:
        if not settings.validate_every:
            raise ShearlingError("validate_every=0: weights would never change; give the steps between two changes")

    def capturable(self) -> bool:
        return True

    def on_eval(self, metrics: dict[str, float]) -> None:
        for name, loss in self.reference.items():
            metrics[f"excess_loss/{name}"] = metrics[f"validation_loss/{name}"] - loss

    def reweight(self, weights: dict[str, float], metrics: dict[str, float]) -> dict[str, float]:
        excess = [metrics[f"excess_loss/{name}"] for name in weights]
        new = reweighted(_doubles(weights.values()), _doubles(excess), **self._settings)
        return dict(zip(weights, new.tolist(), strict=True))


def reweighted(weights: Tensor, excess: Tensor, *, eta: float, clamp: bool, smoothing: float, floor: float) -> Tensor:
    """Weights [k] of domains after a validation in which their losses lay ``excess`` [k] above the reference.

    ``w exp(eta excess)``, normalised, mixed with ``smoothing`` of equal weights, then raised to ``floor``. ``clamp``
    takes an excess below 0 for 0 (the paper's algorithm 1, with ``smoothing`` 0); without it (the authors' code, with
    ``smoothing`` 1e-4) a domain that is better than its reference loses weight. An excess that is not finite leaves all
    weights as they are.
    """
    moved = eta * (excess.clamp(min=0) if clamp else excess)
    if not moved.isfinite().all():
        return weights
    # by logarithms, where the exponential of a large excess would overflow; a weight of 0 has none and stays 0
    alpha = torch.softmax(weights.log() + moved, 0)
    return _raised((1 - smoothing) * alpha + smoothing / len(weights), floor)


def _raised(weights: Tensor, floor: float) -> Tensor:
    """Weights that sum to 1: those below the floor raised to it, the others scaled down alike."""
    ordered, order = weights.sort()
    for low in range(len(weights)):
        rest = ordered[low:] * ((1 - floor * low) / ordered[low:].sum())
        if rest[0] >= floor:
            break
    return torch.cat([ordered.new_full((low,), floor), rest])[order.argsort()]


def _doubles(values: Any) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
