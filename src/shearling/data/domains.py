"""Named corpora that are read as one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from shearling.data.windows import MemoryWindows, Windows
from shearling.errors import ShearlingError, check_domains


class Domains:
    """Windows [n, length] of named domains as one ``Windows``: those of the first domain, then those of the next.

    ``weights`` (by default the roots of the domains' sizes) are the proportions in which they are drawn at first; they
    are scaled to sum 1. In equal parts a small domain is read over and over, by sizes it is hardly read at all.
    Raises ShearlingError for no domain, one without windows, lengths that differ, and weights that name other domains,
    are below 0 or not finite, or are all 0.
    """

    def __init__(self, parts: Mapping[str, Tensor | Windows], weights: Mapping[str, float] | None = None) -> None:
        self.parts: dict[str, Windows] = {
            name: MemoryWindows(part) if isinstance(part, Tensor) else part for name, part in parts.items()
        }
        if not self.parts:
            raise ShearlingError("domains: there are none; give at least one")
        for name, part in self.parts.items():
            if len(part.shape) != 2 or not len(part):
                raise ShearlingError(
                    f"domain {name!r}: shape {part.shape}; must be [windows, tokens] with at least one window"
                )
        for name, part in self.parts.items():
            if part.shape[1] != self.shape[1]:
                raise ShearlingError(f"domain {name!r}: {part.shape[1]} tokens a window, others have {self.shape[1]}")
        roots = {name: math.sqrt(len(part)) for name, part in self.parts.items()}
        self.weights = _shares(roots if weights is None else weights, self.names)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.parts)

    @property
    def counts(self) -> tuple[int, ...]:
        """Windows of each domain."""
        return tuple(len(part) for part in self.parts.values())

    @property
    def starts(self) -> tuple[int, ...]:
        """Index of each domain's first window."""
        return (0, *accumulate(self.counts[:-1]))

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.counts), next(iter(self.parts.values())).shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Windows [len(indices), length], int64."""
        found = torch.empty(len(indices), self.shape[1], dtype=torch.int64)
        for start, part in zip(self.starts, self.parts.values(), strict=True):
            own = (indices >= start) & (indices < start + len(part))
            if own.any():
                found[own] = part[indices[own] - start].long()
        return found

    def token_range(self) -> tuple[int, int]:
        """Lowest and highest token id."""
        lows, highs = zip(*(part.token_range() for part in self.parts.values()), strict=True)
        return min(lows), max(highs)

    def digest(self) -> str:
        """What tells these windows from others, whatever their domains are called and weigh."""
        return hashlib.sha256(repr([part.digest() for part in self.parts.values()]).encode()).hexdigest()


def _shares(weights: Mapping[str, float], names: tuple[str, ...]) -> dict[str, float]:
    check_domains("weights", weights, names)
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ShearlingError(f"weights: domain {name!r} has {weight}; must be a finite number, 0 or more")
    total = math.fsum(weights.values())
    if not total:
        raise ShearlingError("weights: all are 0; one must be above")
    return {name: weights[name] / total for name in names}
