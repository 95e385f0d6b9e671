"""What a checkpoint of the loop holds, and how a run takes it up again."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.data import Domains, Windows
from shearling.errors import ShearlingError
from shearling.train.checkpoint import Checkpoints, Place
from shearling.train.optimizers import Optimizers
from shearling.train.policy import Policy
from shearling.train.sampler import MixtureSampler, WindowSampler
from shearling.train.settings import TrainSettings
from shearling.train.world import World

#: settings that a resumed run may change, since they leave the parameters alone
_FREE = ("log_every", "checkpoint_every", "recompute", "compile", "capture")


@dataclass
class Counters:
    """How far a run is, and how many windows fit at a time; ``losses`` has the total loss of each step."""

    micro_batch: int
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    skipped_in_row: int = 0
    best_step: int | None = None
    best_loss: float = math.inf


@dataclass(frozen=True)
class Run:
    """Everything that a step changes or reads; ``best`` has the parameters of the best validation, on the CPU."""

    model: Any
    optimizers: Optimizers
    sampler: WindowSampler | MixtureSampler
    policies: tuple[Policy, ...]
    settings: TrainSettings
    windows: Windows
    checkpoints: Checkpoints | None
    world: World
    best: dict[str, Tensor] = field(default_factory=dict)

    def save(self, counters: Counters) -> None:
        """Write a checkpoint, where there is a folder for it."""
        if self.checkpoints is None:
            return
        state = {
            "run": self._fingerprint(),
            "counters": vars(counters),
            "sampler": self.sampler.state_dict(),
            "model": self._tensors(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers.all],
            "policies": [policy.state_dict() for policy in self.policies],
            "best": self.best,
        }
        self.checkpoints.save(counters.step, state)

    @torch.no_grad()
    def resume(self, emit: Callable[[dict[str, Any]], None]) -> Counters:
        """Take up the newest readable checkpoint, or start from nothing.

        Raises ShearlingError when the checkpoint is of another run.
        """
        if self.checkpoints is None:
            return Counters(self.settings.micro_batch)
        stored, broken = self.checkpoints.newest()
        step = 0 if stored is None else stored.tree["counters"]["step"]
        for path in broken:
            emit({"step": step, "warning": f"{path}: cannot be read; going on from step {step}"})
            if self.world.first:
                shutil.rmtree(path)
        if stored is None:
            return Counters(self.settings.micro_batch)
        self._check(stored.path.parent, stored.tree["run"])
        state = stored.load(self.world, self._like)
        self.optimizers.load_state_dicts(state["optimizers"])
        for policy, content in zip(self.policies, state["policies"], strict=True):
            policy.load_state_dict(content)
        self.sampler.load_state_dict(state["sampler"])
        self.best.update(state["best"])
        emit({"step": step, "resumed": True})
        return Counters(**state["counters"])

    def _like(self, place: Place) -> Tensor | None:
        """What a tensor of a checkpoint is read into: the model's own, or one that is sharded as its parameter."""
        match place.keys:
            case ("model", name):
                return self._tensors()[name]
            case ("best", name):
                return torch.empty_like(self._tensors()[name], device="cpu")
            case ("optimizers", number, "state", index, _):
                groups = self.optimizers.all[number].param_groups
                parameter = [p for group in groups for p in group["params"]][index].detach()
                return torch.empty_like(parameter) if place.shape == parameter.shape else None
        return None

    def validated(self, counters: Counters, loss: float) -> None:
        """Remember the parameters where the validation loss is the lowest so far and the run is to end with them."""
        if self.settings.keep == "best" and loss < counters.best_loss:
            counters.best_step, counters.best_loss = counters.step, loss
            self.best.update({name: t.detach().cpu().clone() for name, t in self._tensors().items()})

    @torch.no_grad()
    def take_best(self) -> None:
        """Give the model the remembered parameters, where there are some."""
        for name, tensor in self._tensors().items():
            if name in self.best:
                tensor.copy_(self.best[name])

    def _tensors(self) -> dict[str, Tensor]:
        """Trained parameters and saved buffers (masks among them) of the model, by name."""
        trained = {id(p) for p in self.optimizers.parameters}
        parameters = {name: p.detach() for name, p in self.model.named_parameters() if id(p) in trained}
        all_parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        state = self.model.state_dict()
        buffers = {name: t for name, t in state.items() if isinstance(t, Tensor) and name not in all_parameters}
        return parameters | buffers

    def _fingerprint(self) -> dict[str, Any]:
        settings = {k: v for k, v in dataclasses.asdict(self.settings).items() if k not in _FREE}
        shapes = sorted((name, tuple(tensor.shape)) for name, tensor in self._tensors().items())
        return {
            **{name: str(value) for name, value in settings.items()},
            "policies": ", ".join(type(policy).__name__ for policy in self.policies),
            "trained tensors": hashlib.sha256(repr(shapes).encode()).hexdigest(),
            "windows": self.windows.digest(),
            **({"domains": str(self.windows.weights)} if isinstance(self.windows, Domains) else {}),
        }

    def _check(self, folder: Path, saved: dict[str, Any]) -> None:
        for name, value in self._fingerprint().items():
            if saved.get(name) != value:
                raise ShearlingError(
                    f"{folder}: holds a run with {name}={saved.get(name)}, this one has {value}; "
                    "use another folder, or delete this one to start anew"
                )
