"""One-shot masks, block after block: from a model and calibration text to Masks and the values that go with them.

Within a block the linears are pruned in the order in which a token meets them. With sequential statistics each group of
linears that reads one input is measured after all before it are pruned; else the whole block is measured at once, with
"block" on what the pruned blocks before it wrote, with "dense" on what the dense ones did.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shearling.anatomy import anatomy_of
from shearling.events import OnEvent
from shearling.methods.alps import alps
from shearling.methods.projections import as_out_in
from shearling.methods.reconstruct import reconstruct_
from shearling.methods.sparse import Sparse
from shearling.methods.sparsegpt import sparsegpt
from shearling.methods.wanda import wanda_score
from shearling.plan import Delta, Edit, Masked, Masks, Outcome, Plan, inventory_of, plan_of
from shearling.plan.patterns import Pattern, mask_of, num_kept
from shearling.recipe import UNSTRUCTURED, Sparsify
from shearling.sweep import (
    InputStatistics,
    Store,
    Walk,
    block_tensors,
    fingerprint,
    input_statistics,
    take_values_,
)

#: methods that give the weights that stay new values, from the inputs' Gram matrix
SOLVERS: dict[str, Callable[[Tensor, Tensor, Pattern | float, float], Sparse]] = {"sparsegpt": sparsegpt, "alps": alps}


def plan_masks(
    model: Any,
    tokens: Tensor,
    settings: Sparsify,
    *,
    batch: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
    state_dir: Path | None = None,
    on_event: OnEvent | None = None,
    name: str = "",
) -> Outcome:
    """Masks for every linear of every block, measured on windows [num, T], and new values where the method has some.

    The model is left as it is; carry the edits out with ``surgery.cut_``. ``state_dir`` keeps finished blocks. Raises
    ShearlingError for a pattern that does not divide a linear's inputs, before anything is measured, for a Gram matrix
    that stays singular, and for activations that are not finite.
    """
    walk = Walk(model, tokens, batch=batch, device=device)
    anatomy = walk.anatomy
    pattern = pattern_of(settings)
    # refuses what does not divide
    preview_masks(model, settings)
    store = Store(None)
    if state_dir is not None:
        store = Store(state_dir / fingerprint(model, tokens, settings.model_dump(), batch, seed)[:16])
    follow, trained = settings.statistics != "dense", settings.reconstruct is not None
    # magnitude alone asks nothing of the text
    read = trained or settings.method != "magnitude"
    dense = walk.enter() if read and (trained or not follow) else None
    edited = walk.enter() if read and (trained or follow) else None
    masks: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for layer in range(len(walk.blocks)):
        start = time.perf_counter()
        finished = store.tensors(f"mask-{layer:04d}")
        with walk.on_device(layer) as block:
            stand_in = copy.deepcopy(block)
            if finished is not None:
                take_values_(stand_in, finished)
                own = {name.removeprefix("mask/"): t for name, t in finished.items() if name.startswith("mask/")}
            else:
                states = edited if follow else dense
                own, damping = _prune_(walk, layer, stand_in, block, states, settings, pattern)
                if damping > settings.damping and on_event is not None:
                    raised = f"block {layer}: a Gram matrix needed damping {damping:g} instead of {settings.damping:g}"
                    on_event({"stage": "measure", "warning": raised})
            target = dense
            if dense is not None:
                out = torch.empty_like(dense) if trained else dense
                target = walk.advance(layer, dense, block=block, out=out)
            if finished is None:
                if settings.reconstruct is not None:
                    assert edited is not None and dense is not None and target is not None
                    reconstruct_(walk, layer, stand_in, edited, dense, target, settings.reconstruct, seed, own)
                beside = {f"mask/{name}": mask for name, mask in own.items()}
                store.keep_tensors(f"mask-{layer:04d}", block_tensors(stand_in) | beside)
            if edited is not None:
                walk.advance(layer, edited, block=stand_in)
            dense = target
            masks |= {anatomy.path(layer, name): mask.cpu() for name, mask in own.items()}
            if trained or settings.method in SOLVERS:
                changed = {n: p for n, p in stand_in.named_parameters() if trained or n in own}
                values |= {anatomy.path(layer, name): p.detach().cpu() for name, p in changed.items()}
        if on_event is not None:
            seconds = time.perf_counter() - start
            on_event({"stage": "measure", "block": layer, "blocks": len(walk.blocks), "seconds": seconds})
    kept = Masks(masks, None if isinstance(pattern, float) else str(pattern))
    edits: tuple[Edit, ...] = (Delta(values), kept) if values else (kept,)
    return Outcome(plan_of(name, settings.method, anatomy, inventory_of(model), edits), edits)


def preview_masks(model: Any, settings: Sparsify, name: str = "") -> Plan:
    """The plan before anything is measured. ``model`` may be on meta. ShearlingError as ``plan_masks``."""
    anatomy = anatomy_of(model.config)
    pattern = pattern_of(settings)
    kept = covered = 0
    for layer in range(anatomy.num_layers):
        for inner in anatomy.family.linears:
            weight = as_out_in(anatomy, model.get_parameter(f"{anatomy.path(layer, inner)}.weight"))
            outputs, inputs = weight.shape
            kept, covered = kept + outputs * num_kept(pattern, inputs), covered + outputs * inputs
    plan = plan_of(name, settings.method, anatomy, inventory_of(model), ())
    return replace(plan, masked=Masked(settings.pattern, kept, covered))


def pattern_of(settings: Sparsify) -> Pattern | float:
    """N:M, or the share of each row that goes."""
    return settings.sparsity if settings.pattern == UNSTRUCTURED else Pattern.parse(settings.pattern)


@torch.no_grad()
def _prune_(
    walk: Walk,
    layer: int,
    stand_in: nn.Module,
    block: nn.Module,
    states: Tensor | None,
    settings: Sparsify,
    pattern: Pattern | float,
) -> tuple[dict[str, Tensor], float]:
    """Prune the linears of ``stand_in`` in place; returns masks by name, as stored, and the greatest damping needed.

    Magnitude needs no ``states``.
    """
    groups, gram = walk.anatomy.family.readers, settings.method in SOLVERS
    # linears of one group read the same input, so one of them is tapped
    readers = [group[0] for group in groups]
    sequential = settings.statistics == "sequential"
    measured: Mapping[str, InputStatistics] = {}
    if settings.method != "magnitude" and not sequential:
        assert states is not None
        measured = input_statistics(walk, layer, states, readers, gram=gram, block=block)
    masks: dict[str, Tensor] = {}
    damping = 0.0
    for reader, group in zip(readers, groups, strict=True):
        if settings.method != "magnitude" and sequential:
            assert states is not None
            measured = input_statistics(walk, layer, states, [reader], gram=gram, block=stand_in)
        for name in group:
            stored = stand_in.get_parameter(f"{name}.weight")
            weight = as_out_in(walk.anatomy, stored)
            found = _pruned(weight, measured.get(reader), settings, pattern)
            weight.copy_(found.weight)
            masks[f"{name}.weight"] = as_out_in(walk.anatomy, found.mask).contiguous()
            damping = max(damping, found.damping)
    return masks, damping


def _pruned(weight: Tensor, inputs: InputStatistics | None, settings: Sparsify, pattern: Pattern | float) -> Sparse:
    """New values and mask of one weight [out, in]."""
    if settings.method in SOLVERS:
        assert inputs is not None and inputs.gram is not None
        return SOLVERS[settings.method](weight, inputs.gram.to(weight.device), pattern, settings.damping)
    if settings.method == "wanda":
        assert inputs is not None
        score = wanda_score(weight, inputs.norm.to(weight.device))
    else:
        score = weight.abs()
    mask = mask_of(score, pattern)
    return Sparse(torch.where(mask, weight, torch.zeros_like(weight)), mask, 0.0)
