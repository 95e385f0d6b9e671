"""SparseGPT (arXiv 2301.00774): column after column, what a weight's removal breaks is mended by those to its right.

    H = X X^T + lam I       of a linear's inputs
    U                       upper Cholesky factor of H^-1: row i holds, up to U_ii, what OBS needs once the columns
                            before i are settled (Section 3.3)
    W_ij^2 / U_jj^2         error of removing a weight (Algorithm 1)

Masks are chosen where the sweep stands, on weights that earlier columns have already changed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shearling.errors import ShearlingError
from shearling.kernels import triton_usable
from shearling.methods.sparse import Sparse
from shearling.plan.patterns import Pattern, highest, num_kept

#: columns that are settled before the rest of the matrix is brought up to date (B in Algorithm 1)
BLOCK = 128
#: factor and number of steps by which damping rises where a factorisation fails
RAISE, TRIES = 10.0, 4


def sparsegpt(weight_OI: Tensor, gram_II: Tensor, pattern: Pattern | float, damping: float = 0.01) -> Sparse:
    """Prune a weight to an N:M pattern, or to a share of each row, with its inputs' Gram matrix.

    The factorisation runs in float64, the sweep in float32 for weights of less. Inputs that never fired lose their
    weights. A share is met in every row, and in every block of columns as near as whole numbers allow. Raises
    ShearlingError where the Gram matrix stays singular after damping was raised, step by step.
    """
    weight = weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32)).clone()
    inputs = weight.shape[1]
    kept = num_kept(pattern, inputs)
    weight[:, gram_II.diagonal() == 0] = 0
    factor, damping = inverse_factor(gram_II, damping)
    factor = factor.to(weight.dtype)
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    sweep = _implementation(weight)
    group = (pattern.keep, pattern.of) if isinstance(pattern, Pattern) else None
    step = BLOCK if isinstance(pattern, float) else max(1, BLOCK // pattern.of) * pattern.of
    for start in range(0, inputs, step):
        stop = min(start + step, inputs)
        corner, diagonal = factor[start:stop, start:stop], factor.diagonal()[start:stop]
        # columns as rows, so that each lies in one piece
        part = weight[:, start:stop].T.contiguous()
        stays = torch.zeros_like(part, dtype=torch.bool)
        if isinstance(pattern, float):
            score = (part / diagonal[:, None]).square()
            stays = highest(score.T, kept * stop // inputs - kept * start // inputs).T.contiguous()
        errors = sweep(part, corner, stays, group)
        weight[:, start:stop] = part.T
        mask[:, start:stop] = stays.T
        weight[:, stop:].addmm_(errors.T, factor[start:stop, stop:], alpha=-1)
    return Sparse(weight.to(weight_OI.dtype), mask, damping)


def sweep_reference(part_BO: Tensor, corner_BB: Tensor, stays_BO: Tensor, pattern: tuple[int, int] | None) -> Tensor:
    """Settle a block of columns (as rows), one after the other, in place; ``corner_BB`` is its part of the factor U.

    With ``pattern``, (keep, of), what stays is chosen on the way; without, ``stays_BO`` says it. Returns the errors
    [B, O] that the columns after the block answer for.
    """
    diagonal, errors = corner_BB.diagonal(), torch.empty_like(part_BO)
    for column in range(len(part_BO)):
        if pattern is not None and column % pattern[1] == 0:
            group = slice(column, column + pattern[1])
            score = (part_BO[group] / diagonal[group, None]).square()
            stays_BO[group] = highest(score.T, pattern[0]).T
        gone = part_BO[column].masked_fill(stays_BO[column], 0.0).div_(diagonal[column])
        part_BO[column:].addr_(corner_BB[column, column:], gone, alpha=-1)
        errors[column] = gone
    part_BO.masked_fill_(~stays_BO, 0.0)
    return errors


def _implementation(weight: Tensor) -> Callable[[Tensor, Tensor, Tensor, tuple[int, int] | None], Tensor]:
    if weight.dtype != torch.float32 or not triton_usable(weight):
        return sweep_reference
    # imports Triton
    from shearling.kernels.column_sweep import column_sweep

    return column_sweep


def inverse_factor(gram_II: Tensor, damping: float) -> tuple[Tensor, float]:
    """U with U^T U = (H + lam I)^-1, float64, and the share of the mean diagonal that lam had to be.

    Read backwards H is L L^T, so H = V V^T with V upper triangular, and U = V^-1: one factorisation, no inverse of H.
    """
    mean = gram_II.diagonal().mean(dtype=torch.float64)
    if not torch.isfinite(mean) or mean <= 0:
        raise ShearlingError("sparsegpt: the inputs of a linear are all zero or not finite on the calibration text")
    shares = [damping * RAISE**attempt for attempt in range(TRIES)]
    for share in shares:
        backwards = gram_II.double().flip(0, 1)
        backwards.diagonal().add_(share * mean)
        lower, info = torch.linalg.cholesky_ex(backwards)
        if not info.item():
            del backwards
            # which CUDA gives column by column
            upper = lower.flip(0, 1).contiguous()
            del lower
            invert_triangular_(upper)
            return upper, share
    raise ShearlingError(f"sparsegpt: the Gram matrix is singular even at damping {shares[-1]:g}; use more text")


def invert_triangular_(upper: Tensor) -> None:
    """Invert an upper triangular matrix in place, by halves: nearly all of it is matrix products."""
    size = len(upper)
    if size <= BLOCK:
        identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, identity, upper=True))
        return
    half = size // 2
    first, corner, second = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    invert_triangular_(first)
    invert_triangular_(second)
    corner.copy_(first @ corner @ second).neg_()
