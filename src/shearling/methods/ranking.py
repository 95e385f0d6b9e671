"""Cutting to an exact shape at once: what stays is ranked by one forward sweep, or drawn.

    A_u     sqrt( sum over sequences of (mean over tokens of |x_u|)^2 )     activation of a unit u
    BI_l    1 - mean over tokens of cos(x_l, x_{l+1})                       influence of block l

Minitron (arXiv 2407.14679, Sec. 2.2; means over tokens, L2 over sequences) ranks by A, on the dense model: a channel of
the residual stream by the sum over all norms that read it, x being the norm's output; an FFN channel by what the output
projection reads; a query head by the L2 norm of its part of what the attention's output projection reads, inside its KV
group, and a KV group by the sum of its heads. It drops the blocks of least BI, as ShortGPT does (arXiv 2403.03853).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.anatomy import Anatomy, anatomy_of
from shearling.events import OnEvent
from shearling.methods.scores import top
from shearling.plan import Outcome, Plan, Structure, inventory_of, leading, plan_of, resolve_target, target_anatomy
from shearling.recipe import Ranked, Shear
from shearling.sweep import Angles, Magnitudes, Store, Walk, fingerprint


@dataclass(frozen=True, eq=False)
class Scores:
    """What units are ranked by: layers [L] and the stream [hidden]; in every block its query heads and FFN channels."""

    layers: Tensor
    hidden: Tensor
    heads: Sequence[Tensor]
    ffn: Sequence[Tensor]


def plan_ranked(
    model: Any,
    tokens: Tensor,
    settings: Ranked,
    *,
    batch: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
    state_dir: Path | None = None,
    on_event: OnEvent | None = None,
    name: str = "",
) -> Outcome:
    """The cut of a model to its target shape, by calibration windows [num, T]; ``random-shape`` reads none.

    The model is left as it is. ``state_dir`` keeps finished blocks, for any target. Raises ShearlingError for a target
    that does not fit and for activations that are not finite.
    """
    anatomy, inventory = anatomy_of(model.config), inventory_of(model)
    after = target_anatomy(anatomy, resolve_target(anatomy, inventory, settings.target))
    influence: list[float] = []
    if settings.method == "random-shape":
        scores = drawn(anatomy, seed)
    else:
        widths = settings.method == "minitron"
        store = Store(None)
        if state_dir is not None:
            store = Store(state_dir / fingerprint(model, tokens, "ranked", widths, batch)[:16])
        scores = swept(Walk(model, tokens, batch=batch, device=device), widths=widths, store=store, on_event=on_event)
        influence = scores.layers.tolist()
    edits = (highest(anatomy, after, scores),)
    return Outcome(plan_of(name, settings.method, anatomy, inventory, edits, influence), edits)


def preview_target(model: Any, settings: Ranked | Shear, name: str = "") -> Plan:
    """The plan before anything is ranked, importance aside; ``model`` may be on meta."""
    anatomy, inventory = anatomy_of(model.config), inventory_of(model)
    after = target_anatomy(anatomy, resolve_target(anatomy, inventory, settings.target))
    cut = leading(anatomy, after, range(after.num_layers))
    return plan_of(name, settings.method, anatomy, inventory, [cut])


def unit_scores(model: Any, tokens: Tensor, *, batch: int = 8, on_event: OnEvent | None = None) -> dict[str, Tensor]:
    """Minitron's scores by calibration windows [num, T], shaped as the gates of a model whose blocks are alike.

    ``layers`` [L], ``hidden``, ``kv_group`` [L, G], ``query_head`` [L, G, R], ``ffn`` [L, F].
    """
    anatomy, scores = anatomy_of(model.config), swept(Walk(model, tokens, batch=batch), on_event=on_event)
    heads_LGR = torch.stack(list(scores.heads)).unflatten(1, (anatomy.shapes[0].kv_heads, -1))
    return {
        "layers": scores.layers,
        "hidden": scores.hidden,
        "kv_group": heads_LGR.sum(-1),
        "query_head": heads_LGR,
        "ffn": torch.stack(list(scores.ffn)),
    }


def highest(anatomy: Anatomy, after: Anatomy, scores: Scores) -> Structure:
    """The cut to ``after``, uniform, that keeps what scores highest; of equal ones the first."""
    shape, source = after.shapes[0], anatomy.shapes[0]
    layers = top(scores.layers, after.num_layers)
    kept: dict[str, tuple[int, ...]] = {}
    if after.num_layers < anatomy.num_layers:
        kept["layers"] = layers
    if after.hidden < anatomy.hidden:
        kept["hidden"] = top(scores.hidden, after.hidden)
    for layer in layers:
        if shape.ffn < source.ffn:
            kept[f"ffn.{layer}"] = top(scores.ffn[layer], shape.ffn)
        if shape.query_heads < source.query_heads:
            grouped = scores.heads[layer].view(source.kv_heads, -1)
            kept[f"query_head.{layer}"] = heads_of_groups(grouped, shape.kv_heads, shape.query_heads // shape.kv_heads)
    return Structure(kept)


def heads_of_groups(score_GR: Tensor, groups: int, each: int) -> tuple[int, ...]:
    """Query heads, numbered through the block, that stay: the best ``each`` of every one of the best ``groups``.

    G KV groups, R query heads of each.
    """
    ratio = score_GR.shape[1]
    chosen = top(score_GR.sum(1), groups)
    return tuple(group * ratio + head for group in chosen for head in top(score_GR[group], each))


def drawn(anatomy: Anatomy, seed: int) -> Scores:
    """Scores from a seed alone."""
    generator = torch.Generator().manual_seed(seed)

    def draw(num: int) -> Tensor:
        return torch.rand(num, generator=generator, dtype=torch.float64)

    layers, hidden = draw(anatomy.num_layers), draw(anatomy.hidden)
    heads = [draw(shape.query_heads) for shape in anatomy.shapes]
    return Scores(layers, hidden, heads, [draw(shape.ffn) for shape in anatomy.shapes])


def swept(walk: Walk, *, widths: bool = True, store: Store | None = None, on_event: OnEvent | None = None) -> Scores:
    """Scores of the dense model, float64, in one forward pass; without ``widths`` only those of layers, others empty.

    A block that ``store`` has is only run, and none after the last one that it lacks.
    """
    blocks, store = len(walk.blocks), store or Store(None)
    names = [f"block-{layer:04d}" for layer in range(blocks)]
    if widths and walk.anatomy.family.final_norm is not None:
        names.append("final-norm")
    found = [store.tensors(name) for name in names]
    missing = [place for place, tensors in enumerate(found) if tensors is None]
    if missing:
        states = walk.enter()
        for place in range(missing[-1] + 1):
            start = time.perf_counter()
            if found[place] is not None:
                with walk.on_device(place):
                    walk.advance(place, states)
                continue
            measured = _block(walk, place, states, widths) if place < blocks else _final_norm(walk, states)
            found[place] = measured
            store.keep_tensors(names[place], measured)
            if on_event is not None and place < blocks:
                seconds = time.perf_counter() - start
                on_event({"stage": "measure", "block": place, "blocks": blocks, "seconds": seconds})
    done = [tensors for tensors in found if tensors is not None]
    layers = torch.stack([tensors["influence"] for tensors in done[:blocks]])
    if not widths:
        return Scores(layers, torch.empty(0), (), ())
    hidden = torch.stack([tensors["hidden"] for tensors in done]).sum(0)
    return Scores(layers, hidden, [t["heads"] for t in done[:blocks]], [t["ffn"] for t in done[:blocks]])


def _block(walk: Walk, layer: int, states: Tensor, widths: bool) -> dict[str, Tensor]:
    """Scores of one block, which its states [num, T, hidden] pass; ``hidden`` is the sum over its own norms."""
    family, length = walk.anatomy.family, walk.tokens.shape[1]
    angles = Angles()
    # what the first linear of either half reads is what the norm before it wrote
    norms = {family.attention_inputs[0]: Magnitudes(length), family.ffn_inputs[0]: Magnitudes(length)}
    heads, ffn = Magnitudes(length, walk.anatomy.head_dim), Magnitudes(length)
    taps = {**norms, family.attention_output: heads, family.ffn_output: ffn} if widths else {}
    with walk.on_device(layer):
        walk.advance(layer, states, taps=taps, watch=angles)
    influence = {"influence": torch.tensor(angles.influence, dtype=torch.float64)}
    if not widths:
        return influence
    hidden = torch.stack([norm.result() for norm in norms.values()]).sum(0)
    return {**influence, "hidden": hidden, "heads": heads.result(), "ffn": ffn.result()}


@torch.no_grad()
def _final_norm(walk: Walk, states: Tensor) -> dict[str, Tensor]:
    """Scores of the stream by the norm before the head."""
    # the model may live elsewhere
    norm = copy.deepcopy(walk.model.get_submodule(walk.anatomy.family.final_norm)).to(walk.device)
    seen = Magnitudes(walk.tokens.shape[1])
    for rows in walk.slices():
        seen(norm(states[rows]).flatten(0, 1))
    return {"hidden": seen.result()}
