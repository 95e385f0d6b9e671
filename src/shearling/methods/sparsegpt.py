"""SparseGPT (arXiv 2301.00774): column after column, what a weight's removal breaks is mended by those to its right.

    H = X X^T + lam I       of a linear's inputs
    U                       upper Cholesky factor of H^-1: row i holds, up to U_ii, what OBS needs once the columns
                            before i are settled (Section 3.3)
    W_ij^2 / U_jj^2         error of removing a weight (Algorithm 1)

Masks are chosen where the sweep stands, on weights that earlier columns have already changed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shearling.errors import ShearlingError
from shearling.plan.patterns import Pattern, row_mask

#: columns that are settled before the rest of the matrix is brought up to date (B in Algorithm 1)
BLOCK = 128
#: factor and number of steps by which damping rises where a factorisation fails
RAISE, TRIES = 10.0, 4


class Sparse(NamedTuple):
    """New ``weight`` [O, I] in the old dtype, ``mask`` of what stays, and the ``damping`` that was needed."""

    weight: Tensor
    mask: Tensor
    damping: float


def sparsegpt(weight_OI: Tensor, gram_II: Tensor, pattern: Pattern | float, damping: float = 0.01) -> Sparse:
    """Prune a weight to an N:M pattern, or to a share of each row, with its inputs' Gram matrix.

    Everything runs in float64 but the sweep itself (float32 for weights of less). Inputs that never fired lose their
    weights. Raises ShearlingError where the Gram matrix stays singular after damping was raised, step by step.
    """
    weight = weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32)).clone()
    inputs = weight.shape[1]
    if isinstance(pattern, Pattern):
        pattern.check(inputs)
    gram = gram_II.double()
    dead = gram.diagonal() == 0
    weight[:, dead] = 0
    factor, damping = inverse_factor(gram, damping)
    factor = factor.to(weight.dtype)
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    step = BLOCK if isinstance(pattern, float) else max(1, BLOCK // pattern.of) * pattern.of
    for start in range(0, inputs, step):
        block = slice(start, min(start + step, inputs))
        corner = factor[block, block]
        part, errors = weight[:, block], torch.empty_like(weight[:, block])
        diagonal = corner.diagonal()
        if isinstance(pattern, float):
            mask[:, block] = row_mask((part / diagonal).square(), pattern)
        for column in range(part.shape[1]):
            if isinstance(pattern, Pattern) and column % pattern.of == 0:
                group = slice(column, column + pattern.of)
                mask[:, block][:, group] = pattern.mask((part[:, group] / diagonal[group]).square())
            value = part[:, column]
            gone = torch.where(mask[:, block][:, column], 0.0, value) / diagonal[column]
            part[:, column:] -= gone[:, None] * corner[column, column:]
            errors[:, column] = gone
        weight[:, block.stop :] -= errors @ factor[block, block.stop :]
    weight = torch.where(mask, weight, 0.0)
    return Sparse(weight.to(weight_OI.dtype), mask, damping)


def inverse_factor(gram_II: Tensor, damping: float) -> tuple[Tensor, float]:
    """U with U^T U = (H + lam I)^-1, float64, and the share of the mean diagonal that lam had to be."""
    gram = gram_II.double()
    mean = gram.diagonal().mean()
    if not torch.isfinite(mean) or mean <= 0:
        raise ShearlingError("sparsegpt: the inputs of a linear are all zero or not finite on the calibration text")
    identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    shares = [damping * RAISE**attempt for attempt in range(TRIES)]
    for share in shares:
        lower, info = torch.linalg.cholesky_ex(gram + share * mean * identity)
        if info.item():
            continue
        upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not info.item():
            return upper, share
    raise ShearlingError(f"sparsegpt: the Gram matrix is singular even at damping {shares[-1]:g}; use more text")
