"""From a model's config to its anatomy."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from shearling.anatomy import families
from shearling.anatomy.spec import Anatomy, BlockShape, Family
from shearling.anatomy.stock import PER_LAYER_PREFIX
from shearling.errors import ShearlingError


@cache
def family_names() -> tuple[str, ...]:
    """Model types with a data file under ``anatomy/families``."""
    return tuple(sorted(m.name for m in iter_modules(families.__path__) if m.name[0] != "_"))


@cache
def family_of(model_type: str) -> Family:
    """The family of a ``model_type``; ShearlingError names the file to add for an unknown one."""
    if model_type not in family_names():
        raise ShearlingError(
            f"model type {model_type!r}: no anatomy; known are {', '.join(family_names())}. To add it, describe its "
            f"tensors in src/shearling/anatomy/families/{model_type}.py and run tests/test_conformance.py"
        )
    return import_module(f"shearling.anatomy.families.{model_type}").FAMILY


def anatomy_of(config: Any) -> Anatomy:
    """Anatomy of a transformers config, stock or with per-layer widths.

    Raises ShearlingError when the architecture is unknown or a config value breaks its family's description.
    """
    config = getattr(config, "text_config", None) or config
    model_type = config.model_type.removeprefix(PER_LAYER_PREFIX)
    family = family_of(model_type)
    for name, (needed, why) in family.requires.items():
        if getattr(config, name, needed) != needed:
            raise ShearlingError(f"{model_type}: {name}={getattr(config, name)!r} is not supported ({why})")

    def read(size: str) -> int | None:
        name = family.config.get(size)
        return getattr(config, name, None) if name else None

    hidden, query_heads = read("hidden"), read("query_heads")
    assert hidden and query_heads
    ffn = read("ffn") or 4 * hidden
    kv_heads = read("kv_heads") or query_heads
    head_dim = read("head_dim") or hidden // query_heads
    per_layer = getattr(config, "shearling", None) or {}
    shapes = tuple(
        BlockShape(
            ffn=per_layer.get("ffn", {layer: ffn})[layer],
            query_heads=per_layer.get("query_heads", {layer: query_heads})[layer],
            kv_heads=per_layer.get("kv_heads", {layer: kv_heads})[layer],
        )
        for layer in range(read("layers") or 0)
    )
    return Anatomy(
        family=family,
        hidden=hidden,
        head_dim=per_layer.get("head_dim", head_dim),
        vocab=config.vocab_size,
        shapes=shapes,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        biases=tuple(per_layer.get("biases", ())),
    )
