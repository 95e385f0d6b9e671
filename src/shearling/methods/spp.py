"""SPP (arXiv 2405.16057): retraining of a pruned model by multiplicative adapters, under masks that cannot move.

    W                               [N, d], pruned and frozen
    W' = W + s W . (repeat(A) . b)  is multiplied; repeat gives each of the r rows of A to N / r consecutive outputs
    A                               [r, d], Kaiming-uniform at the start
    b                               [N, 1], zero at the start, so that W' = W
    s                               alpha over rank: 2 in the release, beside r = 16

With G = dL/dW' the gradients are dL/db = s sum_j G . W . repeat(A) over the inputs j, and dL/dA = s sum_n G . W . b
over the N / r outputs n of each row. Zeros of W are zeros of W', which takes the place of W at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shearling.anatomy import Anatomy
from shearling.errors import ShearlingError
from shearling.methods.projections import as_out_in
from shearling.nn import EffectiveLinear, MultiplicativeAdapter, unwrap_, wrap_
from shearling.plan import Delta, Edit
from shearling.train.policy import Policy
from shearling.train.settings import TrainSettings


class SPPPolicy(Policy):
    """A multiplicative adapter of every linear's weight in every block; nothing else is trained.

    ``masks`` (by full tensor name, as stored) say which weights stay; without them those do that are not zero.
    ``finalize`` merges the adapters, which leaves the stock model with +0.0 under the masks, and returns the weights of
    these linears as a ``Delta``.

    Raises ShearlingError, before anything changes, where ``rank`` does not divide the outputs of a linear.
    """

    def __init__(
        self, anatomy: Anatomy, rank: int = 16, scale: float = 2.0, masks: Mapping[str, Tensor] | None = None
    ) -> None:
        self.rank, self.scale = rank, scale
        self.paths = [anatomy.path(n, linear) for n in range(anatomy.num_layers) for linear in anatomy.family.linears]
        self._anatomy, self._masks = anatomy, dict(masks or {})
        self._model: Any = None
        self._linears: dict[str, EffectiveLinear] = {}

    @torch.no_grad()
    def attach(self, model: Any, settings: TrainSettings) -> None:
        stored = {path: model.get_submodule(path).weight for path in self.paths}
        _check_rank(self.rank, {path: len(as_out_in(self._anatomy, weight)) for path, weight in stored.items()})
        self._model, self._linears = model, wrap_(model, self.paths)
        model.requires_grad_(False)
        for path, linear in self._linears.items():
            name, weight = f"{path}.weight", linear.weight
            mask = self._masks[name].to(weight.device) if name in self._masks else weight != 0
            # once is enough: the adapter keeps +0.0, but a -0.0 as well
            weight.copy_(torch.where(mask, weight, 0.0))
            linear.transforms.append(MultiplicativeAdapter(linear, self.rank, self.scale))

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for linear in self._linears.values() for p in linear.transforms.parameters()]}]

    def capturable(self) -> bool:
        return True

    @torch.no_grad()
    def finalize(self) -> Sequence[Edit]:
        unwrap_(self._model, self.paths)
        # copies, since the model may change afterwards
        values = {
            f"{path}.weight": linear.weight.detach().to("cpu", copy=True) for path, linear in self._linears.items()
        }
        self._model, self._linears = None, {}
        return [Delta(values)]


def _check_rank(rank: int, outputs: Mapping[str, int]) -> None:
    common = math.gcd(*outputs.values())
    for path, number in outputs.items():
        if rank < 1 or number % rank:
            raise ShearlingError(
                f"{path}: rank = {rank} must divide its {number} outputs; all linears take the divisors of {common}"
            )
