"""Quantising the linears of all blocks: from a model, and text where inputs count, to a ``Quant`` edit and branches.

What needs statistics walks as one-shot masks do: within a block linears are rounded in the order in which a token meets
them, and those that read one input are measured when all before them, in this block and the blocks before, are done.
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
from shearling.methods.slim import compensated, slim_rounded
from shearling.plan import Adapters, Codes, Grid, Quant, dequantise, inventory_of, quantised_size
from shearling.plan.patterns import Pattern
from shearling.recipe import Quantise
from shearling.sweep import Store, Walk, fingerprint, input_statistics


def plan_quantised(
    model: Any,
    tokens: Tensor,
    settings: Quantise,
    *,
    goal: Any = None,
    pattern: str | None = None,
    batch: int = 8,
    device: torch.device | str | None = None,
    state_dir: Path | None = None,
    on_event: OnEvent | None = None,
) -> tuple[Quant] | tuple[Quant, Adapters]:
    """Every linear of every block on a grid, measured on windows [num, T] where that needs it; what is 0 stays 0.

    The model is left as it is; carry the edit out with ``surgery.cut_``, and attach the branches that come with
    ``compensate``. They bring the weights near those of ``goal``, a model of the same shape (None: near the model's
    own). ``pattern`` (N:M) is what the weights must keep to. ``state_dir`` keeps finished blocks. Raises
    ShearlingError, before anything is measured, for inputs that the grid's groups do not fill and weights that are not
    of the pattern.
    """
    anatomy, grid = anatomy_of(model.config), Grid(settings.format, settings.group)
    # refuses what groups do not fill
    quantised_size(inventory_of(model), anatomy, grid)
    if pattern is not None:
        check_pattern(model, pattern)
    found: dict[str, Tensor] = {}
    if settings.method != "gptq" and settings.compensate is None:
        for layer in range(anatomy.num_layers):
            for name in anatomy.weights(layer):
                weight = as_out_in(anatomy, model.get_parameter(name))
                found |= _named(name, _compress(weight, None, grid, settings)[0])
        return _edits(found, grid)
    walk = Walk(model, tokens, batch=batch, device=device)
    store = Store(None)
    if state_dir is not None:
        store = Store(state_dir / fingerprint(model, tokens, settings.model_dump(), batch)[:16])
    states = walk.enter()
    for layer in range(len(walk.blocks)):
        start = time.perf_counter()
        own = store.tensors(f"quant-{layer:04d}")
        with walk.on_device(layer) as block:
            stand_in = copy.deepcopy(block)
            if own is None:
                own, damping = _quantise_(walk, layer, stand_in, states, grid, settings, goal or model)
                store.keep_tensors(f"quant-{layer:04d}", own)
                if damping > settings.damping and on_event is not None:
                    raised = f"block {layer}: a Gram matrix needed damping {damping:g} instead of {settings.damping:g}"
                    on_event({"stage": "quantise", "warning": raised})
            else:
                _carry_out_(walk, layer, stand_in, own)
            walk.advance(layer, states, block=stand_in)
        found |= own
        if on_event is not None:
            seconds = time.perf_counter() - start
            on_event({"stage": "quantise", "block": layer, "blocks": len(walk.blocks), "seconds": seconds})
    return _edits(found, grid)


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
def _quantise_(
    walk: Walk, layer: int, stand_in: nn.Module, states: Tensor, grid: Grid, settings: Quantise, goal: Any
) -> tuple[dict[str, Tensor], float]:
    """Round the linears of ``stand_in`` in place; returns the parts of the edits, and the greatest damping needed."""
    anatomy, found, damping = walk.anatomy, {}, 0.0
    for group in anatomy.family.readers:
        full = settings.method == "gptq"
        inputs = input_statistics(walk, layer, states, group[:1], gram=full, block=stand_in)[group[0]]
        gram = inputs.square.diag() if inputs.gram is None else inputs.gram
        gram = gram.to(walk.device, torch.float32)
        for linear in group:
            name = anatomy.path(layer, f"{linear}.weight")
            weight = as_out_in(anatomy, stand_in.get_parameter(f"{linear}.weight"))
            if settings.compensate is None:
                codes, needed = _compress(weight, gram, grid, settings)
                own = _named(name, codes)
            else:
                wanted = as_out_in(anatomy, goal.get_parameter(name)).to(weight)
                own, needed = _compensated(name, wanted, weight, gram, grid, settings)
            _carry_out_(walk, layer, stand_in, own)
            found |= own
            damping = max(damping, needed)
    return found, damping


def _compress(weight: Tensor, gram: Tensor | None, grid: Grid, settings: Quantise) -> tuple[Codes, float]:
    """Codes of a weight [out, in] by the method, and the damping that took."""
    if settings.method == "slim":
        return slim_rounded(weight, grid), 0.0
    if settings.method == "rtn":
        return rounded(weight, grid, settings.scales), 0.0
    assert gram is not None
    options = {"damping": settings.damping, "order": settings.order, "scales": settings.scales}
    return gptq(weight, gram, grid, weight != 0, **options)


def _compensated(
    name: str, goal: Tensor, weight: Tensor, gram: Tensor, grid: Grid, settings: Quantise
) -> tuple[dict[str, Tensor], float]:
    """The parts of the edits for one weight with its branch, and the damping that took."""
    dampings = []

    def compress(of: Tensor) -> Codes:
        codes, needed = _compress(of, gram, grid, settings)
        dampings.append(needed)
        return codes

    outputs, inputs = weight.shape
    codes, *factors = compensated(goal, weight, gram, settings.rank(outputs, inputs), compress)
    if settings.branches is not None:
        # a row of either factor belongs to one component of the branch, or to one output
        factors = [dequantise(*rounded(factor, Grid(settings.branches), "mse")) for factor in factors]
    beside = zip(("down", "up"), factors, strict=True)
    return _named(name, codes) | {f"{part}/{name}": f.cpu().contiguous() for part, f in beside}, max(dampings)


def _carry_out_(walk: Walk, layer: int, stand_in: nn.Module, own: Mapping[str, Tensor]) -> None:
    """Give a block's linears what the parts of the edits stand for, branches merged: what the next block reads."""
    prefix = walk.anatomy.path(layer) + "."
    for name in walk.anatomy.weights(layer):
        if f"{_PARTS[0]}/{name}" not in own:
            continue
        stored = as_out_in(walk.anatomy, stand_in.get_parameter(name.removeprefix(prefix)))
        value = dequantise(*Codes(*(own[f"{part}/{name}"].to(walk.device) for part in _PARTS)))
        if f"up/{name}" in own:
            value = value + own[f"up/{name}"].to(walk.device) @ own[f"down/{name}"].to(walk.device)
        stored.copy_(value)


_PARTS = Codes._fields


def _named(name: str, codes: Codes) -> dict[str, Tensor]:
    return {f"{part}/{name}": tensor.cpu() for part, tensor in zip(_PARTS, codes, strict=True)}


def _edits(found: Mapping[str, Tensor], grid: Grid) -> tuple[Quant] | tuple[Quant, Adapters]:
    def part(kind: str) -> dict[str, Tensor]:
        return {name.removeprefix(f"{kind}/"): t for name, t in found.items() if name.startswith(f"{kind}/")}

    quant = Quant(*map(part, _PARTS), bits=grid.bits, group=grid.group)
    down, up = ({name.removesuffix(".weight"): t for name, t in part(kind).items()} for kind in ("down", "up"))
    return (quant, Adapters(down, up, dict.fromkeys(down, 1.0))) if down else (quant,)
