"""Which shapes a family's stock config can state, and how a config states a shape."""

from __future__ import annotations

from typing import Any

from shearling.anatomy.spec import Anatomy

#: model_type of a checkpoint with per-layer widths is this prefix and the stock model_type
PER_LAYER_PREFIX = "shearling_"


def expressible(anatomy: Anatomy) -> bool:
    """Whether the stock config and class can hold this anatomy, so that any engine loads it."""
    return obstacle(anatomy) is None


def obstacle(anatomy: Anatomy) -> str | None:
    """Why the stock config cannot state this anatomy, and which sizes it could, in one line; None where it can."""
    if not anatomy.uniform:
        return "per-layer widths; plan with uniform: true"
    if anatomy.biases:
        return f"biases of {', '.join(anatomy.biases)}, which the stock class has not"
    family, hidden, width = anatomy.family, anatomy.hidden, anatomy.head_dim
    heads, kv_heads = anatomy.shapes[0].query_heads, anatomy.shapes[0].kv_heads
    if "heads" in family.stock and "head_dim" in family.stock:
        if family.heads_divide_hidden and hidden % heads:
            return f"hidden={hidden} with {heads} query heads; {family.model_type} takes multiples of {heads}"
        return None
    # without a head_dim field the stock class computes it as hidden / heads
    if heads * width != hidden:
        fitting = f", or {hidden // width} query heads" if hidden % width == 0 else ""
        return (
            f"hidden={hidden} with {heads} query heads of {width}; {family.model_type} takes hidden={heads * width}"
            + fitting
        )
    if "kv_heads" not in family.config and kv_heads != heads:
        return f"{kv_heads} KV heads with {heads} query heads; {family.model_type} takes equally many"
    return None


def config_updates(anatomy: Anatomy) -> dict[str, Any]:
    """Config fields that state this anatomy; with a ``shearling`` entry where the stock config cannot."""
    family, fields = anatomy.family, anatomy.family.config
    first = anatomy.shapes[0]
    values: dict[str, int | None] = {
        "layers": anatomy.num_layers,
        "hidden": anatomy.hidden,
        "ffn": first.ffn,
        "query_heads": first.query_heads,
        "kv_heads": first.kv_heads,
        "head_dim": anatomy.head_dim,
    }
    stock = expressible(anatomy)
    if not stock:
        # the stock constructor runs before the widths are set, so its own consistency checks must pass
        demanding = family.heads_divide_hidden or "head_dim" not in fields
        values["query_heads"] = _dividing_heads(anatomy) if demanding else None
        values["kv_heads"] = None
        values["head_dim"] = anatomy.head_dim if "head_dim" in fields else None
    updates: dict[str, Any] = {
        fields[size]: value for size, value in values.items() if size in fields and value is not None
    }
    updates |= {name: values[size] for name, size in family.config_copies.items()}
    if not stock:
        updates["shearling"] = {
            "ffn": [shape.ffn for shape in anatomy.shapes],
            "query_heads": [shape.query_heads for shape in anatomy.shapes],
            "kv_heads": [shape.kv_heads for shape in anatomy.shapes],
            "head_dim": anatomy.head_dim,
            "biases": list(anatomy.biases),
        }
    return updates


def _dividing_heads(anatomy: Anatomy) -> int:
    """The greatest number of query heads, at most that of any block, which divides the hidden size."""
    most = max(shape.query_heads for shape in anatomy.shapes)
    return next(heads for heads in range(most, 0, -1) if anatomy.hidden % heads == 0)
