"""The order in which windows are read."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derived_seed(seed: int, *what: object) -> int:
    """A 63-bit seed for one purpose of a run; neighbouring steps get unrelated ones."""
    digest = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class WindowSampler:
    """Indices of windows: one permutation an epoch, drawn from the seed and the epoch alone.

    A batch may run over the end of an epoch; no window is read twice or left out within one.
    """

    def __init__(self, count: int, seed: int) -> None:
        assert count > 0
        self.count = count
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._order = self._permutation()

    def take(self, batch: int) -> Tensor:
        """The next ``batch`` indices, int64."""
        parts = []
        while batch:
            if self.position == self.count:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._permutation()
            part = self._order[self.position : self.position + batch]
            parts.append(part)
            batch -= len(part)
            self.position += len(part)
        return torch.cat(parts)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._permutation()

    def _permutation(self) -> Tensor:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "epoch", self.epoch))
        return torch.randperm(self.count, generator=generator)
