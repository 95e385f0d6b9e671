"""Rounding to the nearest value of a grid, and how wide the grid of a group should be."""

from __future__ import annotations

import torch
from torch import Tensor

from shearling.plan import Codes, Grid, dequantise
from shearling.recipe import Scales

#: shares of a group's range that are tried: what is clipped may cost less than wider steps
SHARES = tuple(1 - step / 32 for step in range(16))


def rounded(weight_OI: Tensor, grid: Grid, scales: Scales = "covering") -> Codes:
    """The weight's nearest values on the grid; 0 stays 0.

    Raises ShearlingError where the grid's groups do not fill the inputs.
    """
    scales_OG, zeros_OG = ranges(grid, weight_OI, scales)
    return Codes(grid.round(weight_OI, scales_OG, zeros_OG), scales_OG, zeros_OG)


@torch.no_grad()
def ranges(grid: Grid, weight_OI: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
    """Scales and zeros [O, G]: of the grid that covers the weight, or the share of it with the least squared error."""
    scales_OG, zeros_OG = grid.cover(weight_OI)
    if scales == "covering":
        return scales_OG, zeros_OG
    weight_OGi = weight_OI.float().unflatten(1, (scales_OG.shape[1], -1))
    least_OG = torch.full_like(scales_OG, torch.inf)
    for share in SHARES:
        tried, zeros = grid.cover(weight_OI, share)
        value_OI = dequantise(grid.round(weight_OI, tried, zeros), tried, zeros)
        error_OG = (value_OI.view_as(weight_OGi) - weight_OGi).square().sum(-1)
        better_OG = error_OG < least_OG
        least_OG = torch.where(better_OG, error_OG, least_OG)
        scales_OG = torch.where(better_OG, tried, scales_OG)
        zeros_OG = torch.where(better_OG, zeros.float(), zeros_OG.float()).to(zeros.dtype)
    return scales_OG, zeros_OG
