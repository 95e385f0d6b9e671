"""Wanda (arXiv 2306.11695): a weight matters by its magnitude times the norm of the input it multiplies."""

from __future__ import annotations

import torch
from torch import Tensor


def wanda_score(weight_OI: Tensor, norm_I: Tensor) -> Tensor:
    """S_ij = |W_ij| ||X_j||_2 (Eq. 1), in float32 at least; a common factor of the norms changes nothing."""
    return weight_OI.abs() * norm_I.to(torch.promote_types(weight_OI.dtype, torch.float32))
