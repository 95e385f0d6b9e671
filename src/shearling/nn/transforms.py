"""Weight transforms: modules that map a weight to the weight that the product uses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from shearling.nn.linear import EffectiveLinear
from shearling.plan import Grid, dequantise


class MaskTransform(nn.Module):
    """Zeroes the weights where ``mask`` is False.

    ``mask``: bool, the weight's shape in its stored orientation; a buffer, so it is saved with the model. Replaced
    weights are +0.0 and get no gradient.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.bool())

    def forward(self, weight: Tensor) -> Tensor:
        assert weight.shape == self.mask.shape, f"mask {tuple(self.mask.shape)}, weight {tuple(weight.shape)}"
        # a product would leave -0.0 behind, which 2:4 compressors take for a kept weight
        return torch.where(self.mask, weight, 0.0)


class StraightMask(MaskTransform):
    """As MaskTransform, with a straight-through estimator: every weight gets the gradient, so any may come back."""

    def forward(self, weight: Tensor) -> Tensor:
        assert weight.shape == self.mask.shape, f"mask {tuple(self.mask.shape)}, weight {tuple(weight.shape)}"
        return _StraightThrough.apply(weight, torch.where(self.mask, weight.detach(), 0.0))


class InputGate(nn.Module):
    """Multiplies what a linear reads: each of the ``gates`` [units] the weights of ``width`` inputs that lie together.

    Neither parameter nor buffer: whoever holds the tensor writes into it, and reads its gradient.
    """

    def __init__(self, gates: Tensor, width: int, transposed: bool) -> None:
        super().__init__()
        self.gates, self.width, self.transposed = gates, width, transposed

    def forward(self, weight: Tensor) -> Tensor:
        each = self.gates.repeat_interleave(self.width)
        return weight * (each[:, None] if self.transposed else each)


class SoftThreshold(MaskTransform):
    """S-STE (arXiv 2409.09099): a group's weights move towards zero by the greatest size that must go, times a scale.

    ``keep`` of every ``of`` weights along the input stay, for a weight stored [out, in], or [in, out] where
    ``transposed``. The map is continuous, so no weight ever jumps; its gradient is straight-through. ``scale`` is
    <W, S> / |S|^2 of the weight it starts from, which makes that product the least wrong. ``mask`` is not used here: it
    says what stayed when somebody looked last.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, mask: Tensor, keep: int, of: int, transposed: bool) -> None:
        super().__init__(mask)
        self.keep, self.of, self.transposed = keep, of, transposed
        dense = weight.detach().double()
        soft = self._threshold(dense)
        self.register_buffer("scale", ((dense * soft).sum() / soft.square().sum()).to(weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, self.scale * self._threshold(weight.detach()))

    def _threshold(self, weight: Tensor) -> Tensor:
        rows = weight.T if self.transposed else weight
        groups = rows.unflatten(1, (-1, self.of))
        size = groups.abs()
        least = size.sort(dim=-1, descending=True).values[..., self.keep : self.keep + 1]
        # positive zeros, whatever the sign of the weight
        soft = torch.where(size > least, groups - least.copysign(groups), 0.0).flatten(1)
        return soft.T if self.transposed else soft


class MultiplicativeAdapter(nn.Module):
    """SPP (arXiv 2405.16057): ``W + scale * W . (repeat(A) . b)``, whose zeros are those of the weight.

    For the weight of ``linear``, whose outputs ``rank`` divides. ``A`` [rank, in] starts Kaiming-uniform from torch's
    global generator, and each of its rows is repeated for out / rank consecutive outputs; ``b`` [out, 1] starts at
    zero, which leaves the weight as it is to the bit. Both are float32, the result has the weight's type. A weight of
    +0.0 stays that.
    """

    def __init__(self, linear: EffectiveLinear, rank: int, scale: float) -> None:
        super().__init__()
        outputs, device = linear.out_features, linear.weight.device
        assert outputs % rank == 0, f"rank {rank}, {outputs} outputs"
        self.scale = scale
        self.transposed = linear.transposed
        # drawn on the CPU, so that a seed means the same on every device
        drawn = nn.init.kaiming_uniform_(torch.empty(rank, linear.in_features), a=math.sqrt(5))
        self.A = nn.Parameter(drawn.to(device))
        self.b = nn.Parameter(torch.zeros(outputs, 1, device=device))

    def forward(self, weight: Tensor) -> Tensor:
        groups = (len(self.A), -1)
        rows = (weight.T if self.transposed else weight).unflatten(0, groups)
        change = self.A[:, None] * (self.scale * self.b).unflatten(0, groups)
        # a sum, since a zero times 1 + change may be -0.0
        adapted = (rows + rows * change).flatten(0, 1).to(weight.dtype)
        return adapted.T if self.transposed else adapted

    def extra_repr(self) -> str:
        return f"rank={len(self.A)}, scale={self.scale:g}"


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
