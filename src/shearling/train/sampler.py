"""The order in which windows are read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shearling.data import Domains

#: the golden ratio's fraction, in units of 2^-64
_GOLDEN = 0x9E3779B97F4A7C15


def derived_seed(seed: int, *what: object) -> int:
    """A 63-bit seed for one purpose of a run; neighbouring steps get unrelated ones."""
    digest = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class WindowSampler:
    """Indices of windows: one permutation an epoch, drawn from the seed and the epoch alone.

    A batch may run over the end of an epoch; no window is read twice or left out within one. As a run's sampler it has
    no domains: no ``weights``, no ``notices``, no metrics.
    """

    def __init__(self, count: int, seed: int) -> None:
        assert count > 0
        self.weights: dict[str, float] = {}
        self.notices: Sequence[str] = ()
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

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._permutation()

    def _permutation(self) -> Tensor:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "epoch", self.epoch))
        return torch.randperm(self.count, generator=generator)


class MixtureSampler:
    """Indices of windows of several domains: by ``weights`` which one, and then the next of its own permutation.

    Window m of a run falls to the domain in whose part of [0, 1) the point frac(x + m g) lies; g is the golden ratio, x
    depends on the seed alone and is uniform over seeds, so that a window is of a domain with the probability that is
    the domain's weight. Of n windows in a row, wherever they begin, each domain gets its share but for O(log n) windows
    (Kuipers and Niederreiter, Uniform Distribution of Sequences, chapter 2, theorem 3.4), where independent draws miss
    it by O(sqrt n). ``weights`` may be replaced between two batches. ``notices`` says which domains the last batch has
    read to their end.
    """

    def __init__(self, domains: Domains, seed: int) -> None:
        self.weights: dict[str, float] = dict(domains.weights)
        self.notices: Sequence[str] = ()
        self.drawn = 0
        self._length = domains.shape[1]
        # all 64 bits, of which a seed has 63
        self._origin = derived_seed(seed, "domains") << 1
        self._starts = domains.starts
        self._orders = {
            name: WindowSampler(count, derived_seed(seed, "domain", name))
            for name, count in zip(domains.names, domains.counts, strict=True)
        }

    def take(self, batch: int) -> Tensor:
        """The next ``batch`` indices, int64."""
        chosen = self._choose(batch)
        self.drawn += batch
        notices: list[str] = []
        indices = torch.empty(batch, dtype=torch.int64)
        for number, (name, order) in enumerate(self._orders.items()):
            own = chosen == number
            if not own.any():
                continue
            before = order.epoch
            indices[own] = self._starts[number] + order.take(int(own.sum()))
            for epoch in range(before + 1, order.epoch + 1):
                notices.append(f"domain {name!r}: all {order.count} windows were read, epoch {epoch + 1} begins")
        self.notices = notices
        return indices

    def metrics(self) -> dict[str, float]:
        """The weights, and the tokens read so far, of every domain."""
        weights = {f"weight/{name}": weight for name, weight in self.weights.items()}
        read = {name: order.epoch * order.count + order.position for name, order in self._orders.items()}
        return weights | {f"tokens/{name}": count * self._length for name, count in read.items()}

    def state_dict(self) -> dict[str, Any]:
        orders = {name: order.state_dict() for name, order in self._orders.items()}
        return {"drawn": self.drawn, "weights": self.weights, "orders": orders}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn, self.weights = state["drawn"], state["weights"]
        for name, order in self._orders.items():
            order.load_state_dict(state["orders"][name])

    def _choose(self, batch: int) -> Tensor:
        """Numbers [batch] of the domains that the next windows are of."""
        # whole numbers, since a fraction of a large product has few digits left
        points = [(self._origin + m * _GOLDEN) % (1 << 64) >> 11 for m in range(self.drawn, self.drawn + batch)]
        ends = torch.tensor([self.weights[name] for name in self._orders], dtype=torch.float64).cumsum(0)
        # scaled so that the last end is 1, which no point reaches
        return torch.searchsorted(ends / ends[-1], torch.tensor(points).double() / (1 << 53), right=True)
