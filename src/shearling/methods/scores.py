"""Channel scores of one block's feed-forward layer. D hidden, I channels; a higher score stays.

``down_DI`` is the weight that writes back to the residual stream, ``inputs`` the statistics of its input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shearling.sweep import InputStatistics


def activation(inputs: InputStatistics) -> Tensor:
    """Root mean square of each channel: what CFSP's released code ranks by (its weight terms are constants)."""
    return inputs.norm


def wanda(down_DI: Tensor, inputs: InputStatistics) -> Tensor:
    """Mean over the outputs of |W_ij| n_j (Wanda-SP)."""
    return down_DI.double().abs().mean(0) * inputs.norm


def eq8(down_DI: Tensor, inputs: InputStatistics, gates_ID: Sequence[Tensor]) -> Tensor:
    """CFSP's Eq. 8 as we read it: each output's weights are compared across channels, and so are the inputs'.

    sum_i |Wd_ij| n_j / (||Wd_i|| sum_j' n_j') + sum_i |Wg_ji| / ||Wg_.i|| for each matrix that reads into the layer,
    all norms L1 over channels: the released code sums over the outputs instead, which makes every term a constant.
    """
    down, norm = down_DI.double().abs(), inputs.norm
    score = (down / down.sum(1, keepdim=True)).sum(0) * norm / norm.sum()
    for gate_ID in gates_ID:
        gate = gate_ID.double().abs()
        score = score + (gate / gate.sum(0, keepdim=True)).sum(1)
    return score


def flap(down_DI: Tensor, inputs: InputStatistics) -> Tensor:
    """Var(x_j) ||W_j||^2: the fluctuation that a bias cannot stand for (FLAP, Eq. 5)."""
    return inputs.variance * down_DI.double().square().sum(0)


def magnitude(down_DI: Tensor) -> Tensor:
    """L2 norm of each channel's column."""
    return torch.linalg.vector_norm(down_DI.double(), dim=0)


def random(num: int, layer: int, seed: int) -> Tensor:
    """Scores drawn for this layer from a seed."""
    return torch.rand(num, generator=torch.Generator().manual_seed(seed * 1_000_003 + layer), dtype=torch.float64)


def top(score: Tensor, keep: int) -> tuple[int, ...]:
    """Indices of the ``keep`` highest scores, increasing; of equal ones the lower index stays."""
    return tuple(sorted(torch.sort(score, descending=True, stable=True).indices[:keep].tolist()))
