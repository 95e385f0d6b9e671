"""What a Structure does to an anatomy: the anatomy after it, and the elements that stay along an axis."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from shearling.anatomy import Anatomy, BlockShape
from shearling.errors import ShearlingError
from shearling.plan.edits import Structure


def kept_layers(anatomy: Anatomy, structure: Structure) -> tuple[int, ...]:
    """Old indices of the layers that stay, in order."""
    return tuple(structure.kept.get("layers", range(anatomy.num_layers)))


def shape_after(anatomy: Anatomy, structure: Structure) -> Anatomy:
    """The anatomy after a structural cut; ShearlingError when an index is out of range or nothing would be left."""
    check_structure(anatomy, structure)
    shapes = tuple(_block_after(anatomy, structure, layer) for layer in kept_layers(anatomy, structure))
    return replace(anatomy, shapes=shapes, hidden=len(structure.kept.get("hidden", range(anatomy.hidden))))


def kept_elements(anatomy: Anatomy, structure: Structure, space: str, layer: int | None) -> list[int] | None:
    """Elements of ``space`` that stay along an axis, or None where all do. ``layer`` counts before the cut."""
    if space in ("ffn", "hidden"):
        indices = structure.kept.get(space if space == "hidden" else f"ffn.{layer}")
        return None if indices is None else list(indices)
    if space in ("query", "kv"):
        assert layer is not None
        groups, heads = _kept_heads(anatomy, structure, layer)
        chosen = heads if space == "query" else groups
        width = anatomy.head_dim
        if len(chosen) * width == anatomy.size(space, layer):
            return None
        return [head * width + offset for head in chosen for offset in range(width)]
    return None


def check_structure(anatomy: Anatomy, structure: Structure) -> None:
    """Raise ShearlingError unless every named space exists and keeps at least one valid, increasing index."""
    for space, indices in structure.kept.items():
        size = _units(anatomy, space)
        if not indices:
            raise ShearlingError(f"{space}: nothing would be left of {size}; keep at least one")
        if any(b <= a for a, b in itertools.pairwise(indices)) or indices[0] < 0 or indices[-1] >= size:
            raise ShearlingError(f"{space}: indices must increase within 0..{size - 1}")
    for layer in range(anatomy.num_layers):
        groups, heads = _kept_heads(anatomy, structure, layer)
        ratio = anatomy.shapes[layer].query_heads // anatomy.shapes[layer].kv_heads
        counts = [sum(head // ratio == group for head in heads) for group in groups]
        if len(set(counts)) > 1 or sum(counts) != len(heads) or not counts[0]:
            raise ShearlingError(
                f"query_head.{layer}: every kept KV group must keep equally many query heads, got {counts}"
            )


def _units(anatomy: Anatomy, space: str) -> int:
    name, _, layer = space.partition(".")
    if name == "layers":
        return anatomy.num_layers
    if space == "hidden":
        return anatomy.hidden
    if name in ("ffn", "kv_group", "query_head") and layer.isdigit() and int(layer) < anatomy.num_layers:
        shape = anatomy.shapes[int(layer)]
        return {"ffn": shape.ffn, "kv_group": shape.kv_heads, "query_head": shape.query_heads}[name]
    raise ShearlingError(
        f"structure: no space {space!r} to cut; valid are layers, hidden, ffn.<layer>, kv_group.<layer>, "
        f"query_head.<layer> with layers 0..{anatomy.num_layers - 1}"
    )


def _kept_heads(anatomy: Anatomy, structure: Structure, layer: int) -> tuple[Sequence[int], Sequence[int]]:
    """Kept KV groups and kept query heads of a block; either one, where not named, follows from the other."""
    shape = anatomy.shapes[layer]
    ratio = shape.query_heads // shape.kv_heads
    heads = structure.kept.get(f"query_head.{layer}")
    groups = structure.kept.get(f"kv_group.{layer}")
    if groups is None:
        groups = range(shape.kv_heads) if heads is None else sorted({head // ratio for head in heads})
    if heads is None:
        heads = [group * ratio + head for group in groups for head in range(ratio)]
    return groups, heads


def _block_after(anatomy: Anatomy, structure: Structure, layer: int) -> BlockShape:
    groups, heads = _kept_heads(anatomy, structure, layer)
    channels = structure.kept.get(f"ffn.{layer}")
    ffn = anatomy.shapes[layer].ffn if channels is None else len(channels)
    return BlockShape(ffn=ffn, query_heads=len(heads), kv_heads=len(groups))
