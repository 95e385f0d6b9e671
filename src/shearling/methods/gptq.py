"""GPTQ (arXiv 2210.17323): column after column, what rounding breaks is mended by the columns to its right.

    H = X X^T + lam I       of a linear's inputs
    U                       upper Cholesky factor of H^-1 (``inverse_factor``)
    E_j = (W_j - Q(W_j)) / U_jj,   W_k <- W_k - E_j U_jk  for k > j         (Eqs. 2 and 3, Algorithm 1)

With ``order`` the columns with the greatest H_jj go first and the grid is fixed beforehand, so that groups stay where
they lie. Without, the grid of a group is the one its columns ask for when their turn comes. A pruned weight takes part
as one whose only value is 0: what its neighbours would have it make up for is passed on (the joint rule of SparseGPT,
arXiv 2301.00774, section 3.5), and it stays exactly 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shearling.methods.rounding import ranges
from shearling.methods.sparsegpt import BLOCK, inverse_factor
from shearling.plan import Codes, Grid, dequantise
from shearling.plan.grids import FORMATS
from shearling.recipe import Scales


class Rounded(NamedTuple):
    """Codes of a weight, and the ``damping`` that its Gram matrix needed."""

    codes: Codes
    damping: float


def gptq(
    weight_OI: Tensor,
    gram_II: Tensor,
    grid: Grid,
    kept_OI: Tensor,
    *,
    damping: float = 0.01,
    order: bool = True,
    scales: Scales = "covering",
) -> Rounded:
    """Round a weight to a grid with its inputs' Gram matrix; what is not ``kept`` is exactly 0.

    The factorisation runs in float64, the sweep in float32. Inputs that never fired are rounded to the nearest.
    Raises ShearlingError where the grid's groups do not fill the inputs, and as ``inverse_factor``.
    """
    weight = torch.where(kept_OI, weight_OI.float(), 0.0)
    inputs = weight.shape[1]
    grid.check(inputs)
    width, alone = grid.group or inputs, Grid(grid.format)
    scales_OG, zeros_OG = ranges(grid, weight, scales)
    columns = gram_II.diagonal().argsort(descending=True) if order else torch.arange(inputs, device=weight.device)
    factor, damping = inverse_factor(gram_II[columns][:, columns], damping)
    factor = factor.float()
    work, kept = weight[:, columns], kept_OI[:, columns]
    # columns as rows, so that each lies in one piece
    codes_IO = torch.empty(inputs, len(weight), dtype=FORMATS[grid.format][2], device=weight.device)
    groups = (columns // width).tolist()
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        part, stays = work[:, start:stop].T.contiguous(), kept[:, start:stop].T.contiguous()
        corner, errors = factor[start:stop, start:stop], torch.empty_like(part)
        for here, column in enumerate(range(start, stop)):
            group = slice(groups[column], groups[column] + 1)
            # what lies beyond this block of columns is brought up to date only when its turn comes
            if not order and column % width == 0 and column + width <= stop:
                own = slice(here, here + width)
                asked = torch.where(stays[own], part[own], 0.0).T
                scales_OG[:, group], zeros_OG[:, group] = ranges(alone, asked, scales)
            wanted = torch.where(stays[here], part[here], 0.0)
            found = alone.round(wanted[:, None], scales_OG[:, group], zeros_OG[:, group])
            value = dequantise(found, scales_OG[:, group], zeros_OG[:, group])
            error = (part[here] - value[:, 0]) / corner[here, here]
            part[here + 1 :].addr_(corner[here, here + 1 :], error, alpha=-1)
            errors[here], codes_IO[column] = error, found[:, 0]
        work[:, stop:].addmm_(errors.T, factor[start:stop, stop:], alpha=-1)
    codes_OI = codes_IO[columns.argsort()].T.contiguous()
    return Rounded(Codes(codes_OI, scales_OG, zeros_OG), damping)
