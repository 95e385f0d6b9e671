"""Distillation: the model follows a teacher's next-token distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from torch import Tensor, nn

from shearling.errors import ShearlingError
from shearling.plan import Edit
from shearling.train.cache import CachedTeacher
from shearling.train.head import output_head
from shearling.train.loss import PLAIN_CHUNK, Divergence, chunked_head_loss
from shearling.train.policy import Policy, StepContext
from shearling.train.settings import TrainSettings
from shearling.train.teachers import Teacher
from shearling.train.topk import chunked_topk_divergence


class Distillation(Policy):
    """Adds ``weight`` times a divergence from a teacher at a temperature, from hidden states in chunks.

    ``kind`` and ``chunk`` are as in ``chunked_divergence``. The teacher may be any causal language model over the same
    vocabulary, or a larger one that begins with it, on the model's device; it is put into evaluation mode and never
    changed. A ``Teacher`` is one that several policies share. A ``CachedTeacher`` over the same windows and vocabulary
    gives the forward divergence of ``chunked_topk_divergence`` at temperature 1. Cross-entropy keeps the weight that
    the settings give it; but for a cache it is taken in the same pass through the head.
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
        if isinstance(teacher, CachedTeacher) and (kind, temperature) != ("forward", 1):
            raise ShearlingError(
                f"distillation {kind!r}, temperature {temperature}: a cached teacher gives only forward at 1"
            )
        self.kind: Divergence = kind
        self.teacher = teacher if isinstance(teacher, Teacher | CachedTeacher) else Teacher(teacher)
        self.weight = weight
        self.temperature = temperature
        self.chunk = chunk

    def attach(self, model: nn.Module, settings: TrainSettings) -> None:
        if isinstance(self.teacher, CachedTeacher):
            self.teacher.check_vocabulary(output_head(model).weight.shape[0])
            self.teacher.check_separator(settings.separator)
        else:
            self.teacher.follow(model)

    def flops_per_token(self, length: int) -> float:
        return 0.0 if isinstance(self.teacher, CachedTeacher) else self.teacher.flops_per_token(length)

    def capturable(self) -> bool:
        # a cache is read from disk
        return isinstance(self.teacher, Teacher) and self.teacher.resident

    def loss_terms(self, ctx: StepContext) -> dict[str, Tensor]:
        assert ctx.hidden is not None
        head = output_head(ctx.model)
        if isinstance(self.teacher, CachedTeacher):
            log_probs, ids = (t.to(ctx.device) for t in self.teacher.rows(ctx.indices))
            chunk = self.chunk or PLAIN_CHUNK
            divergence = chunked_topk_divergence(ctx.hidden, head, log_probs, ids, ctx.labels, chunk)
            return {"distillation": self.weight * divergence}
        found = chunked_head_loss(
            ctx.hidden,
            head,
            self.teacher.states(ctx.input_ids, ctx.position_ids).hidden,
            self.teacher.head(),
            ctx.labels,
            self.temperature,
            self.chunk,
            self.kind,
            cross_entropy_weight=ctx.cross_entropy,
            divergence_weight=self.weight,
        )
        if not ctx.cross_entropy:
            return {"distillation": found.total}
        # both losses in one pass; their sum carries the gradient of both
        entropy, ctx.cross_entropy = ctx.cross_entropy * found.cross_entropy, 0.0
        return {"cross_entropy": entropy, "distillation": found.total - entropy}

    def finalize(self) -> Sequence[Edit]:
        if isinstance(self.teacher, Teacher):
            self.teacher.leave()
        return []
