"""Quantising the linears of all blocks: from a model, and text for GPTQ, to a ``Quant`` edit.

GPTQ walks as one-shot masks do: within a block linears are rounded in the order in which a token meets them, and those
that read one input are measured when all before them, in this block and the blocks before, are rounded.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shearling.anatomy import anatomy_of
from shearling.errors import ShearlingError
from shearling.events import OnEvent
from shearling.methods.gptq import gptq
from shearling.methods.projections import as_out_in
from shearling.methods.rounding import rounded
from shearling.plan import Codes, Grid, Quant, dequantise, inventory_of, quantised_size
from shearling.plan.patterns import Pattern
from shearling.recipe import Quantise
from shearling.sweep import Store, Walk, block_tensors, fingerprint, input_statistics, take_values_


def plan_quantised(
    model: Any,
    tokens: Tensor,
    settings: Quantise,
    *,
    pattern: str | None = None,
    batch: int = 8,
    device: torch.device | str | None = None,
    state_dir: Path | None = None,
    on_event: OnEvent | None = None,
) -> Quant:
    """Every linear of every block on a grid, GPTQ's measured on windows [num, T]; weights that are 0 stay 0.

    The model is left as it is; carry the edit out with ``surgery.cut_``. ``pattern`` (N:M) is what the weights must
    keep to. ``state_dir`` keeps finished blocks. Raises ShearlingError, before anything is measured, for inputs that
    the grid's groups do not fill and weights that are not of the pattern.
    """
    anatomy, grid = anatomy_of(model.config), Grid(settings.format, settings.group)
    # refuses what groups do not fill
    quantised_size(inventory_of(model), anatomy, grid)
    if pattern is not None:
        check_pattern(model, pattern)
    found: dict[str, Codes] = {}
    if settings.method == "rtn":
        for layer in range(anatomy.num_layers):
            for name in anatomy.weights(layer):
                found[name] = _on_cpu(rounded(as_out_in(anatomy, model.get_parameter(name)), grid, settings.scales))
        return _edit(found, grid)
    walk = Walk(model, tokens, batch=batch, device=device)
    store = Store(None)
    if state_dir is not None:
        store = Store(state_dir / fingerprint(model, tokens, settings.model_dump(), batch)[:16])
    states = walk.enter()
    for layer in range(len(walk.blocks)):
        start = time.perf_counter()
        finished = store.tensors(f"quant-{layer:04d}")
        with walk.on_device(layer) as block:
            stand_in = copy.deepcopy(block)
            if finished is None:
                own, damping = _gptq_(walk, layer, stand_in, states, grid, settings)
                store.keep_tensors(f"quant-{layer:04d}", block_tensors(stand_in) | _named(own))
                if damping > settings.damping and on_event is not None:
                    raised = f"block {layer}: a Gram matrix needed damping {damping:g} instead of {settings.damping:g}"
                    on_event({"stage": "quantise", "warning": raised})
            else:
                take_values_(stand_in, finished)
                names = anatomy.weights(layer)
                own = {name: Codes(*(finished[f"{part}/{name}"] for part in Codes._fields)) for name in names}
            walk.advance(layer, states, block=stand_in)
        found |= own
        if on_event is not None:
            seconds = time.perf_counter() - start
            on_event({"stage": "quantise", "block": layer, "blocks": len(walk.blocks), "seconds": seconds})
    return _edit(found, grid)


def check_pattern(model: Any, pattern: str) -> None:
    """Raise ShearlingError for the first weight of a block's linear with more in a group than an N:M pattern keeps."""
    anatomy, wanted = anatomy_of(model.config), Pattern.parse(pattern)
    for layer in range(anatomy.num_layers):
        for name in anatomy.weights(layer):
            weight = as_out_in(anatomy, model.get_parameter(name))
            full = (weight.unflatten(1, (-1, wanted.of)) != 0).sum(-1) > wanted.keep
            if full.any():
                raise ShearlingError(
                    f"{name}: is said to be {pattern}, but {int(full.sum())} of its {full.numel()} groups keep more; "
                    "mask it again, or quantise it as a dense model"
                )


@torch.no_grad()
def _gptq_(
    walk: Walk, layer: int, stand_in: nn.Module, states: Tensor, grid: Grid, settings: Quantise
) -> tuple[dict[str, Codes], float]:
    """Round the linears of ``stand_in`` in place; returns codes by full names, and the greatest damping needed."""
    found: dict[str, Codes] = {}
    damping = 0.0
    for group in walk.anatomy.family.readers:
        inputs = input_statistics(walk, layer, states, group[:1], gram=True, block=stand_in)[group[0]]
        assert inputs.gram is not None
        gram = inputs.gram.to(walk.device)
        for linear in group:
            stored = stand_in.get_parameter(f"{linear}.weight")
            weight = as_out_in(walk.anatomy, stored)
            options = {"damping": settings.damping, "order": settings.order, "scales": settings.scales}
            codes, needed = gptq(weight, gram, grid, weight != 0, **options)
            weight.copy_(dequantise(*codes, weight.dtype))
            found[walk.anatomy.path(layer, f"{linear}.weight")] = _on_cpu(codes)
            damping = max(damping, needed)
    return found, damping


def _on_cpu(codes: Codes) -> Codes:
    return Codes(*(part.cpu() for part in codes))


def _named(codes: Mapping[str, Codes]) -> dict[str, Tensor]:
    return {f"{part}/{name}": getattr(each, part) for name, each in codes.items() for part in Codes._fields}


def _edit(found: Mapping[str, Codes], grid: Grid) -> Quant:
    parts = ({name: getattr(codes, part) for name, codes in found.items()} for part in Codes._fields)
    return Quant(*parts, bits=grid.bits, group=grid.group)
