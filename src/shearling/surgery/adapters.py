"""Low-rank branches that stay beside the linears of a model; ``cut_`` merges them instead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shearling.errors import ShearlingError
from shearling.nn import EffectiveLinear, LowRankBranch, wrap_, wrapped_linears
from shearling.plan import Adapters


def attach_adapters_(model: nn.Module, adapters: Adapters) -> dict[str, EffectiveLinear]:
    """Put a LowRankBranch with copies of the factors beside each named linear, in place; returns the linears.

    Raises ShearlingError, before the model computes anything else, for a name that is no linear of the model and for
    factors that do not fit.
    """
    wrapped = wrap_(model, adapters.down)
    for path, linear in wrapped.items():
        shapes = list(adapters.up[path].shape), list(adapters.down[path].shape)
        rank = adapters.down[path].shape[0]
        if shapes != ([linear.out_features, rank], [rank, linear.in_features]):
            raise ShearlingError(
                f"{path}: factors {shapes[0]} and {shapes[1]} do not fit; "
                f"it takes [{linear.out_features}, rank] and [rank, {linear.in_features}]"
            )
    for path, linear in wrapped.items():
        branch = LowRankBranch(adapters.down[path], adapters.up[path], adapters.scale[path])
        linear.branches.append(branch.to(linear.weight.device))
    return wrapped


def adapters_of(model: nn.Module) -> Adapters:
    """The branches beside a model's linears, several beside one stacked into one; tensors are the model's own."""
    found = {path: linear for path, linear in wrapped_linears(model).items() if len(linear.branches)}
    stacked = {path: _stack(linear) for path, linear in found.items()}
    return Adapters(
        down={path: down for path, (down, _, _) in stacked.items()},
        up={path: up for path, (_, up, _) in stacked.items()},
        scale={path: scale for path, (_, _, scale) in stacked.items()},
    )


def _stack(linear: EffectiveLinear) -> tuple[Tensor, Tensor, float]:
    """(down, up, scale) of the one branch that does what all of a linear's do."""
    branches = [branch for branch in linear.branches if isinstance(branch, LowRankBranch)]
    assert len(branches) == len(linear.branches), linear
    if len(branches) == 1:
        return branches[0].down.detach(), branches[0].up.detach(), branches[0].scale
    down = torch.cat([branch.down.detach() for branch in branches])
    up = torch.cat([branch.scale * branch.up.detach() for branch in branches], 1)
    return down, up, 1.0
