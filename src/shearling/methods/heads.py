"""KV groups beside channels, in one budget counted in parameters: our extension of CFSP, which cuts channels alone.

    e_u     energy of a unit: sum over its inputs j of n_j^2 ||W_j||^2, what it writes to the residual stream if its
            inputs were independent; n_j root mean square of input j, W_j its column in the output projection
    c_u     parameters of a unit, in FFN channels: 1 for a channel, ``group_cost`` for a KV group with its query heads

Block importance says how much a block gives (methods/cfsp.py); within the block the units with the least e_u / c_u go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shearling.sweep import InputStatistics


def energies(weight_DI: Tensor, inputs: InputStatistics, width: int = 1) -> Tensor:
    """e_u of every unit of ``width`` consecutive inputs, float64."""
    energy = inputs.square / inputs.count * weight_DI.double().square().sum(0)
    return energy.view(-1, width).sum(1)


def groups_to_remove(channels: Tensor, groups: Tensor, remove: float, group_cost: float) -> int:
    """How many KV groups are among the cheapest units worth ``remove`` channels; one group always stays.

    ``channels`` and ``groups`` are energies. What the groups do not pay, channels must, and one of those stays too.
    """
    cost = torch.cat([torch.ones_like(channels), torch.full_like(groups, group_cost)])
    order = (torch.cat([channels, groups]) / cost).sort(stable=True).indices
    inside = cost[order].cumsum(0) <= remove
    chosen = int((order[inside] >= len(channels)).sum())
    least = -(-(remove - (len(channels) - 1)) // group_cost)
    return min(max(chosen, int(least)), len(groups) - 1)
