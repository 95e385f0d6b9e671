"""Additive branches: modules whose output is added to a linear's."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Branch(nn.Module):
    """What a branch offers: ``forward(x) -> y`` and the one matrix that does the same."""

    def forward(self, x: Tensor) -> Tensor:
        """Addition to the linear's output: [..., in] -> [..., out]."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """The branch as a float64 matrix [out, in]."""
        raise NotImplementedError


class LoRABranch(Branch):
    """``y = alpha / rank * up (down x)``: ``down`` [rank, in], ``up`` [out, rank], float32.

    ``down`` starts Kaiming-uniform from torch's global generator and ``up`` at zero, so that the branch starts at
    zero (Hu et al. 2021, section 4.1, where they are A and B).
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.scale = alpha / rank
        # drawn on the CPU, so that a seed means the same on every device
        down = nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5))
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(out_features, rank, device=device))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x.to(self.down.dtype), self.down), self.up) * self.scale

    def matrix(self) -> Tensor:
        return self.scale * (self.up.double() @ self.down.double())

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"
