"""One-shot structured pruning: from statistics to edits, for every method of the family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shearling.anatomy import Anatomy, anatomy_of
from shearling.data import sampled_windows
from shearling.errors import ShearlingError
from shearling.methods import scores
from shearling.methods.cfsp import block_importance, keep_ratios, reference_widths
from shearling.methods.obs import eliminate, refit
from shearling.methods.projections import FFN, input_first, weight_of
from shearling.methods.shearling import plan_sequential
from shearling.plan import (
    Delta,
    Edit,
    Plan,
    Sizes,
    Structure,
    TensorSize,
    inventory_after,
    inventory_of,
    round_to_total,
    shape_after,
    sizes,
    unit_parameters,
)
from shearling.recipe import CFSP, Baseline, CFSPReference, Shearling
from shearling.sweep import BlockStatistics, InputStatistics, Walk, fingerprint, measure

OnEvent = Callable[[dict[str, Any]], None]
Settings = CFSP | CFSPReference | Shearling | Baseline

#: share of the mean diagonal added to Gram matrices where nothing else is said
DAMPING = 0.01
#: sequences, and tokens of each, on which next-token distributions are compared
PROBES, PROBE_LENGTH = 8, 512


@dataclass(frozen=True)
class Outcome:
    """A plan and the edits that make it true."""

    plan: Plan
    edits: tuple[Edit, ...]


def plan_structured(
    model: Any,
    tokens: Tensor,
    settings: Settings,
    *,
    batch: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
    state_dir: Path | None = None,
    on_event: OnEvent | None = None,
    name: str = "",
) -> Outcome:
    """Measure a model on calibration windows [num, T] and decide what goes.

    The model is left as it is; carry the edits out with ``surgery.cut_``. ``state_dir`` keeps finished blocks, so
    that a killed measurement goes on where it stopped. Raises ShearlingError for a budget that cannot be met and
    for activations that are not finite.
    """
    anatomy, inventory = anatomy_of(model.config), inventory_of(model)
    budget = channels_to_remove(anatomy, inventory, settings)
    if isinstance(settings, Shearling):
        channel, group = unit_parameters(inventory, anatomy, 0)
        state = None
        if state_dir is not None:
            state = state_dir / fingerprint(model, tokens, settings.model_dump(), batch, seed)[:16]
        importance, edits = plan_sequential(
            Walk(model, _with_samples(model, tokens, settings.sampled, seed, state), batch=batch, device=device),
            # the probes are short, so that all of them pass at once
            Walk(model, tokens[:PROBES, :PROBE_LENGTH], batch=PROBES, device=device),
            settings,
            lambda: share_out([1.0] * anatomy.num_layers, anatomy, budget, settings),
            remove=budget,
            group_cost=group / channel,
            seed=seed,
            state=state,
            on_event=on_event,
        )
    else:
        walk = Walk(model, tokens, batch=batch, device=device)
        grams = isinstance(settings, CFSP) and (settings.refit or settings.score == "obs")
        cache = None if state_dir is None else state_dir / fingerprint(model, tokens, "dense", grams, batch)[:16]
        found = measure(walk, ffn_gram=grams, cache=cache, on_event=on_event)
        importance, edits = decide(walk, found, settings, budget, seed)
    return Outcome(_plan(name, settings.method, anatomy, inventory, edits, importance), tuple(edits))


def _with_samples(model: Any, tokens: Tensor, num: int, seed: int, state: Path | None) -> Tensor:
    """Calibration windows and ``num`` that the model writes; kept, since another process might draw others."""
    if num == 0:
        return tokens
    file = None if state is None else state / "sampled.safetensors"
    if file is not None and file.exists():
        return load_file(file)["tokens"].to(tokens.device)
    # documents lie end to end in windows, so what ends one starts the next
    end = model.config.eos_token_id
    end = end[0] if isinstance(end, list) else int(tokens[0, 0]) if end is None else end
    written = sampled_windows(model, tokens, num, tokens.shape[1], start_token=end, seed=seed)
    both = torch.cat([tokens, written.to(tokens.device)])
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        save_file({"tokens": both.cpu()}, unfinished)
        unfinished.replace(file)
    return both


def preview(model: Any, settings: Settings, name: str = "") -> Plan:
    """The plan's totals before anything is measured: every block at the mean width. ``model`` may be on meta."""
    anatomy, inventory = anatomy_of(model.config), inventory_of(model)
    budget = channels_to_remove(anatomy, inventory, settings)
    widths = share_out([1.0] * anatomy.num_layers, anatomy, budget, settings)
    kept = {f"ffn.{layer}": tuple(range(width)) for layer, width in enumerate(widths)}
    return _plan(name, settings.method, anatomy, inventory, [Structure(kept)], ())


