"""Which shapes a family's stock config can state, and how a config states a shape."""

from __future__ import annotations

from typing import Any

from shearling.anatomy.spec import Anatomy

#: model_type of a checkpoint with per-layer widths is this prefix and the stock model_type
PER_LAYER_PREFIX = "shearling_"


def expressible(anatomy: Anatomy) -> bool:
    """Whether the stock config and class can hold this anatomy, so that any engine loads it."""
    if not anatomy.uniform or anatomy.biases:
        return False
    shape, stock = anatomy.shapes[0], anatomy.family.stock
    if "heads" in stock and "head_dim" in stock:
        return True
    # without a head_dim field the stock class computes it as hidden / heads
    return shape.query_heads * anatomy.head_dim == anatomy.hidden and (
        "kv_heads" in anatomy.family.config or shape.kv_heads == shape.query_heads
    )


def config_updates(anatomy: Anatomy) -> dict[str, Any]:
    """Config fields that state this anatomy; with a ``shearling`` entry where the stock config cannot."""
    fields = anatomy.family.config
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
        values["query_heads"] = values["kv_heads"] = None
        values["head_dim"] = anatomy.head_dim if "head_dim" in fields else None
    updates: dict[str, Any] = {
        fields[size]: value for size, value in values.items() if size in fields and value is not None
    }
    if not stock:
        updates["shearling"] = {
            "ffn": [shape.ffn for shape in anatomy.shapes],
            "query_heads": [shape.query_heads for shape in anatomy.shapes],
            "kv_heads": [shape.kv_heads for shape in anatomy.shapes],
            "head_dim": anatomy.head_dim,
            "biases": list(anatomy.biases),
        }
    return updates
