"""What pruning one weight gives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sparse(NamedTuple):
    """New ``weight`` [O, I] in the old dtype, ``mask`` of what stays, and the ``damping`` that was needed."""

    weight: Tensor
    mask: Tensor
    damping: float