def restore_plan(model: Any, edits: Sequence[Edit], name: str, method: str, importance: Sequence[float]) -> Plan:
    """The plan of edits that were stored, for the model they were made for."""
    return _plan(name, method, anatomy_of(model.config), inventory_of(model), edits, importance)


def channels_to_remove(anatomy: Anatomy, inventory: Any, settings: Settings) -> int:
    """The budget in FFN channels over all blocks; ShearlingError where the FFN layers cannot pay for it."""
    total = sum(shape.ffn for shape in anatomy.shapes)
    channel, _ = unit_parameters(inventory, anatomy, 0)
    before: Sizes = sizes(inventory, anatomy)
    # one channel weighs the same share of the bytes as of the parameters, since a model has one dtype
    unit = 1 / total if settings.of == "ffn" else channel / before.parameters
    remove = round(settings.sparsity / unit)
    if remove > total - anatomy.num_layers:
        raise ShearlingError(
            f"prune.sparsity = {settings.sparsity:g} of {settings.of}: {max(0, total - remove)} of {total} channels "
            f"would stay, fewer than one a block; choose at most {(total - anatomy.num_layers) * unit:.4f}"
        )
    return remove


def share_out(importance: Sequence[float], anatomy: Anatomy, remove: int, settings: Settings) -> list[int]:
    """Widths of all blocks: importance scaled to the mean kept share, whole channels, the total met exactly."""
    full = [shape.ffn for shape in anatomy.shapes]
    total = sum(full) - remove
    if settings.uniform:
        width = round(total / len(full) / settings.round_to) * settings.round_to
        if width < 1:
            raise ShearlingError(f"sparsity={settings.sparsity:g}: no width would be left; choose less")
        return [min(width, size) for size in full]
    keep = keep_ratios(importance, remove / sum(full))
    ideal = [k * size for k, size in zip(keep, full, strict=True)]
    low = [settings.round_to] * len(full)
    return round_to_total(ideal, total, multiple=settings.round_to, low=low, high=full)


def decide(
    walk: Walk, found: Sequence[BlockStatistics], settings: CFSP | CFSPReference | Baseline, remove: int, seed: int
) -> tuple[list[float], list[Edit]]:
    """Block importance and edits of the methods that score dense statistics."""
    anatomy = walk.anatomy
    angles = [block.angle for block in found]
    importance = [1.0] * len(found)
    if isinstance(settings, CFSP) and settings.allocation == "sigmoid":
        importance = block_importance(angles, settings.temperature)
    elif isinstance(settings, CFSPReference):
        importance = block_importance(angles)
    all_scores = [_score(walk, layer, block, settings, seed) for layer, block in enumerate(found)]
    if isinstance(settings, CFSPReference):
        # as released: the share itself, not the whole number of channels that it makes of all
        share = settings.sparsity if settings.of == "ffn" else remove / sum(shape.ffn for shape in anatomy.shapes)
        widths = reference_widths(keep_ratios(importance, share), anatomy.shapes[0].ffn, _reference_multiple(settings))
    elif settings.method == "flap" and not settings.uniform:
        widths = _global_widths(all_scores, remove)
    else:
        widths = share_out(importance, anatomy, remove, settings)
    kept = {f"ffn.{layer}": scores.top(all_scores[layer], width) for layer, width in enumerate(widths)}
    values: dict[str, Tensor] = {}
    linear = anatomy.family.ffn_output
    for layer, block in enumerate(found):
        columns = torch.tensor(kept[f"ffn.{layer}"], device=walk.device)
        if isinstance(settings, CFSP) and settings.refit:
            down, gram = down_weight(walk, layer), block.ffn.gram
            assert gram is not None
            gram = gram.to(walk.device).double()
            new = refit(gram, down.double() @ gram, down, columns, DAMPING).to(down.dtype).cpu()
            values[anatomy.path(layer, f"{linear}.weight")] = new.T.contiguous() if input_first(anatomy) else new
        elif settings.method == "flap":
            down = down_weight(walk, layer)
            gone = torch.ones(down.shape[1], dtype=torch.bool, device=walk.device)
            gone[columns] = False
            bias = walk.blocks[layer].get_submodule(linear)._parameters.get("bias")
            shift = down[:, gone].double() @ block.ffn.mean.to(walk.device)[gone]
            total = shift if bias is None else shift + bias.detach().double().to(walk.device)
            values[anatomy.path(layer, f"{linear}.bias")] = total.to(down.dtype).cpu()
    edits: list[Edit] = [Structure(kept)]
    if values:
        edits.append(Delta(values))
    return importance, edits


