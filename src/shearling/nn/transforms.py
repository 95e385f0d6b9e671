"""Weight transforms: modules that map a weight to the weight that the product uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
