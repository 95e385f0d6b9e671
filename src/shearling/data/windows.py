"""Packed windows of a token stream."""

from __future__ import annotations

import hashlib

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


def tokens_digest(tokens: Tensor) -> str:
    """SHA-256 of a token tensor's shape and content."""
    return hashlib.sha256(repr(tuple(tokens.shape)).encode() + tokens.cpu().numpy().tobytes()).hexdigest()
