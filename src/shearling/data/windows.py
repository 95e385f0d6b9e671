"""Packed windows of a token stream."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor

from shearling.errors import ShearlingError


def windows(tokens: Tensor, num: int | None, length: int, *, seed: int | None = None) -> Tensor:
    """``num`` windows [num, length] of a stream [N] that do not overlap; all that fit where ``num`` is None.

    Without a seed the first ones, in order; with one, a draw without replacement.
    Raises ShearlingError when the stream is too short.
    """
    available = len(tokens) // length
    wanted = available if num is None else num
    if available < max(wanted, 1):
        raise ShearlingError(
            f"text: {len(tokens)} tokens are too few for {max(wanted, 1)} windows of {length} "
            f"({max(wanted, 1) * length} needed); give more text, or fewer or shorter sequences"
        )
    stacked = tokens[: available * length].view(available, length)
    if seed is None:
        return stacked[:wanted].clone()
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return stacked[order[:wanted]]


def spread(windows: Tensor | Windows, num: int) -> Tensor:
    """``num`` windows [num, length] at even distances, from the first to the last; all where there are no more."""
    last = len(windows) - 1
    return windows[torch.linspace(0, last, min(num, last + 1), dtype=torch.float64).round().long()]


class Windows(Protocol):
    """Windows [num, length] of tokens, wherever they lie."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Windows [len(indices), length]."""
        ...

    def token_range(self) -> tuple[int, int]:
        """Lowest and highest token id."""
        ...

    def digest(self) -> str:
        """What tells these windows from others."""
        ...


class MemoryWindows:
    """Windows that a tensor [num, length] holds."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tokens.shape)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.tokens[indices]

    def token_range(self) -> tuple[int, int]:
        return int(self.tokens.min()), int(self.tokens.max())

    def digest(self) -> str:
        return tokens_digest(self.tokens.long())


def tokens_digest(tokens: Tensor) -> str:
    """SHA-256 of a token tensor's shape and content."""
    return hashlib.sha256(repr(tuple(tokens.shape)).encode() + tokens.cpu().numpy().tobytes()).hexdigest()
