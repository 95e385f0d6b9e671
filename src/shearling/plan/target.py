"""A target shape against a model: whether it can be cut to it, and the anatomy that it then has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shearling.anatomy import Anatomy, BlockShape, expressible
from shearling.errors import ShearlingError
from shearling.plan.edits import Structure
from shearling.recipe import Target


def target_anatomy(anatomy: Anatomy, target: Target) -> Anatomy:
    """The anatomy that a model has when it is cut to a target.

    Raises ShearlingError for a model that its stock class cannot hold, a size above the model's, query heads that are
    not equally many to every KV head or more than before, and a hidden size that the family's config cannot state.
    """
    if not anatomy.uniform or anatomy.biases:
        # biases of its own too need a class that no engine has
        raise ShearlingError("target: the model has widths per block or added biases; it needs a stock one")
    source = anatomy.shapes[0]
    ratio = source.query_heads // source.kv_heads
    follows = target.heads if ratio == 1 else None
    kv_heads = target.kv_heads or follows or source.kv_heads
    heads = target.heads or kv_heads * ratio
    layers, hidden = target.layers or anatomy.num_layers, target.hidden or anatomy.hidden
    ffn = target.ffn or source.ffn
    for size, wanted, present in (
        ("layers", layers, anatomy.num_layers),
        ("hidden", hidden, anatomy.hidden),
        ("ffn", ffn, source.ffn),
        ("kv_heads", kv_heads, source.kv_heads),
        ("heads", heads, source.query_heads),
    ):
        if wanted > present:
            raise ShearlingError(f"target.{size} = {wanted}: the model has {present}; choose at most that")
    if heads % kv_heads:
        raise ShearlingError(f"target.heads = {heads}: must be a multiple of kv_heads, which are {kv_heads}")
    if heads // kv_heads > ratio:
        raise ShearlingError(
            f"target.heads = {heads}: {heads // kv_heads} to each of {kv_heads} KV heads, and the model has {ratio}; "
            f"choose at most {kv_heads * ratio}"
        )
    shapes = (BlockShape(ffn=ffn, query_heads=heads, kv_heads=kv_heads),) * layers
    after = replace(anatomy, hidden=hidden, shapes=shapes)
    if not expressible(after):
        near = [size for size in range(1, anatomy.hidden + 1) if expressible(replace(after, hidden=size))]
        nearest = min(near, key=lambda size: abs(size - hidden))
        raise ShearlingError(
            f"target.hidden = {hidden}: the config of {anatomy.family.model_type} cannot state it with {heads} query "
            f"heads of {anatomy.head_dim}; choose {nearest}, or other heads"
        )
    return after


def leading(before: Anatomy, after: Anatomy, layers: Sequence[int]) -> Structure:
    """The cut of ``before`` to ``after`` that keeps the first units of every space, where only shapes matter.

    ``layers`` are the old indices of the blocks of ``after``.
    """
    kept: dict[str, tuple[int, ...]] = {}
    if len(layers) < before.num_layers:
        kept["layers"] = tuple(layers)
    if after.hidden < before.hidden:
        kept["hidden"] = tuple(range(after.hidden))
    for old, shape in zip(layers, after.shapes, strict=True):
        source = before.shapes[old]
        if shape.ffn < source.ffn:
            kept[f"ffn.{old}"] = tuple(range(shape.ffn))
        if shape.query_heads < source.query_heads:
            ratio, each = source.query_heads // source.kv_heads, shape.query_heads // shape.kv_heads
            chosen = (group * ratio + head for group in range(shape.kv_heads) for head in range(each))
            kept[f"query_head.{old}"] = tuple(chosen)
    return Structure(kept)
