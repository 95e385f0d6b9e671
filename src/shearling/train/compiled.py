"""Blocks compiled by torch: fewer and larger kernels, at the cost of a minute at the first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from shearling.train.head import blocks_of


@contextmanager
def compiled(model: Any, backend: str = "inductor") -> Iterator[None]:
    """Within, every block of a causal language model runs compiled; blocks of one shape share their code.

    ``backend`` is torch.compile's. Not for a model that is ``offloaded``.
    """
    blocks = blocks_of(model)
    # every width is a variant of one piece of code, in training, in evaluation, and for a last, smaller batch
    variants = 4 * len(blocks) + 8
    changes = {
        "recompile_limit": variants,
        "accumulated_recompile_limit": 8 * variants,
        # else a gated block runs the code of an ungated one, a teacher's for example
        "skip_nnmodule_hook_guards": False,
    }
    with torch._dynamo.config.patch(changes):
        for block in blocks:
            block.forward = torch.compile(block.forward, backend=backend, dynamic=False)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward
