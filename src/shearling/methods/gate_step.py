"""What a step of methods/sheared_llama.py does to gates: of all spaces at once, on tensors that stay the same.

So it is few operations, and a CUDA graph may repeat them: whatever changes between steps is written into a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from shearling.methods.hard_concrete import sample, share_closed
from shearling.train import join


class GateStep:
    """Draws gates, and carries the gradients of what they multiply on to them.

    ``shapes`` are those of the gates of every space, a row's units along the last axis; ``queries`` are the query heads
    of a KV group. ``log_alpha``, ``noise`` [N] hold all spaces one after the other (``parts`` tells them apart),
    ``goals`` [R] all rows, and ``multipliers`` [S, 2] lam1 and lam2. ``leaves`` are what multiplies in the model, by
    kind and row: their gradients add up over a batch. All tensors are zero at first, leaves are one.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], queries: int, corrected: bool, device: Any) -> None:
        self._shapes, self._queries, self._corrected = dict(shapes), queries, corrected
        #: rows of every space
        self.rows = {space: prod(shape[:-1]) for space, shape in shapes.items()}
        count, rows = sum(map(prod, shapes.values())), sum(self.rows.values())
        self.log_alpha, self.noise = torch.zeros(count, device=device), torch.zeros(count, device=device)
        self.multipliers = torch.zeros(len(shapes), 2, device=device)
        self.goals = torch.zeros(rows, device=device)
        # a mean over all rows, each weighed by its space's entry [R, S], is the sum of the means over a space's rows
        self._weights = torch.block_diag(*(torch.full((n, 1), rows / n) for n in self.rows.values())).to(device)
        #: what ``learn`` finds: the gradients of log-alphas and multipliers, the mean share of every space that is
        #: closed, and the Lagrangian without the loss
        self.slopes, self.multiplier_slopes = torch.zeros_like(self.log_alpha), torch.zeros_like(self.multipliers)
        self.closed, self.lagrangian = torch.zeros(len(shapes), device=device), torch.zeros((), device=device)
        kinds = self._by_kind(self.parts(torch.ones_like(self.log_alpha)))
        self.leaves: dict[str, list[Any]] = {
            kind: [row.clone().requires_grad_() for row in gates] for kind, gates in kinds.items()
        }
        leaves = [leaf for rows in self.leaves.values() for leaf in rows]
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf)
        self._values, self._gradients = [leaf.data for leaf in leaves], [leaf.grad for leaf in leaves]

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat tensor, shaped as the gates of every space."""
        parts = flat.split([prod(shape) for shape in self._shapes.values()])
        return {space: part.view(shape) for part, (space, shape) in zip(parts, self._shapes.items(), strict=True)}

    @torch.no_grad()
    def draw(self) -> None:
        """Let the model multiply gates drawn with ``noise``."""
        self.show(self.parts(sample(self.log_alpha, self.noise)))

    @torch.no_grad()
    def show(self, gates: Mapping[str, Tensor]) -> None:
        """Let the model multiply these gates, whose gradients begin anew."""
        torch._foreach_copy_(self._values, [row for rows in self._by_kind(gates).values() for row in rows.unbind()])
        torch._foreach_zero_(self._gradients)

    def learn(self) -> None:
        """Gradients of the loss, with gates as ``draw`` drew them, plus the penalties."""
        log_alpha, multipliers = self.log_alpha.detach().requires_grad_(), self.multipliers.detach().requires_grad_()
        # drawn again, since a graph that is captured cannot begin in another
        drawn = self._by_kind(self.parts(sample(log_alpha, self.noise)))
        above = [join().mean_(torch.stack([leaf.grad for leaf in self.leaves[kind]])) for kind in drawn]
        parts = self.parts(share_closed(log_alpha, corrected=self._corrected))
        shares = torch.cat([part.mean(-1).flatten() for part in parts.values()])
        # sums, and no indices: their gradients are summed in no certain order on a GPU
        lagrangian = penalty(shares, self.goals, (self._weights[..., None] * multipliers).sum(1))
        slopes = torch.autograd.grad(
            [*drawn.values(), lagrangian], [log_alpha, multipliers], [*above, torch.ones_like(lagrangian)]
        )
        self.slopes.copy_(slopes[0])
        self.multiplier_slopes.copy_(slopes[1])
        self.closed.copy_((self._weights * shares.detach()[:, None]).mean(0))
        self.lagrangian.copy_(lagrangian.detach())

    def _by_kind(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gates by what they multiply, in rows: ``hidden`` [1, D], ``layers`` [L], ``ffn`` [L, F], ``heads`` [L, H]."""
        found = {kind: gates[kind] for kind in ("layers", "ffn") if kind in gates}
        if "hidden" in gates:
            found["hidden"] = gates["hidden"][None]
        groups, heads = gates.get("kv_group"), gates.get("query_head")
        if heads is not None:
            found["heads"] = (heads if groups is None else heads * groups[..., None]).flatten(1)
        elif groups is not None:
            found["heads"] = groups.repeat_interleave(self._queries, dim=1)
        return found


def penalty(share: Tensor, goal: float | Tensor, multipliers: Tensor) -> Tensor:
    """Mean over rows of lam1 (s - t) + lam2 (s - t)^2; multipliers [2], or [rows, 2]."""
    off = share - goal
    return (multipliers[..., 0] * off + multipliers[..., 1] * off.square()).mean()
