"""Weight transforms: modules that map a weight to the weight that the product uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shearling.nn.linear import EffectiveLinear
from shearling.plan import Grid, dequantise


class MaskTransform(nn.Module):
    """Zeroes the weights where ``mask`` is False.

    ``mask``: bool, the weight's shape in its stored orientation; a buffer, so it is saved with the model. Replaced
    weights are +0.0 and get no gradient (a straight-through estimator is another transform).
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.bool())

    def forward(self, weight: Tensor) -> Tensor:
        assert weight.shape == self.mask.shape, f"mask {tuple(self.mask.shape)}, weight {tuple(weight.shape)}"
        # a product would leave -0.0 behind, which 2:4 compressors take for a kept weight
        return torch.where(self.mask, weight, 0.0)


class FakeQuantTransform(nn.Module):
    """Rounds the weight of ``linear`` to the grid that covers it as it is now; gradients pass straight through.

    Keeps neither parameters nor buffers. The product sees exactly what ``grid.quantise`` and ``dequantise`` give, in
    the weight's type. Append it after a mask, whose zeros it keeps and whose groups then have finer scales.
    Raises ShearlingError where the grid's groups do not fill the linear's inputs.
    """

    def __init__(self, grid: Grid, linear: EffectiveLinear) -> None:
        super().__init__()
        grid.check(linear.in_features)
        self.grid = grid
        self.transposed = linear.transposed

    def forward(self, weight: Tensor) -> Tensor:
        stored = weight.detach()
        rounded = dequantise(*self.grid.quantise(stored.T if self.transposed else stored), weight.dtype)
        return _StraightThrough.apply(weight, rounded.T if self.transposed else rounded)

    def extra_repr(self) -> str:
        return f"{self.grid.format}, group={self.grid.group}"


class _StraightThrough(torch.autograd.Function):
    """The second tensor to the bit, its gradient to the first; ``w + (q - w).detach()`` would lean on rounding."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        return grad, None
