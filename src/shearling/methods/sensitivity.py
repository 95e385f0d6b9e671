"""What cutting one block alone does to the model, and sharing a budget out by it.

A survey cuts every block of the dense model to a few widths, one at a time, refits its output projection, and measures
the mean divergence KL(dense || cut) of the next-token distribution on a few probe sequences. All cut variants travel
through the later blocks together, so one sweep serves them all. Between the measured widths the divergence follows the
shape of the least-squares error. The budget then goes where it costs the least divergence per parameter.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shearling.anatomy import Anatomy
from shearling.errors import ShearlingError
from shearling.methods.obs import eliminate
from shearling.methods.projections import (
    ATTENTION,
    BATCHES,
    FFN,
    collect,
    cut_projection_,
    dense_pass,
    units,
    weight_of,
)
from shearling.plan import round_to_total
from shearling.sweep import Walk

#: shares of a block's channels that the survey takes away
SHARES = (0.25, 0.5, 0.9)
#: the budget is spent in this many portions of a block's channels
PORTIONS = 64
#: distributions are compared at every so many positions of a probe: the output head costs more than the blocks
STRIDE = 4
#: no block loses more than this share of its channels
MOST = 0.875

#: part, layer, units removed
Key = tuple[str, int, int]


@dataclass(frozen=True)
class Harm:
    """Effects of cutting one block alone.

    ``channels`` and ``groups`` map units removed to divergence (nats a token); ``error`` is the least-squares error
    after n channels.
    """

    channels: dict[int, float]
    groups: dict[int, float]
    error: list[float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Harm:
        channels, groups = ({int(n): kl for n, kl in content[part].items()} for part in ("channels", "groups"))
        return cls(channels, groups, content["error"])


@torch.no_grad()
def survey(
    walk: Walk, probe: Walk, *, damping: float, heads: bool, on_event: Callable[[dict[str, Any]], None] | None = None
) -> list[Harm]:
    """Harm of every block: statistics on ``walk``'s sequences, divergence on ``probe``'s."""
    states, small = walk.enter(), probe.enter()
    variants: dict[Key, Tensor] = {}
    errors = []
    for layer in range(len(walk.blocks)):
        with walk.on_device(layer) as block:
            for x in variants.values():
                probe.advance(layer, x)
            target, middle = dense_pass(walk, layer, states, block)
            for part in (FFN, ATTENTION) if heads else (FFN,):
                total, width = units(walk.anatomy, layer, part)
                if total == 1:
                    continue
                products = collect(walk, layer, block, part, states, target, middle, correction=0.0)
                weight = weight_of(block, walk.anatomy, part)
                batch = max(1, total // BATCHES)
                counts = sorted({round(s * total) for s in SHARES}) if part == FFN else list(range(1, total))
                counts = [count for count in counts if 0 < count < total]
                found = eliminate(*products, weight, remove=counts[-1], unit=width, damping=damping, batch=batch)
                for removed in counts:
                    stand_in = copy.deepcopy(block)
                    kept = torch.ones(total, dtype=torch.bool)
                    kept[found.order[:removed]] = False
                    kept = kept.nonzero().flatten()
                    cut_projection_(stand_in, layer, walk.anatomy, part, kept, products, damping)
                    out = torch.empty_like(small)
                    variants[part, layer, removed] = probe.advance(layer, small, block=stand_in, out=out)
                if part == FFN:
                    errors.append(found.cost)
            probe.advance(layer, small)
        states = target
        if on_event is not None:
            on_event({"stage": "survey", "block": layer, "blocks": len(walk.blocks)})
    harm = _divergences(walk.model, walk.anatomy, small, variants)

    def effects(part: str, layer: int) -> dict[int, float]:
        return {n: kl for (p, at, n), kl in harm.items() if p == part and at == layer}

    return [Harm(effects(FFN, at), effects(ATTENTION, at), errors[at]) for at in range(len(walk.blocks))]


def spend(
    harms: Sequence[Harm], anatomy: Anatomy, remove: int, group_cost: float, multiple: int = 1
) -> tuple[list[int], list[int]]:
    """(channels kept, KV groups kept) of every block when ``remove`` channels' worth of parameters goes.

    ``group_cost`` is what a KV group weighs, in channels. Raises ShearlingError when the blocks cannot pay.
    """
    full = [shape.ffn for shape in anatomy.shapes]
    groups = [shape.kv_heads for shape in anatomy.shapes]
    moves: list[tuple[float, float, str, int]] = []
    for layer, harm in enumerate(harms):
        sizes = [full[layer] * n / PORTIONS for n in range(1, int(PORTIONS * MOST) + 1)]
        points = [(size, _between(harm, size)) for size in sizes]
        moves += [(slope, size, FFN, layer) for slope, size in _hull(points)]
        points = [(group_cost * n, kl) for n, kl in sorted(harm.groups.items())]
        moves += [(slope, size, ATTENTION, layer) for slope, size in _hull(points)]
    width = [float(size) for size in full]
    left = float(remove)
    for _, size, part, layer in sorted(moves):
        if part == FFN:
            taken = min(size, left)
            width[layer] -= taken
            left -= taken
        elif size <= left:
            groups[layer] -= round(size / group_cost)
            left -= size
    if left > 0.5:
        raise ShearlingError(
            f"{remove} channels to remove: {round(remove - left)} is the most, {MOST:.1%} of each block; choose less"
        )
    total = (
        sum(full)
        - remove
        + round(group_cost * sum(s.kv_heads - kept for s, kept in zip(anatomy.shapes, groups, strict=True)))
    )
    return round_to_total(width, total, multiple=multiple, low=[multiple] * len(full), high=full), groups


def _between(harm: Harm, removed: float) -> float:
    """Divergence after so many channels: measured points, joined along the shape of the error."""
    known = [(0, 0.0), *sorted(harm.channels.items())]
    low = max(point for point in known if point[0] <= removed)
    above = [point for point in known if point[0] > removed]
    if not above:
        (n0, kl0), (n1, kl1) = known[-2:]
        return kl1 + 4 * (kl1 - kl0) / (n1 - n0) * (removed - n1)
    high = above[0]
    error = [harm.error[min(round(n), len(harm.error) - 1)] for n in (low[0], removed, high[0])]
    rise = error[2] - error[0]
    part = (error[1] - error[0]) / rise if rise > 0 else (removed - low[0]) / (high[0] - low[0])
    return low[1] + part * (high[1] - low[1])


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(slope, length) of the lower convex hull through the origin and (size, harm) points, by rising slope."""
    hull = [(0.0, 0.0)]
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(_slope(a, b), b[0] - a[0]) for a, b in itertools.pairwise(hull)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _divergences(model: Any, anatomy: Anatomy, dense: Tensor, cut: Mapping[Key, Tensor]) -> dict[Key, float]:
    """Mean KL of next-token distributions from states [num, T, hidden] after the last block, for each cut variant."""
    path = anatomy.family.final_norm
    norm: nn.Module = nn.Identity() if path is None else model.get_submodule(path)
    head = model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)
    home = head.weight.device

    def log_probabilities(x: Tensor) -> Tensor:
        logits = head(norm(x[::STRIDE].to(home))).float()
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)

    totals = {key: torch.zeros((), dtype=torch.float64, device=home) for key in cut}
    for row, x in enumerate(dense):
        p = log_probabilities(x)
        chances = p.exp()
        entropy = (chances * p).sum(-1)
        for key, y in cut.items():
            totals[key] += (entropy - torch.linalg.vecdot(chances, log_probabilities(y[row]))).mean()
    return {key: total.item() / len(dense) for key, total in totals.items()}
