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

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The branch as one matrix [out, in], computed in ``dtype``."""
        raise NotImplementedError


class LowRankBranch(Branch):
    """``y = scale * up (down x)`` from given factors: ``down`` [rank, in], ``up`` [out, rank], copied as float32.

    Either factor stays as it is where no policy of the training loop names it.
    """

    def __init__(self, down: Tensor, up: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        assert down.shape[0] == up.shape[1], f"down {tuple(down.shape)}, up {tuple(up.shape)}"
        self.scale = scale
        self.down = nn.Parameter(_own(down))
        self.up = nn.Parameter(_own(up))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x.to(self.down.dtype), self.down), self.up) * self.scale

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.scale * (self.up.to(dtype) @ self.down.to(dtype))

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"


class LoRABranch(LowRankBranch):
    """``y = alpha / rank * up (down x)``, starting at zero.

    ``down`` starts Kaiming-uniform from torch's global generator and ``up`` at zero (Hu et al. 2021, section 4.1,
    where they are A and B).
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float, device: torch.device | None = None
    ) -> None:
        # drawn on the CPU, so that a seed means the same on every device
        down = nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5))
        super().__init__(down.to(device), torch.zeros(out_features, rank, device=device), alpha / rank)


def _own(factor: Tensor) -> Tensor:
    # training writes into parameters, and an edit that the factor came from must not change
    return factor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
