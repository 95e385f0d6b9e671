"""Importance-guided LoRA: after structured pruning, each block gets a rank that follows its importance.

CFSP (arXiv 2409.13199) names the idea; neither its formula nor its code was at hand, so what stands here is our
reading of it:

    w_l   g_l / mean(g), or (1 - keep_l) / mean(1 - keep), or 1     share of block l
    r_l   round(mean_rank * w_l) within [2, 4 mean_rank]            rank of every linear in block l
    alpha_l = alpha_over_rank * r_l                                 so that all branches have one scale
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from shearling.anatomy import Anatomy
from shearling.errors import ShearlingError
from shearling.nn import LoRABranch, unwrap_, wrap_
from shearling.plan import Adapters, Edit, round_to_total
from shearling.train.policy import Policy
from shearling.train.settings import TrainSettings

RANK_MIN = 2
RANK_MAX_OVER_MEAN = 4


def allocate_ranks(
    importance: Sequence[float], mean_rank: int, mode: Literal["important", "damaged", "uniform"]
) -> list[int]:
    """Ranks r_l, one a block, whose sum is exactly ``len(importance) * mean_rank``.

    ``importance`` holds g_l for mode "important", the removed share 1 - keep_l for "damaged"; for "uniform" only its
    length counts. Ranks lie within [min(2, mean_rank), 4 mean_rank]; what clipping and rounding leave goes by largest
    remainder, the lower index first. Raises ShearlingError for numbers that are negative, not finite, or all zero.
    """
    if mode not in ("important", "damaged", "uniform"):
        raise ShearlingError(f"ranks={mode!r}: must be important, damaged or uniform")
    if mean_rank < 1:
        raise ShearlingError(f"mean_rank={mean_rank}: must be at least 1")
    count = len(importance)
    total = math.fsum(importance)
    if mode == "uniform" or not count:
        return [mean_rank] * count
    if not all(math.isfinite(g) and g >= 0 for g in importance) or total == 0:
        raise ShearlingError(f"ranks={mode}: needs non-negative numbers, not all zero; got {list(importance)}")
    ideal = [mean_rank * g * count / total for g in importance]
    low, high = min(RANK_MIN, mean_rank), RANK_MAX_OVER_MEAN * mean_rank
    return round_to_total(ideal, count * mean_rank, low=[low] * count, high=[high] * count)


class LoRAPolicy(Policy):
    """A LoRA branch beside every linear of every block, the rank by block; nothing else is trained.

    ``finalize`` merges the branches into the weights, which puts the stock linears back, and returns what it merged as
    ``Adapters``. Sizes are read from the modules, so cut models need nothing special.
    """

    def __init__(self, anatomy: Anatomy, ranks: Sequence[int], alpha_over_rank: float = 2.0) -> None:
        _check_ranks(anatomy, ranks)
        self.ranks = {
            anatomy.path(layer, linear): rank for layer, rank in enumerate(ranks) for linear in anatomy.family.linears
        }
        self.alpha_over_rank = alpha_over_rank
        self._model: nn.Module | None = None
        self._branches: dict[str, LoRABranch] = {}

    def attach(self, model: nn.Module, settings: TrainSettings) -> None:
        wrapped = wrap_(model, self.ranks)
        model.requires_grad_(False)
        for path, linear in wrapped.items():
            rank = self.ranks[path]
            alpha = self.alpha_over_rank * rank
            branch = LoRABranch(linear.in_features, linear.out_features, rank, alpha, linear.weight.device)
            linear.branches.append(branch)
            self._branches[path] = branch
        self._model = model

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for branch in self._branches.values() for p in (branch.down, branch.up)]}]

    def capturable(self) -> bool:
        return True

    def finalize(self) -> Sequence[Edit]:
        assert self._model is not None, "finalize comes after attach"
        edit = Adapters(
            down={path: branch.down.detach() for path, branch in self._branches.items()},
            up={path: branch.up.detach() for path, branch in self._branches.items()},
            scale={path: branch.scale for path, branch in self._branches.items()},
        )
        unwrap_(self._model, self._branches)
        self._model, self._branches = None, {}
        return [edit]


def peft_config(anatomy: Anatomy, ranks: Sequence[int], alpha_over_rank: float = 2.0) -> dict[str, Any]:
    """Keyword arguments of ``peft.LoraConfig`` for the same branches as ``LoRAPolicy`` makes."""
    _check_ranks(anatomy, ranks)
    linears = anatomy.family.linears
    pattern = {anatomy.path(layer, linear): rank for layer, rank in enumerate(ranks) for linear in linears}
    mean = max(1, round(sum(ranks) / len(ranks)))
    return {
        "task_type": "CAUSAL_LM",
        "target_modules": list(linears),
        "r": mean,
        "lora_alpha": alpha_over_rank * mean,
        "lora_dropout": 0.0,
        "bias": "none",
        "rank_pattern": pattern,
        "alpha_pattern": {path: alpha_over_rank * rank for path, rank in pattern.items()},
        "fan_in_fan_out": anatomy.family.input_first,
    }


def _check_ranks(anatomy: Anatomy, ranks: Sequence[int]) -> None:
    if len(ranks) != anatomy.num_layers:
        raise ShearlingError(f"ranks: {len(ranks)} given, the model has {anatomy.num_layers} blocks; give one a block")
    if min(ranks) < 1:
        raise ShearlingError(f"ranks: {min(ranks)} is too small; must be at least 1")
