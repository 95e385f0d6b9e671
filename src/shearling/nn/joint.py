"""Linears that read the same states, as one product: fewer and larger kernels, and one gradient for what they read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from shearling.nn.linear import EffectiveLinear


@contextmanager
def joint_products(groups: Sequence[Sequence[Any]]) -> Iterator[None]:
    """Within, the linears of a group share a product.

    They must be called with the same states, once each in any order, before one of them is called again. A group stays
    as it is where its linears do not fit together.
    """
    taken = [linears for linears in groups if _fit_together(linears)]
    for linears in taken:
        waiting: dict[int, Tensor] = {}
        for number, linear in enumerate(linears):
            # tuples, which do not register the modules they hold
            linear._joint = (tuple(linears), number, waiting)
            # a method, so that torch compiles it once for all modules
            linear.forward = MethodType(_forward, linear)
    try:
        yield
    finally:
        for linears in taken:
            for linear in linears:
                del linear.forward, linear._joint


def _forward(self: Any, x: Tensor) -> Tensor:
    """A linear's output; with the first call come those of the whole group, which wait for theirs."""
    linears, number, waiting = self._joint
    if not waiting:
        waiting.update(enumerate(_outputs(linears, x)))
    return waiting.pop(number)


def _outputs(linears: Sequence[Any], x: Tensor) -> list[Tensor]:
    weights = [m.effective_weight() if isinstance(m, EffectiveLinear) else m.weight for m in linears]
    bias = None if linears[0].bias is None else torch.cat([m.bias for m in linears])
    joint = nn.functional.linear(x, torch.cat(weights), bias)
    outputs = list(joint.split([len(weight) for weight in weights], -1))
    for number, linear in enumerate(linears):
        for branch in getattr(linear, "branches", ()):
            outputs[number] = outputs[number] + branch(x).to(joint.dtype)
    return outputs


def _fit_together(linears: Sequence[Any]) -> bool:
    """Whether there are several, all storing [out, in], and all with a bias or none."""
    rows = all(type(m) is nn.Linear or (isinstance(m, EffectiveLinear) and not m.transposed) for m in linears)
    return len(linears) > 1 and rows and len({m.bias is None for m in linears}) == 1
