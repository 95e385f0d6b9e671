"""A 2:4 linear that takes the fastest way for as many tokens as it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shearling.errors import ShearlingError
from shearling.runtime.paths import COPIES, Branch, Copy, Path, bytes_of, product


class Route(NamedTuple):
    """The way for up to so many tokens."""

    tokens: int
    path: Path


class RoutedLinear(nn.Module):
    """Stands in for a linear with a 2:4 weight, in evaluation; holds the copies of the weight that its routes read.

    ``routes`` are in rising order; more tokens than the last one's take it too. It stays on its device and in its
    type, and has no gradient and no state to save: asked for that it raises ShearlingError.
    """

    def __init__(
        self,
        copies: Mapping[str, Copy],
        routes: Sequence[Route],
        bias: Tensor | None,
        branch: Branch | None = None,
    ) -> None:
        super().__init__()
        assert {COPIES[route.path.name] for route in routes} <= copies.keys(), (routes, list(copies))
        self.routes = tuple(routes)
        self.copies = dict(copies)
        self.bias = bias
        self.branch = branch
        self.eval()

    @property
    def bytes(self) -> int:
        """What the copies of the weight hold in memory."""
        return sum(bytes_of(copy) for copy in self.copies.values())

    def path(self, tokens: int) -> Path:
        """The way for so many tokens."""
        for route in self.routes:
            if tokens <= route.tokens:
                return route.path
        return self.routes[-1].path

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x_MI = x.reshape(-1, x.shape[-1]).contiguous()
        path = self.path(x_MI.shape[0])
        y_MO = product(path, x_MI, self.copies[COPIES[path.name]], self.branch)
        if self.bias is not None:
            y_MO += self.bias
        return y_MO.view(*x.shape[:-1], y_MO.shape[-1])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise ShearlingError(f"{prefix.rstrip('.')}: is accelerated and has no weight to save; save the model before")
