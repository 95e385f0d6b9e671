"""The methods that score statistics of the dense model: CFSP, its released form, and the baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shearling.methods import scores
from shearling.methods.budgets import Settings, share_out
from shearling.methods.cfsp import block_importance, keep_ratios, reference_widths
from shearling.methods.heads import energies, groups_to_remove
from shearling.methods.obs import eliminate, refit
from shearling.methods.projections import ATTENTION, FFN, as_out_in, projection, unit_columns, units, weight_of
from shearling.plan import Delta, Edit, Structure, inventory_of, round_to_total, unit_parameters
from shearling.recipe import CFSP, Baseline, CFSPReference
from shearling.sweep import BlockStatistics, InputStatistics, Walk

#: share of the mean diagonal added to Gram matrices
DAMPING = 0.01


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
    groups: dict[int, tuple[int, ...]] = {}
    if isinstance(settings, CFSPReference):
        # as released: the share itself, not the whole number of channels that it makes of all
        share = settings.sparsity if settings.of == "ffn" else remove / sum(shape.ffn for shape in anatomy.shapes)
        widths = reference_widths(keep_ratios(importance, share), anatomy.shapes[0].ffn, _reference_multiple(settings))
    elif settings.method == "flap" and not settings.uniform:
        widths = _global_widths(all_scores, remove)
    elif isinstance(settings, CFSP) and settings.heads:
        widths, groups = _widths_and_groups(walk, found, importance, remove, settings)
    else:
        widths = share_out(importance, anatomy, remove, settings)
    kept = {f"{FFN}.{layer}": scores.top(all_scores[layer], width) for layer, width in enumerate(widths)}
    kept |= {f"{ATTENTION}.{layer}": chosen for layer, chosen in groups.items()}
    values: dict[str, Tensor] = {}
    for layer, block in enumerate(found):
        if isinstance(settings, CFSP) and settings.refit:
            for part, inputs in ((FFN, block.ffn), (ATTENTION, block.attention)):
                if f"{part}.{layer}" in kept:
                    name = anatomy.path(layer, f"{projection(anatomy, part)}.weight")
                    values[name] = _refitted(walk, layer, part, inputs, kept[f"{part}.{layer}"])
        elif settings.method == "flap":
            name = anatomy.path(layer, f"{anatomy.family.ffn_output}.bias")
            values[name] = _compensation(walk, layer, block.ffn, kept[f"{FFN}.{layer}"])
    edits: list[Edit] = [Structure(kept)]
    if values:
        edits.append(Delta(values))
    return importance, edits


def _refitted(walk: Walk, layer: int, part: str, inputs: InputStatistics, chosen: Sequence[int]) -> Tensor:
    """An output projection refit to what it wrote, on the units that stay; stored orientation, on the CPU."""
    anatomy, weight = walk.anatomy, output_weight(walk, layer, part)
    assert inputs.gram is not None
    gram = inputs.gram.to(walk.device).double()
    _, width = units(anatomy, layer, part)
    columns = unit_columns(torch.tensor(chosen), width).to(walk.device)
    new = refit(gram, weight.double() @ gram, weight, columns, DAMPING).to(weight.dtype).cpu()
    return as_out_in(anatomy, new).contiguous()


def _compensation(walk: Walk, layer: int, inputs: InputStatistics, chosen: Sequence[int]) -> Tensor:
    """FLAP's bias: what the channels that go wrote on average, added to the bias there is; on the CPU."""
    down = output_weight(walk, layer, FFN)
    gone = torch.ones(down.shape[1], dtype=torch.bool, device=walk.device)
    gone[list(chosen)] = False
    bias = walk.blocks[layer].get_submodule(walk.anatomy.family.ffn_output)._parameters.get("bias")
    shift = down[:, gone].double() @ inputs.mean.to(walk.device)[gone]
    total = shift if bias is None else shift + bias.detach().double().to(walk.device)
    return total.to(down.dtype).cpu()


def _energies(walk: Walk, layer: int, block: BlockStatistics, part: str) -> Tensor:
    inputs = replace(block.ffn if part == FFN else block.attention, gram=None).to(walk.device)
    return energies(output_weight(walk, layer, part), inputs, units(walk.anatomy, layer, part)[1]).cpu()


def _widths_and_groups(
    walk: Walk, found: Sequence[BlockStatistics], importance: Sequence[float], remove: int, settings: CFSP
) -> tuple[list[int], dict[int, tuple[int, ...]]]:
    """Channels that each block keeps when ``remove`` channels' worth of parameters goes; KV groups where some go."""
    anatomy = walk.anatomy
    channel, group = unit_parameters(inventory_of(walk.model), anatomy, 0)
    cost = group / channel
    full = [shape.ffn + shape.kv_heads * cost for shape in anatomy.shapes]
    gives = [(1 - keep) * size for keep, size in zip(keep_ratios(importance, remove / sum(full)), full, strict=True)]
    taken, kept = [], {}
    for layer, block in enumerate(found):
        channels, groups = (_energies(walk, layer, block, part) for part in (FFN, ATTENTION))
        number = groups_to_remove(channels, groups, gives[layer], cost)
        taken.append(number)
        if number:
            kept[layer] = scores.top(groups, len(groups) - number)
    ffn = [shape.ffn for shape in anatomy.shapes]
    ideal = [size - give + number * cost for size, give, number in zip(ffn, gives, taken, strict=True)]
    total = sum(ffn) - remove + round(sum(taken) * cost)
    multiple = settings.round_to
    widths = round_to_total(ideal, total, multiple=multiple, low=[multiple] * len(ffn), high=ffn)
    return widths, kept


def output_weight(walk: Walk, layer: int, part: str) -> Tensor:
    """The weight that writes a part of a block back to the residual stream, [hidden, inputs], on the walk's device."""
    return weight_of(walk.blocks[layer], walk.anatomy, part).to(walk.device)


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
            score = scores.wanda(output_weight(walk, layer, FFN), inputs)
        case "flap":
            score = scores.flap(output_weight(walk, layer, FFN), inputs)
        case "magnitude":
            score = scores.magnitude(output_weight(walk, layer, FFN))
        case "random":
            score = scores.random(anatomy.shapes[layer].ffn, layer, seed)
        case "obs":
            score = _elimination_rank(output_weight(walk, layer, FFN), inputs)
        case _:
            stored = [walk.blocks[layer].get_parameter(f"{name}.weight") for name in anatomy.family.ffn_inputs]
            # fused matrices hold several, one after the other
            gates = [g for w in stored for g in as_out_in(anatomy, w).to(walk.device).split(anatomy.shapes[layer].ffn)]
            score = scores.eq8(output_weight(walk, layer, FFN), inputs, gates)
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
