"""A real model after a cut, made once."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from shearling.anatomy import anatomy_of
from shearling.plan import Structure
from shearling.surgery import cut_

#: channels that blocks of 256 divide, as every type of GGUF and DeciLM has them
WIDTH = 1280


@pytest.fixture(scope="session")
def cut_smollm2(smollm2: tuple[Any, Any]) -> tuple[Any, Any]:
    """SmolLM2 in float32 with the first channels of every block, and its tokenizer; not to be changed."""
    model = copy.deepcopy(smollm2[0]).float()
    layers = anatomy_of(model.config).num_layers
    cut_(model, [Structure({f"ffn.{layer}": tuple(range(WIDTH)) for layer in range(layers)})])
    return model, smollm2[1]


@pytest.fixture(scope="session")
def per_layer_smollm2(smollm2: tuple[Any, Any]) -> tuple[Any, Any]:
    """SmolLM2 in float32 with widths and KV groups of their own in its blocks, and its tokenizer; not to be changed."""
    model = copy.deepcopy(smollm2[0]).float()
    layers = anatomy_of(model.config).num_layers
    kept = {f"ffn.{layer}": tuple(range(1536 - 32 * (layer % 9))) for layer in range(layers)}
    cut_(model, [Structure({**kept, "kv_group.3": (0, 2), "kv_group.7": (1,)})])
    return model, smollm2[1]
