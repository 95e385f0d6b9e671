"""Structured pruning block after block, by least squares over heads and channels in one budget.

    x_l, y_l    input and output of block l in the dense model
    x'_l        its input in the model pruned up to block l - 1
    C'          inputs of an output projection (attention's, then the feed-forward layer's) on x'_l
    T           what that projection must write so that the residual stream comes nearer to the dense one

How much each block gives up is decided beforehand (methods/sensitivity.py). Then, block after block, both projections
lose their least useful units and the others are refit to T (methods/obs.py), so that a block also makes good part of
what the blocks before it lost. On demand all weights of the cut block are trained for a few steps on the same target
(methods/reconstruct.py).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from shearling.anatomy import Anatomy
from shearling.events import OnEvent
from shearling.methods.cfsp import block_importance
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
from shearling.methods.reconstruct import reconstruct_
from shearling.methods.sensitivity import Harm, spend, survey
from shearling.plan import Delta, Edit, Structure, shape_after
from shearling.recipe import Shearling
from shearling.surgery import cut_block_
from shearling.sweep import Angles, Store, Walk, block_tensors, take_values_


def plan_sequential(
    walk: Walk,
    probe: Walk,
    settings: Shearling,
    share: Callable[[], list[int]],
    *,
    remove: int,
    group_cost: float,
    seed: int = 0,
    store: Store,
    on_event: OnEvent | None = None,
) -> tuple[list[float], list[Edit]]:
    """Block importance and edits; the model is left as it is.

    ``remove`` is the budget in channels, ``group_cost`` what a KV group weighs in channels, ``share`` the widths
    where they are uniform. ``store`` keeps the survey and every finished block.
    """
    anatomy = walk.anatomy
    groups = [shape.kv_heads for shape in anatomy.shapes]
    if settings.uniform:
        widths = share()
    else:
        harms = _surveyed(walk, probe, settings, store, on_event)
        widths, groups = spend(harms, anatomy, remove, group_cost, settings.round_to)
    dense = walk.enter()
    edited = dense.clone()
    kept: dict[str, tuple[int, ...]] = {}
    values: dict[str, Tensor] = {}
    angles = []
    for layer in range(len(walk.blocks)):
        start = time.perf_counter()
        finished = store.tensors(f"cut-{layer:04d}")
        with walk.on_device(layer) as block:
            target, middle = dense_pass(walk, layer, dense, block)
            angle = Angles()
            for rows in walk.slices():
                angle(dense[rows], target[rows])
            angles.append(angle.mean)
            stand_in = copy.deepcopy(block)
            if finished is not None:
                own = _restore_(stand_in, layer, anatomy, finished)
            else:
                wish = {ATTENTION: groups[layer], FFN: widths[layer]}
                own = _cut_(walk, layer, stand_in, wish, edited, target, middle, settings)
                if settings.reconstruct is not None:
                    reconstruct_(walk, layer, stand_in, edited, dense, target, settings.reconstruct, seed)
                indices = {f"kept/{space}": torch.tensor(ids, dtype=torch.int32) for space, ids in own.items()}
                store.keep_tensors(f"cut-{layer:04d}", block_tensors(stand_in) | indices)
            walk.advance(layer, edited, block=stand_in)
        kept |= own
        values |= {anatomy.path(layer, name): p.detach().cpu() for name, p in stand_in.named_parameters()}
        error = ((edited - target).float().square().sum() / target.float().square().sum()).item()
        dense = target
        if on_event is not None:
            seconds = time.perf_counter() - start
            blocks = len(walk.blocks)
            on_event({"stage": "measure", "block": layer, "blocks": blocks, "error": error, "seconds": seconds})
    return block_importance(angles), [Structure(kept), Delta(values)]


def _cut_(
    walk: Walk,
    layer: int,
    block: nn.Module,
    wish: dict[str, int],
    edited: Tensor,
    target: Tensor,
    middle: Tensor,
    settings: Shearling,
) -> dict[str, tuple[int, ...]]:
    """Cut attention, then the feed-forward layer, each on the stream as edited so far; returns what is kept."""
    anatomy = walk.anatomy
    kept: dict[str, tuple[int, ...]] = {}
    for part, number in wish.items():
        products = collect(walk, layer, block, part, edited, target, middle, correction=settings.correction)
        total, width = units(anatomy, layer, part)
        chosen = torch.ones(total, dtype=torch.bool)
        if number < total:
            weight = weight_of(block, anatomy, part)
            batch = max(1, total // BATCHES)
            damping = settings.damping
            found = eliminate(*products, weight, remove=total - number, unit=width, damping=damping, batch=batch)
            chosen[found.order] = False
        units_kept = chosen.nonzero().flatten()
        structure = cut_projection_(block, layer, anatomy, part, units_kept, products, settings.damping)
        anatomy = shape_after(anatomy, structure)
        kept |= structure.kept
    return kept


def _surveyed(walk: Walk, probe: Walk, settings: Shearling, store: Store, on_event: OnEvent | None) -> list[Harm]:
    finished = store.content("survey")
    if finished is not None:
        return [Harm.from_json(harm) for harm in finished]
    found = survey(walk, probe, damping=settings.damping, heads=settings.heads, on_event=on_event)
    store.keep_content("survey", [harm.to_json() for harm in found])
    return found


def _restore_(block: nn.Module, layer: int, anatomy: Anatomy, tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Make a copy of the dense block the cut one that was stored."""
    kept = {name.removeprefix("kept/"): tuple(t.tolist()) for name, t in tensors.items() if name.startswith("kept/")}
    cut_block_(block, layer, anatomy, Structure(kept))
    take_values_(block, tensors)
    return kept
