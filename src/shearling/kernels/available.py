"""Whether Triton can be used."""

from __future__ import annotations

import os
from functools import cache

from torch import Tensor


def triton_usable(tensor: Tensor) -> bool:
    """Whether a Triton kernel can run on a tensor: on a GPU, or anywhere with ``TRITON_INTERPRET=1``."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _importable()
    return tensor.is_cuda and _importable() and _compiles()


@cache
def _importable() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _compiles() -> bool:
    import triton

    try:
        # builds Triton's own helper, which fails in many ways where there is no C compiler or no Python header
        triton.runtime.driver.active.get_current_target()
    except Exception:
        return False
    return True
