"""SLiM (arXiv 2410.09615): one scale a weight by its expected error, and a low-rank branch for what was lost.

    f             density of |W|, as a histogram
    E(alpha)      int_0^alpha f(x) (x - Q(x))^2 dx  +  int_alpha^inf f(x) (x - alpha)^2 dx            (SLiM-Quant)
    L R           the best rank-r approximation of (W - W_c) diag(a), times diag(a)^-1                (SLiM-LoRA)

W_c is the weight that was masked and quantised, so the branch makes up for both; a holds the root mean squares of the
linear's inputs. As the authors' code does and the paper does not say, W_c is made once more of W - L R under the same
mask. Where the Gram matrix of the inputs is known, ``activation_svd`` takes it in the place of diag(a)^2, which is the
least squares answer; with a diagonal one it is the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shearling.methods.slorb import activation_svd
from shearling.plan import Codes, Grid, dequantise
from shearling.plan.grids import FORMATS

#: candidates for alpha in each of two searches, the second around the best of the first
COARSE, FINE = 10, 20


class Compensated(NamedTuple):
    """Codes, and the factors of the branch beside them: ``down`` [R, I] and ``up`` [O, R]."""

    codes: Codes
    down: Tensor
    up: Tensor


@torch.no_grad()
def clipping(weight_OI: Tensor, last: int) -> Tensor:
    """alpha with the least E(alpha), for codes up to ``last``; float32, between 0 and the largest weight."""
    size = weight_OI.float().abs().flatten()
    bins = max(512, min(len(size) // 1000, 20000))
    top = float(size.max())
    if not top:
        return size.new_zeros(())
    counts = torch.histc(size, bins, 0, top).double()
    middles = (torch.arange(bins, device=size.device, dtype=torch.float64) + 0.5) * top / bins

    def best(candidates: Tensor) -> Tensor:
        steps = candidates[:, None] / last
        value = (middles / steps).round().clamp(max=last) * steps
        return candidates[((middles - value).square() * counts).sum(1).argmin()]

    width = top / COARSE
    middle = best(torch.linspace(width, top, COARSE, dtype=torch.float64, device=size.device))
    fine = torch.linspace(-width, width, 2 * FINE + 1, dtype=torch.float64, device=size.device)
    return best((middle + fine).clamp(width / FINE, top)).float()


def slim_rounded(weight_OI: Tensor, grid: Grid) -> Codes:
    """Symmetric codes with one scale for the whole weight, which every row and group repeats; 0 stays 0.

    Raises ShearlingError where the grid's groups do not fill the inputs.
    """
    scales_OG, zeros_OG = grid.cover(weight_OI)
    last = FORMATS[grid.format][1]
    alpha = clipping(weight_OI, last)
    scales_OG = torch.where(alpha > 0, (alpha / last).expand_as(scales_OG), scales_OG).contiguous()
    return Codes(grid.round(weight_OI, scales_OG, zeros_OG), scales_OG, zeros_OG)


@torch.no_grad()
def compensated(
    goal_OI: Tensor, weight_OI: Tensor, gram_II: Tensor, rank: int, compress: Callable[[Tensor], Codes]
) -> Compensated:
    """Codes of a weight and a branch that brings them near ``goal_OI`` on inputs with that Gram matrix.

    ``compress`` rounds a weight of the same zeros as ``weight_OI``. Raises ShearlingError as ``activation_svd``.
    """
    kept = weight_OI != 0
    codes = compress(weight_OI)
    down, up = activation_svd(goal_OI.float() - dequantise(*codes), gram_II, rank)
    codes = compress(torch.where(kept, goal_OI.float() - up @ down, 0.0))
    down, up = activation_svd(goal_OI.float() - dequantise(*codes), gram_II, rank)
    return Compensated(codes, down, up)
