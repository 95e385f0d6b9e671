"""The two projections of a block that write to the residual stream: their statistics, and cutting them with a refit."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shearling.anatomy import Anatomy
from shearling.methods.obs import refit
from shearling.plan import Structure
from shearling.surgery import cut_block_
from shearling.sweep import Walk, add_product_
from shearling.sweep.walk import tapped

FFN, ATTENTION = "ffn", "kv_group"
#: a block's units leave in about so many batches
BATCHES = 96


class Products(NamedTuple):
    """``gram`` [I, I] = C^T C and ``cross`` [D, I] = T^T C, float32."""

    gram: Tensor
    cross: Tensor


def projection(anatomy: Anatomy, part: str) -> str:
    """Inner name of the linear that writes a part back to the residual stream."""
    return anatomy.family.ffn_output if part == FFN else anatomy.family.attention_output


def units(anatomy: Anatomy, layer: int, part: str) -> tuple[int, int]:
    """How many units a part of a block has, and how many consecutive inputs of its projection one of them is."""
    shape = anatomy.shapes[layer]
    if part == FFN:
        return shape.ffn, 1
    return shape.kv_heads, shape.query_heads // shape.kv_heads * anatomy.head_dim


def unit_columns(chosen: Tensor, width: int) -> Tensor:
    """Inputs of the chosen units of ``width`` consecutive ones."""
    return (chosen[:, None] * width + torch.arange(width)).flatten()


def weight_of(block: nn.Module, anatomy: Anatomy, part: str) -> Tensor:
    """The projection's weight as [out, in]."""
    return as_out_in(anatomy, block.get_parameter(f"{projection(anatomy, part)}.weight"))


def as_out_in(anatomy: Anatomy, stored: Tensor) -> Tensor:
    """Between a linear's stored orientation and [out, in], as a detached view; its own inverse."""
    input_first = anatomy.layout(anatomy.path(0, f"{anatomy.family.ffn_output}.weight"))[0] == ("ffn",)
    return stored.detach().T if input_first else stored.detach()


@torch.no_grad()
def dense_pass(walk: Walk, layer: int, states: Tensor, block: nn.Module) -> tuple[Tensor, Tensor]:
    """A block's outputs, and the residual stream between its two halves, both [num, T, hidden]."""
    out, middle = torch.empty_like(states), torch.empty_like(states)
    for rows in walk.slices():
        y, _, wrote = _run(walk, layer, states[rows], block, FFN)
        out[rows] = y
        middle[rows] = y - wrote.view_as(y)
    return out, middle


@torch.no_grad()
def collect(
    walk: Walk,
    layer: int,
    block: nn.Module,
    part: str,
    states: Tensor,
    target: Tensor,
    middle: Tensor,
    *,
    correction: float,
) -> Products:
    """Products of a part's projection as ``block`` runs on ``states``.

    T is what the projection writes now, plus ``correction`` times what the residual stream then lacks of the dense
    one (``middle`` after attention, ``target`` after the feed-forward layer). Where outputs are normalised before they
    are added, what lacks cannot be written and T is what it writes now.
    """
    anatomy = walk.anatomy
    gram = cross = None
    for rows in walk.slices():
        x = states[rows]
        y, c, wrote = _run(walk, layer, x, block, part)
        t = wrote
        if correction and not anatomy.family.output_norms:
            lacks = target[rows] - y if part == FFN else middle[rows] - x - wrote.view_as(x)
            t = wrote + correction * lacks.flatten(0, -2)
        bias = block.get_submodule(projection(anatomy, part))._parameters.get("bias")
        if bias is not None:
            t = t - bias
        if gram is None or cross is None:
            gram = torch.zeros(c.shape[1], c.shape[1], device=c.device)
            cross = torch.zeros(t.shape[1], c.shape[1], device=c.device)
        add_product_(gram, c, c)
        add_product_(cross, t, c)
    assert gram is not None and cross is not None
    return Products(gram, cross)


@torch.no_grad()
def cut_projection_(
    block: nn.Module, layer: int, anatomy: Anatomy, part: str, kept: Tensor, products: Products, damping: float
) -> Structure:
    """Cut a part of a block to the ``kept`` units and refit its projection; ``anatomy`` is the one before this cut."""
    total, width = units(anatomy, layer, part)
    weight = weight_of(block, anatomy, part)
    columns = unit_columns(kept, width).to(products.gram.device)
    new = refit(products.gram, products.cross, weight, columns, damping)
    structure = Structure({f"{part}.{layer}": tuple(kept.tolist())} if len(kept) < total else {})
    cut_block_(block, layer, anatomy, structure)
    weight_of(block, anatomy, part).copy_(new)
    return structure


def _run(walk: Walk, layer: int, x: Tensor, block: nn.Module, part: str) -> tuple[Tensor, Tensor, Tensor]:
    """A block's output, and the input and output, [N, width], of one of its projections."""
    seen: list[Tensor] = []
    name = projection(walk.anatomy, part)
    with tapped(block, {name: seen.append}):
        y = walk.run(layer, x, block)
    linear: Any = block.get_submodule(name)
    return y, seen[0], linear(seen[0])
