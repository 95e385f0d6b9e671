"""What a model weighs and costs, from the shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from torch import nn

from shearling.anatomy import Anatomy, Layout, is_branch
from shearling.errors import ShearlingError
from shearling.plan.grids import Grid


class TensorSize(NamedTuple):
    """Shape of a stored tensor and the bytes of one element."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


Inventory = Mapping[str, TensorSize]


@dataclass(frozen=True)
class Sizes:
    """Parameters, their bytes, and the running cost of one token (batch 1, empty cache for the FLOPs)."""

    parameters: int
    bytes: int
    ffn_parameters: int
    kv_bytes_per_token: int
    flops_per_token: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def inventory_of(model: nn.Module) -> dict[str, TensorSize]:
    """Stored tensors of a model by name; a tied tensor counts once, under its first name."""
    return {name: TensorSize(tuple(p.shape), p.element_size()) for name, p in model.named_parameters()}


def reshape_axis(layout: Layout, axis: int, anatomy: Anatomy, layer: int | None, size: int) -> int:
    """Length of an axis in an anatomy; ``size`` is what a fixed axis has."""
    parts = layout[axis]
    return size if parts == ("fixed",) else sum(anatomy.size(part, layer) for part in parts)


def inventory_after(
    inventory: Inventory, before: Anatomy, after: Anatomy, layers: Sequence[int] | None = None
) -> dict[str, TensorSize]:
    """The inventory that the same tensors have in another anatomy; ``layers`` are the old indices that stay."""
    renumber = {old: new for new, old in enumerate(range(before.num_layers) if layers is None else layers)}
    if after == before:
        # branches too, which no cut knows
        return dict(inventory)
    result = {}
    for name, (shape, itemsize) in inventory.items():
        old = before.layer_of(name)
        if old is not None and old not in renumber:
            continue
        new = None if old is None else renumber[old]
        layout = before.layout(name)
        sizes = tuple(reshape_axis(layout, axis, after, new, size) for axis, size in enumerate(shape))
        if old is not None:
            assert new is not None
            name = before.path(new, name.removeprefix(before.path(old) + "."))
        result[name] = TensorSize(sizes, itemsize)
    return result


def sizes(inventory: Inventory, anatomy: Anatomy) -> Sizes:
    """Totals of an inventory, branches beside linears included.

    FLOPs count two per multiply-add of every matrix product, the output head included.
    """
    parameters = bytes_ = ffn = matmul = 0
    itemsize = 0
    for name, tensor in inventory.items():
        parameters += tensor.numel
        bytes_ += tensor.numel * tensor.itemsize
        if not is_branch(name):
            itemsize = max(itemsize, tensor.itemsize)
            ffn += tensor.numel if any("ffn" in axis for axis in anatomy.layout(name)) else 0
        if anatomy.layer_of(name) is not None and len(tensor.shape) == 2:
            matmul += tensor.numel
    kv = sum(2 * shape.kv_heads * anatomy.head_dim * itemsize for shape in anatomy.shapes)
    return Sizes(parameters, bytes_, ffn, kv, 2 * (matmul + anatomy.vocab * anatomy.hidden))


@dataclass(frozen=True)
class Quantised:
    """What a grid makes of the weights it covers: ``bits`` of one with its share of scales and zero points, ``bytes``.

    ``bytes`` are those of the whole model, with what is not covered as it is.
    """

    format: str
    group: int | None
    bits: float
    bytes: int


def quantised_size(inventory: Inventory, anatomy: Anatomy, grid: Grid) -> Quantised:
    """The size of a model whose blocks' linears are on a grid; scales have the type of the weights.

    Raises ShearlingError, naming the weight, where the grid's groups do not fill its inputs.
    """
    names = {name for layer in range(anatomy.num_layers) for name in anatomy.weights(layer)}
    covered = bits = rest = 0
    for name, tensor in inventory.items():
        if name not in names:
            rest += tensor.numel * tensor.itemsize
            continue
        inputs = tensor.shape[0 if anatomy.family.input_first else 1]
        try:
            grid.check(inputs)
        except ShearlingError as error:
            raise ShearlingError(f"{name}: {error}") from error
        groups = tensor.numel // (grid.group or inputs)
        covered += tensor.numel
        bits += tensor.numel * grid.bits + groups * (8 * tensor.itemsize + (grid.bits if grid.has_zeros else 0))
    return Quantised(grid.format, grid.group, bits / covered, rest + math.ceil(bits / 8))


def unit_parameters(inventory: Inventory, anatomy: Anatomy, layer: int) -> tuple[int, int]:
    """Parameters of one FFN channel and of one KV group (its query heads included) of a block."""
    channel = group = 0
    shape = anatomy.shapes[layer]
    for name, tensor in inventory.items():
        if anatomy.layer_of(name) != layer:
            continue
        for axis, parts in enumerate(anatomy.layout(name)):
            others = tensor.numel // tensor.shape[axis]
            channel += others * parts.count("ffn")
            group += others * parts.count("kv") * anatomy.head_dim
            group += others * parts.count("query") * anatomy.head_dim * (shape.query_heads // shape.kv_heads)
    return channel, group