def down_weight(walk: Walk, layer: int) -> Tensor:
    """The weight that writes a block's FFN layer back to the residual stream, [hidden, channels], on the device."""
    return weight_of(walk.blocks[layer], walk.anatomy, FFN).to(walk.device)


def _score(walk: Walk, layer: int, block: BlockStatistics, settings: Settings, seed: int) -> Tensor:
    """Score of each channel of a block, on the CPU."""
    anatomy = walk.anatomy
    kind = settings.score if isinstance(settings, CFSP) else settings.method
    # Gram matrices are large, and only one score reads them
    inputs = (block.ffn if kind == "obs" else replace(block.ffn, gram=None)).to(walk.device)
    match kind:
        case "act" | "cfsp-reference":
            score = scores.activation(inputs)
        case "wanda" | "wanda-sp":
            score = scores.wanda(down_weight(walk, layer), inputs)
        case "flap":
            score = scores.flap(down_weight(walk, layer), inputs)
        case "magnitude":
            score = scores.magnitude(down_weight(walk, layer))
        case "random":
            score = scores.random(anatomy.shapes[layer].ffn, layer, seed)
        case "obs":
            score = _elimination_rank(down_weight(walk, layer), inputs)
        case _:
            gates = [_gate_weight(walk, layer, name) for name in anatomy.family.ffn_inputs]
            channels = anatomy.shapes[layer].ffn
            score = scores.eq8(down_weight(walk, layer), inputs, [g for gate in gates for g in gate.split(channels)])
            score = score * inputs.norm if kind == "eq8xn" else score
    return score.cpu()


def _elimination_rank(down: Tensor, inputs: InputStatistics) -> Tensor:
    """When each channel would go if all but one went, one after the other, the least useful first."""
    gram, width = inputs.gram, down.shape[1]
    assert gram is not None
    batch = max(1, width // 256)
    found = eliminate(gram, down.double() @ gram.double(), down, remove=width - 1, damping=DAMPING, batch=batch)
    score = torch.full((width,), float(width), dtype=torch.float64)
    score[found.order] = torch.arange(width - 1, dtype=torch.float64)
    return score


def _gate_weight(walk: Walk, layer: int, name: str) -> Tensor:
    weight = walk.blocks[layer].get_parameter(f"{name}.weight").detach().to(walk.device)
    return weight.T if input_first(walk.anatomy) else weight


def _reference_multiple(settings: CFSPReference) -> int | None:
    return None if settings.round_to == 1 else settings.round_to


def _global_widths(all_scores: Sequence[Tensor], remove: int) -> list[int]:
    """FLAP's widths: scores standardised within each block, the lowest of all go; no block goes whole."""
    standard = [(score - score.mean()) / score.std() for score in all_scores]
    for score in standard:
        score[score.argmax()] = torch.inf
    lowest = torch.cat(standard).sort(stable=True).indices[:remove]
    gone = torch.zeros(sum(map(len, standard)), dtype=torch.bool)
    gone[lowest] = True
    return [int((~part).sum()) for part in gone.split([len(score) for score in standard])]


def _plan(
    name: str, method: str, before: Anatomy, inventory: Any, edits: Sequence[Edit], importance: Sequence[float]
) -> Plan:
    after, added = before, {}
    for edit in edits:
        if isinstance(edit, Structure):
            after = shape_after(before, edit)
        elif isinstance(edit, Delta):
            # biases that the model had not (FLAP)
            new = {n: value for n, value in edit.values.items() if n not in inventory and n.endswith(".bias")}
            added |= {n: TensorSize(tuple(value.shape), value.element_size()) for n, value in new.items()}
            inner = {n.removeprefix(before.path(before.layer_of(n) or 0) + ".").removesuffix(".bias") for n in new}
            after = replace(after, biases=tuple(sorted({*after.biases, *inner})))
    return Plan(
        model=name,
        method=method,
        before=sizes(inventory, before),
        after=sizes(inventory_after(inventory, before, after) | added, after),
        anatomy_before=before,
        anatomy_after=after,
        layers=tuple(range(before.num_layers)),
        importance=tuple(importance),
    )
