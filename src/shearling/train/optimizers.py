"""Which parameters are trained, and by which optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shearling.errors import ShearlingError
from shearling.train.policy import Policy
from shearling.train.settings import TrainSettings


@dataclass(frozen=True)
class Optimizers:
    """``scheduled`` is the loop's AdamW (None where policies bring their own for everything), ``own`` the policies'."""

    scheduled: torch.optim.AdamW | None
    own: tuple[torch.optim.Optimizer, ...]

    @property
    def all(self) -> tuple[torch.optim.Optimizer, ...]:
        return self.own if self.scheduled is None else (self.scheduled, *self.own)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for optimizer in self.all for group in optimizer.param_groups for p in group["params"]]

    def set_rate(self, rate: float) -> None:
        """Set the scheduled learning rates to a multiple of their own base."""
        for group in self.scheduled.param_groups if self.scheduled else ():
            group["lr"] = group["base_lr"] * rate

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()

    def zero_grad(self, *, keep: bool) -> None:
        """Make gradients zero; with ``keep`` those that there are stay the same tensors."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=not keep)


def build_optimizers(model: nn.Module, policies: Sequence[Policy], settings: TrainSettings) -> Optimizers:
    """Optimizers over what the policies name, or over all parameters of the model where they name none.

    In full training matrices decay and vectors (norms, biases) do not. Parameters of the model that no optimizer
    holds are frozen. Raises ShearlingError for a parameter named twice, or too coarse to train.
    """
    groups = [dict(group) for policy in policies for group in policy.param_groups() or ()]
    own = tuple(optimizer for policy in policies if (optimizer := policy.optimizer()) is not None)
    if not groups and not own:
        groups = decay_groups(model.parameters(), settings.weight_decay)
    groups += [dict(group) for policy in policies for group in policy.auxiliary_groups()]
    groups = [{**group, "params": list(group["params"])} for group in groups]  # pyrefly: ignore[bad-argument-type]
    groups = [group for group in groups if group["params"]]
    # pyrefly: ignore[not-iterable]
    _check(model, [p for group in (*groups, *(g for o in own for g in o.param_groups)) for p in group["params"]])
    optimizers = Optimizers(_adamw(groups, settings) if groups else None, own)
    trained = {id(p) for p in optimizers.parameters}
    for parameter in (*model.parameters(), *optimizers.parameters):
        parameter.requires_grad_(id(parameter) in trained)
    return optimizers


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: matrices decay, vectors (norms, biases) do not."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _adamw(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.AdamW:
    for group in groups:
        group.setdefault("lr", settings.learning_rate)
        group["base_lr"] = group["lr"]
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(
        groups, betas=settings.betas, weight_decay=settings.weight_decay, fused=device in ("cpu", "cuda")
    )


def _check(model: nn.Module, parameters: Sequence[Tensor]) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    seen: set[int] = set()
    for parameter in parameters:
        name = names.get(id(parameter), "a policy's parameter")
        if id(parameter) in seen:
            raise ShearlingError(f"{name}: trained by two optimizers; each parameter may be named once")
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ShearlingError(f"{name}: is {parameter.dtype}; training needs float32 weights: load with float32")
        seen.add(id(parameter))
