"""Choosing and refitting by least squares: optimal brain surgery on the columns of an output projection.

    C_NI    inputs of the projection; H = C^T C its Gram matrix
    T_ND    what it should write; M = T^T C
    W_DI    its weight, W0 before

The refit minimises ||C_K W_K^T - T||^2 + lam ||W_K - W0_K||^2 over the kept columns K:

    W_K (H_KK + lam I) = M_K + lam W0_K                                       (1)

Removing the unit u (a channel, or the columns of a head) from a solution W of (1) with A = (H + lam I)^-1 raises the
objective by tr(W_u A_uu^-1 W_u^T), and the others answer with W <- W - W_u A_uu^-1 A_u: (Hassibi & Stork 1993, over
the outputs at once; Kurtic et al. 2023, ZipLM, for units).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shearling.errors import ShearlingError


class Elimination(NamedTuple):
    """``order`` lists units in the order they went; ``cost[n]`` is the objective's rise after n of them (float64)."""

    order: list[int]
    cost: list[float]


def ridge(gram_II: Tensor, damping: float) -> Tensor:
    """lam: a share of the Gram matrix' mean diagonal."""
    return damping * gram_II.diagonal().mean()


def refit(gram_II: Tensor, cross_DI: Tensor, weight_DI: Tensor, kept: Tensor, damping: float) -> Tensor:
    """W_K [D, K] of equation (1), solved in float64 by Cholesky.

    Raises ShearlingError when the damped Gram matrix is not positive definite.
    """
    gram = gram_II.double()
    lam = ridge(gram, damping)
    system = gram[kept[:, None], kept]
    system.diagonal().add_(lam)
    factor, info = torch.linalg.cholesky_ex(system)
    if info.item():
        raise ShearlingError(f"refit: the Gram matrix is not positive definite at damping {damping:g}; use more text")
    wish = cross_DI[:, kept].double() + lam * weight_DI[:, kept].double()
    return torch.cholesky_solve(wish.T, factor).T


def eliminate(
    gram_II: Tensor, cross_DI: Tensor, weight_DI: Tensor, *, remove: int, unit: int = 1, damping: float, batch: int = 1
) -> Elimination:
    """Remove ``remove`` units of ``unit`` consecutive columns, ``batch`` at a time, each time the least costly ones.

    With ``batch`` above one, costs within a batch ignore each other when chosen, and are exact when summed.
    """
    gram = gram_II.double()
    width = len(gram)
    lam = ridge(gram, damping)
    inverse = torch.linalg.inv(gram + lam * torch.eye(width, dtype=torch.float64, device=gram.device))
    inverse = (inverse + inverse.T) / 2
    weight = (cross_DI.double() + lam * weight_DI.double()) @ inverse
    order: list[int] = []
    cost = [0.0]
    gone = torch.zeros(width // unit, dtype=torch.bool, device=gram.device)
    offsets = torch.arange(unit, device=gram.device)
    while len(order) < remove:
        rises = _rises(weight, inverse, unit, gone)
        count = min(batch, remove - len(order))
        chosen = rises.topk(count, largest=False, sorted=True).indices
        columns = (chosen[:, None] * unit + offsets).flatten()
        block = torch.linalg.inv(inverse[columns][:, columns])
        taken = weight[:, columns]
        step = block @ inverse[columns]
        total = (taken @ block * taken).sum().item()
        shares = rises[chosen] / rises[chosen].sum().clamp(min=1e-300)
        for share in shares.tolist():
            cost.append(cost[-1] + share * total)
        weight.addmm_(taken, step, alpha=-1)
        inverse.addmm_(inverse[:, columns], step, alpha=-1)
        # exact zeros, where rounding left some dust
        weight[:, columns] = 0
        inverse[columns] = 0
        inverse[:, columns] = 0
        gone[chosen] = True
        order.extend(chosen.tolist())
    return Elimination(order, cost)


def _rises(weight_DI: Tensor, inverse_II: Tensor, unit: int, gone: Tensor) -> Tensor:
    """Rise of the objective for each unit removed alone; infinite for those that are gone."""
    if unit == 1:
        diagonal = inverse_II.diagonal().masked_fill(gone, 1)
        return (weight_DI.square().sum(0) / diagonal).masked_fill(gone, torch.inf)
    num = weight_DI.shape[1] // unit
    blocks = torch.stack([inverse_II[u * unit : (u + 1) * unit, u * unit : (u + 1) * unit] for u in range(num)])
    blocks[gone] = torch.eye(unit, dtype=blocks.dtype, device=blocks.device)
    columns = weight_DI.unflatten(1, (num, unit)).permute(1, 2, 0)
    return (columns * torch.linalg.solve(blocks, columns)).sum((1, 2)).masked_fill(gone, torch.inf)
