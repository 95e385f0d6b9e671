"""Gradients of a batch, accumulated over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from shearling.captured import Captured
from shearling.errors import ShearlingError
from shearling.train.documents import document_positions, next_tokens
from shearling.train.head import hidden_states, output_head
from shearling.train.loss import IGNORE, chunked_cross_entropy
from shearling.train.policy import Policy, StepContext
from shearling.train.settings import TrainSettings
from shearling.train.shard import within
from shearling.train.world import World


class Losses(NamedTuple):
    """The share that a micro-batch has in its batch's loss, and in every term of it; detached."""

    total: Tensor
    terms: dict[str, Tensor]


class Gradients:
    """Adds up a batch's gradients in ``.grad``, ``micro_batch`` windows at a time.

    With ``settings.capture`` the work on a micro-batch becomes a CUDA graph, whose launch costs next to nothing:
    gradients and losses are then the same tensors at every step. Raises ShearlingError where that cannot be, and
    NotCapturable where that turns out later.
    """

    def __init__(self, policies: Sequence[Policy], settings: TrainSettings, device: torch.device, world: World) -> None:
        self._policies, self._settings, self._world = policies, settings, world
        self._captured: _CapturedWork | None = None
        if not settings.capture:
            return
        for policy in policies:
            if not policy.capturable():
                raise ShearlingError(f"capture: {type(policy).__name__} does other work at every step; leave it off")
        if world.size > 1:
            raise ShearlingError(f"capture: is for one process, here are {world.size}; leave it off")
        if device.type != "cuda":
            raise ShearlingError(f"capture: needs a GPU, this is {device.type}; leave it off")

    def __call__(self, ctx: StepContext, ids: Tensor, micro_batch: int) -> Tensor:
        """Accumulate the gradients of a batch [B, T]; returns its loss. Several terms are noted in the metrics."""
        total = torch.zeros((), device=ctx.device)
        whole = self._whole(ids)
        for rows, indices in zip(ids.split(micro_batch), ctx.indices.split(micro_batch), strict=True):
            here = replace(ctx, input_ids=rows, indices=indices)
            # a batch's last rows may be fewer
            alike = len(rows) == min(micro_batch, len(ids))
            share = _weight(rows, self._settings) / whole
            if self._settings.capture and alike:
                found = self._replay(here, share)
            else:
                found = _work(here, self._policies, self._settings, share)
            total += found.total
            if len(found.terms) > 1:
                for name, term in found.terms.items():
                    ctx.metrics[name] = ctx.metrics.get(name, 0.0) + term
        return total

    def _whole(self, ids: Tensor) -> float | Tensor:
        """Weight of the batch [B, T], over all processes, in units of this process' part."""
        weight = _weight(ids, self._settings)
        # windows are shared out evenly, labels are not
        return self._world.mean_(weight).clamp(min=1 / self._world.size) if isinstance(weight, Tensor) else weight

    def _replay(self, ctx: StepContext, share: float | Tensor) -> Losses:
        shape = ctx.input_ids.shape
        if self._captured is None or self._captured.ids.shape != shape:
            # the graph of another size goes first, with its memory
            self._captured = None
            buffer = ctx.input_ids.clone()
            own = replace(ctx, input_ids=buffer)
            self._captured = _CapturedWork(partial(_work, own, self._policies, self._settings, share), buffer)
        try:
            return self._captured(ctx.input_ids)
        except torch.OutOfMemoryError:
            self._captured = None
            raise


class _CapturedWork:
    """Work on one buffer of token ids, repeated for others of the same shape."""

    def __init__(self, work: Callable[[], Losses], ids: Tensor) -> None:
        self.ids = ids
        self._found: Losses | None = None
        self._work = work
        self._run = Captured(self._once)

    def __call__(self, ids: Tensor) -> Losses:
        self.ids.copy_(ids)
        self._run()
        assert self._found is not None
        return self._found

    def _once(self) -> None:
        # of what is captured these tensors are written anew by every replay
        self._found = self._work()


def _weight(ids: Tensor, settings: TrainSettings) -> float | Tensor:
    """What windows [B, T] weigh in a mean: their number, or that of their labels where windows differ in it."""
    if settings.separator is None:
        return float(len(ids))
    return (next_tokens(ids, settings.separator) != IGNORE).sum().float()


def _work(ctx: StepContext, policies: Sequence[Policy], settings: TrainSettings, share: float | Tensor) -> Losses:
    """Run the model forward and backward on the context's windows, which have that share in their batch."""
    ctx.labels = next_tokens(ctx.input_ids, settings.separator)
    ctx.position_ids = document_positions(ctx.input_ids, settings.separator)
    terms = within(ctx.model, lambda: _loss_terms(ctx, policies, settings))
    ctx.hidden = None
    if not terms:
        raise ShearlingError("cross_entropy=0 and no policy adds a loss: nothing to train on")
    loss = torch.stack([term.to(torch.float32) for term in terms.values()]).sum() * share
    loss.backward()
    return Losses(loss.detach(), {name: term.detach() * share for name, term in terms.items()})


def _loss_terms(ctx: StepContext, policies: Sequence[Policy], settings: TrainSettings) -> dict[str, Tensor]:
    """Run the model on the context's windows; its losses by name."""
    terms: dict[str, Tensor] = {}
    with autocast(ctx.device, settings):
        ctx.hidden = hidden_states(ctx.model, ctx.input_ids, ctx.position_ids)
        ctx.cross_entropy = settings.cross_entropy
        for policy in policies:
            for name, term in policy.loss_terms(ctx).items():
                assert name not in terms, f"two losses are called {name}"
                terms[name] = term
        if ctx.cross_entropy:
            weight, bias, softcap = output_head(ctx.model)
            entropy = chunked_cross_entropy(ctx.hidden, weight, ctx.labels, softcap, bias=bias)
            terms["cross_entropy"] = ctx.cross_entropy * entropy
    return terms


def compute_type(device: torch.device, settings: TrainSettings) -> torch.dtype | None:
    """The type of products, None where it is the parameters' own."""
    dtype = settings.autocast or (torch.bfloat16 if device.type == "cuda" else None)
    return None if dtype == torch.float32 else dtype


def autocast(device: torch.device, settings: TrainSettings) -> torch.autocast:
    dtype = compute_type(device, settings)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
