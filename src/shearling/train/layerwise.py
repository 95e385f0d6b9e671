"""Layerwise distillation: the model's hidden states follow a teacher's, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from shearling.anatomy import anatomy_of
from shearling.errors import ShearlingError
from shearling.plan import Edit
from shearling.train.cache import CachedTeacher
from shearling.train.head import blocks_of
from shearling.train.policy import Policy, StepContext
from shearling.train.settings import TrainSettings
from shearling.train.teachers import Teacher, outputs_of


class LayerwiseDistillation(Policy):
    """Adds ``weight`` times the relative squared error of the states after chosen blocks.

    The loss is the mean of |h - t|^2 / |t|^2 over tokens and pairs, h and t [hidden] being what a block of the model
    and one of the teacher leave in the residual stream. ``layers`` lists pairs (the model's block, the teacher's
    block), from 0; None pairs every block of the model as ``even_pairs`` does. The teacher is a model or a ``Teacher``
    that other policies share.

    Where hidden sizes differ, h is P h with one P [teacher's hidden, model's hidden] for all pairs, since all blocks of
    a model write to the stream in one basis; it is trained with the model and dropped in the end (as W_h of TinyBERT,
    arXiv 1909.10351). ``kept`` lists the teacher's dimensions that the model's
    were cut from; ``projection_start`` says what P starts from.
    """

    def __init__(
        self,
        teacher: Any,
        weight: float = 1.0,
        layers: Sequence[tuple[int, int]] | None = None,
        *,
        kept: Sequence[int] | None = None,
    ) -> None:
        if not weight > 0:
            raise ShearlingError(f"layerwise weight {weight}: must be above 0")
        if isinstance(teacher, CachedTeacher):
            raise ShearlingError(f"{teacher.folder}: a cache holds no block outputs; layerwise losses need the model")
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        self.weight = weight
        self.layers = layers
        self.kept = kept
        #: P, None where hidden sizes are equal
        self.projection: nn.Parameter | None = None
        self._pairs: list[tuple[int, int]] = []
        self._hooks = ExitStack()
        self._outputs: dict[int, Tensor] = {}

    def attach(self, model: Any, settings: TrainSettings) -> None:
        own, theirs = anatomy_of(model.config), anatomy_of(self.teacher.model.config)
        pairs = even_pairs(own.num_layers, theirs.num_layers) if self.layers is None else list(self.layers)
        for mine, taught in pairs:
            if not (0 <= mine < own.num_layers and 0 <= taught < theirs.num_layers):
                raise ShearlingError(
                    f"layers ({mine}, {taught}): the model has blocks 0 to {own.num_layers - 1}, the teacher 0 to "
                    f"{theirs.num_layers - 1}"
                )
        if not pairs:
            raise ShearlingError("layers: is empty; give pairs of blocks, or None for all")
        if own.hidden != theirs.hidden:
            # drawn on the CPU, so that a seed means the same on every device
            start = projection_start(own.hidden, theirs.hidden, self.kept)
            self.projection = nn.Parameter(start.to(next(model.parameters()).device))
        self.teacher.follow(model, (taught for _, taught in pairs))
        self._pairs = pairs
        blocks = blocks_of(model)
        # outside of a block's forward, so recomputing it does not come by here again
        self._outputs = self._hooks.enter_context(outputs_of({mine: blocks[mine] for mine, _ in pairs}))
        # of a pass that ran out of memory nothing may stay alive during the next one
        clear = model.base_model.register_forward_pre_hook(lambda module, args: self._outputs.clear())
        self._hooks.callback(clear.remove)

    def auxiliary_groups(self) -> list[dict[str, Any]]:
        # decay would only pull what is compared towards 0
        return [] if self.projection is None else [{"params": [self.projection], "weight_decay": 0.0}]

    def flops_per_token(self, length: int) -> float:
        # forward, and backward by the states and by P
        projected = 0 if self.projection is None else 6 * self.projection.numel() * len(self._pairs)
        return self.teacher.flops_per_token(length) + projected

    def capturable(self) -> bool:
        return self.teacher.resident

    def loss_terms(self, ctx: StepContext) -> dict[str, Tensor]:
        taught = self.teacher.states(ctx.input_ids, ctx.position_ids).blocks
        errors = [relative_error(self._projected(self._outputs[mine]), taught[theirs]) for mine, theirs in self._pairs]
        # their graph is the loss's from here on
        self._outputs.clear()
        return {"layerwise": self.weight * torch.stack(errors).mean()}

    def finalize(self) -> Sequence[Edit]:
        self._hooks.close()
        self.teacher.leave()
        self.projection = None
        return []

    def state_dict(self) -> dict[str, Any]:
        return {} if self.projection is None else {"projection": self.projection.detach()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.projection is not None:
            self.projection.copy_(state["projection"])

    def _projected(self, states: Tensor) -> Tensor:
        if self.projection is None:
            return states
        return nn.functional.linear(states, self.projection.to(states.dtype))


def projection_start(hidden: int, taught: int, kept: Sequence[int] | None = None) -> Tensor:
    """What P [taught, hidden] starts from: the selection of the dimensions ``kept``, so that a cut loses nothing by it.

    Where they are not known, orthonormal columns (rows, where ``hidden`` is the larger) drawn from torch's generator:
    states keep their length. Raises ShearlingError for dimensions that the teacher has not, or not the model's number.
    """
    if kept is None:
        return nn.init.orthogonal_(torch.empty(taught, hidden))
    if len(set(kept)) != hidden or not all(0 <= dim < taught for dim in kept):
        raise ShearlingError(f"kept: must be {hidden} of the teacher's hidden dimensions 0 to {taught - 1}, each once")
    start = torch.zeros(taught, hidden)
    start[list(kept), range(hidden)] = 1
    return start


def relative_error(states: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |h - t|^2 / |t|^2, for ``states`` h and ``target`` t [..., D], in float32 at least."""
    states, target = (t if t.dtype == torch.float64 else t.float() for t in (states, target.detach()))
    size = target.square().sum(-1).clamp(min=torch.finfo(target.dtype).tiny)
    return ((states - target).square().sum(-1) / size).mean()


def even_pairs(num: int, num_teacher: int) -> list[tuple[int, int]]:
    """Each of ``num`` blocks with the teacher's block that stands at the same share of its depth, rounded up.

    Block i of n goes with block ceil((i + 1) m / n) - 1 of m: equal depths pair one to one, and last goes with last.
    """
    return [(i, -(-(i + 1) * num_teacher // num) - 1) for i in range(num)]
