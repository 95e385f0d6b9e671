"""Losses on held-out windows, of one text or of several domains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shearling.errors import ShearlingError
from shearling.train.documents import document_positions, next_tokens
from shearling.train.gradients import autocast
from shearling.train.head import hidden_states, output_head
from shearling.train.loss import IGNORE, chunked_cross_entropy
from shearling.train.settings import TrainSettings
from shearling.train.shard import within
from shearling.train.world import World

#: held-out windows [m, T] of one text, or of several domains by name
Validation = Tensor | Mapping[str, Tensor]


def validation_parts(validation: Validation | None) -> dict[str, Tensor]:
    """Held-out windows by the name that their loss has in metrics and events; ShearlingError for no domain."""
    if validation is None:
        return {}
    if isinstance(validation, Tensor):
        return {"validation_loss": validation}
    if not validation:
        raise ShearlingError("validation: has no domains; give at least one, or leave it out")
    return {f"validation_loss/{name}": windows for name, windows in validation.items()}


def validation_losses(model: Any, validation: Validation, settings: TrainSettings, world: World) -> dict[str, float]:
    """``validation_loss``; of several domains their mean, and each domain's as ``validation_loss/<domain>``."""
    parts = validation_parts(validation)
    losses = {name: validation_loss(model, windows, settings, world) for name, windows in parts.items()}
    if not isinstance(validation, Tensor):
        # weights come of them, and one bit of difference would send processes to different windows
        losses = world.agree(losses)
        losses = {"validation_loss": sum(losses.values()) / len(losses), **losses}
    return losses


@torch.no_grad()
def validation_loss(model: Any, windows: Tensor, settings: TrainSettings, world: World) -> float:
    """Mean next-token loss (nats) over windows [m, T], in evaluation mode; the training mode is put back."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, weight = torch.zeros(2, dtype=torch.float64, device=device)
    # all processes make equally many forward passes, those that have run out of windows over the last one again
    own = range(world.rank, len(windows), world.size)
    padded = list(own) + [len(windows) - 1] * (-(-len(windows) // world.size) - len(own))
    for start in range(0, len(padded), settings.micro_batch):
        rows = padded[start : start + settings.micro_batch]
        counted = min(len(rows), max(0, len(own) - start))
        ids = windows[rows].to(device).long()

        labels = next_tokens(ids, settings.separator)
        labels[counted:] = IGNORE

        def score(ids: Tensor = ids, labels: Tensor = labels) -> Tensor:
            with autocast(device, settings):
                head, bias, softcap = output_head(model)
                states = hidden_states(model, ids, document_positions(ids, settings.separator))
                return chunked_cross_entropy(states, head, labels, softcap, bias=bias)

        # in windows' worth of labels: documents apart leave some without one
        share = ((labels != IGNORE).sum() / (ids.shape[1] - 1)).float()
        total += within(model, score) * share
        weight += share
    model.train(training)
    return float(world.sum_(total) / world.sum_(weight))


def affordable_windows(batch: int, every: int, domains: int = 1, *, share: float = 0.05, trained: float = 1.0) -> int:
    """Most held-out windows a domain, one at least, whose scoring every so many steps takes ``share`` of the FLOPs.

    A forward pass costs F, a training step 2F a window of its ``batch`` and one more F for weights that are ``trained``
    (a share of all); teachers and policies are left out, so where there are some scoring takes less.
    """
    return max(1, math.floor(share * every * batch * (2 + trained) / domains))
