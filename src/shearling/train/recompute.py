"""Activation checkpointing: of each block only the input is kept, the rest is computed again when it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from shearling.train.head import blocks_of


@contextmanager
def recomputed(model: Any) -> Iterator[None]:
    """Within, every block of a causal language model keeps only its input; results are the same to the bit."""
    blocks = blocks_of(model)
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
