"""Wanda (arXiv 2306.11695): a weight matters by its magnitude times the norm of the input it multiplies."""

from __future__ import annotations

from torch import Tensor


def wanda_score(weight_OI: Tensor, norm_I: Tensor) -> Tensor:
    """S_ij = |W_ij| ||X_j||_2 (Eq. 1), float64; a common factor of the norms changes nothing."""
    return weight_OI.double().abs() * norm_I.double()
