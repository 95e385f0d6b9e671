"""Distillation: the model follows a teacher's next-token distribution."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from shearling.errors import ShearlingError
from shearling.train.head import hidden_states, output_head
from shearling.train.loss import Divergence, chunked_divergence
from shearling.train.policy import Policy, StepContext
from shearling.train.settings import TrainSettings


class Distillation(Policy):
    """Adds ``weight`` times a divergence from a teacher at a temperature, from hidden states in chunks.

    ``kind`` and ``chunk`` are as in ``chunked_divergence``. The teacher may be any causal language model over the same
    vocabulary, or a larger one that begins with it, on the model's device; it is put into evaluation mode and never
    changed. Cross-entropy keeps the weight that the settings give it.
    """

    def __init__(
        self,
        teacher: Any,
        *,
        weight: float = 1.0,
        temperature: float = 1.0,
        kind: Divergence = "forward",
        chunk: int | None = None,
    ) -> None:
        if not (weight > 0 and temperature > 0):
            raise ShearlingError(f"distillation weight {weight}, temperature {temperature}: both must be above 0")
        if kind not in get_args(Divergence):
            raise ShearlingError(f"distillation {kind!r}: must be one of {', '.join(get_args(Divergence))}")
        self.kind: Divergence = kind
        self.teacher = teacher
        self.weight = weight
        self.temperature = temperature
        self.chunk = chunk

    def attach(self, model: nn.Module, settings: TrainSettings) -> None:
        if self.teacher is model:
            raise ShearlingError("teacher: is the model itself; load a second copy")
        own, theirs = output_head(model).weight.shape[0], output_head(self.teacher).weight.shape[0]
        if own > theirs:
            raise ShearlingError(
                f"teacher: vocabulary of {theirs}, the model's is {own}; it must be the same or begin with the model's"
            )
        self.teacher.eval()

    def loss_terms(self, ctx: StepContext) -> dict[str, Tensor]:
        assert ctx.hidden is not None
        with torch.no_grad():
            taught = hidden_states(self.teacher, ctx.input_ids)
        divergence = chunked_divergence(
            ctx.hidden,
            output_head(ctx.model),
            taught,
            output_head(self.teacher),
            ctx.labels,
            self.temperature,
            self.chunk,
            self.kind,
        )
        return {"distillation": self.weight * divergence}
