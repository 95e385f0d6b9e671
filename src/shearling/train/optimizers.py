"""Which parameters are trained, and by which optimizers."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shearling.captured import Captured
from shearling.errors import ShearlingError
from shearling.train.policy import Policy
from shearling.train.settings import TrainSettings


class Optimizers:
    """``scheduled`` is the loop's AdamW (None where policies bring their own for everything), ``own`` the policies'.

    A ``capturable`` one has tensors for learning rates, and a CUDA graph carries out its step. ``parameters`` are those
    of ``all``, in order.
    """

    def __init__(self, scheduled: torch.optim.AdamW | None, own: tuple[torch.optim.Optimizer, ...]) -> None:
        self.scheduled, self.own = scheduled, own
        self.all: tuple[torch.optim.Optimizer, ...] = own if scheduled is None else (scheduled, *own)
        self.parameters = [p for optimizer in self.all for p in _parameters(optimizer)]
        self._steps = self._ways()

    @property
    def gradients(self) -> list[Tensor]:
        """Those that there are, in the order of their parameters."""
        return [gradient for p in self.parameters if (gradient := p.grad) is not None]

    def set_rate(self, rate: float) -> None:
        """Set the scheduled learning rates to a multiple of their own base."""
        for group in self._groups():
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(group["base_lr"] * rate)
            else:
                group["lr"] = group["base_lr"] * rate

    def step(self) -> None:
        for step in self._steps:
            step()

    def zero_grad(self, *, keep: bool) -> None:
        """Make gradients zero; with ``keep`` those that there are stay the same tensors."""
        if not keep:
            for parameter in self.parameters:
                parameter.grad = None
        elif gradients := self.gradients:
            torch._foreach_zero_(gradients)

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Take back what each one's ``state_dict`` gave, be it of captured steps or not; ``set_rate`` comes after."""
        before = [(group["lr"], group["capturable"]) for group in self._groups()]
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)
        for group, (rate, capturable) in zip(self._groups(), before, strict=True):
            group["lr"], group["capturable"] = rate, capturable
        # moments are other tensors now
        self._steps = self._ways()

    def _groups(self) -> list[dict[str, Any]]:
        return [] if self.scheduled is None else self.scheduled.param_groups

    def _ways(self) -> list[Callable[[], object]]:
        """How each step is carried out."""
        graphs = self.scheduled is not None and self.scheduled.defaults["capturable"]
        return [_Replayed(o) if graphs and o is self.scheduled else o.step for o in self.all]


class _Replayed:
    """An optimizer's step as a CUDA graph, which is made anew where gradients are other tensors than before."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._parameters = _parameters(optimizer)
        self._gradients: list[Tensor | None] = []
        self._run: Captured | None = None

    def __call__(self) -> None:
        gradients = [p.grad for p in self._parameters]
        if self._run is None or any(map(operator.is_not, gradients, self._gradients)):
            self._gradients, self._run = gradients, Captured(self._once)
        self._run()

    def _once(self) -> None:
        with warnings.catch_warnings():
            # the calls before the capture
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
            self._optimizer.step()


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
    _check(model, [*(p for group in groups for p in group["params"]), *(p for o in own for p in _parameters(o))])
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
        if settings.capture:
            # float32, as the fused kernel reads it
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=group["params"][0].device)
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        groups,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=fused,
        capturable=settings.capture,
    )


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


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
