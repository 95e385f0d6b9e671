"""Sparsity patterns: which weights of a matrix stay. O outputs, I inputs; a higher score stays."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shearling.errors import ShearlingError
from shearling.recipe import pattern_numbers

#: up to so many scores, comparing each with each is faster than sorting
PAIRWISE = 8


@dataclass(frozen=True)
class Pattern:
    """``keep`` of every ``of`` consecutive weights along the input stay, as 2 of 4 in 2:4."""

    keep: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """``"2:4"`` and the like; ShearlingError for anything else."""
        numbers = pattern_numbers(text)
        if numbers is None:
            raise ShearlingError(f"pattern {text!r}: must be N:M with 0 < N < M, such as 2:4")
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    def mask(self, score_OI: Tensor) -> Tensor:
        """The weights that stay, bool [O, I]; of equal scores the lower index stays.

        Raises ShearlingError where the groups do not fill the inputs.
        """
        self.check(score_OI.shape[1])
        return highest(score_OI.unflatten(1, (-1, self.of)), self.keep).flatten(1)

    def check(self, inputs: int) -> None:
        """ShearlingError unless groups of ``of`` fill ``inputs``."""
        if inputs % self.of:
            raise ShearlingError(
                f"pattern {self}: {inputs} inputs are no multiple of {self.of}; choose another pattern"
            )


def row_mask(score_OI: Tensor, sparsity: float) -> Tensor:
    """Unstructured: each output loses the same whole number of its weights, bool [O, I]; ties as in ``Pattern``."""
    return highest(score_OI, num_kept(sparsity, score_OI.shape[1]))


def mask_of(score_OI: Tensor, pattern: Pattern | float) -> Tensor:
    """What stays, bool [O, I], under an N:M pattern or where a share of each row goes."""
    return pattern.mask(score_OI) if isinstance(pattern, Pattern) else row_mask(score_OI, pattern)


def num_kept(pattern: Pattern | float, inputs: int) -> int:
    """How many weights of a row stay; ``pattern`` is the share that goes where it is no pattern.

    ShearlingError as ``Pattern.check``.
    """
    if isinstance(pattern, float):
        return inputs - round(pattern * inputs)
    pattern.check(inputs)
    return inputs // pattern.of * pattern.keep


def highest(score: Tensor, keep: int) -> Tensor:
    """True at the ``keep`` highest scores along the last dimension; of equal ones at the first."""
    if score.shape[-1] <= PAIRWISE:
        return torch.stack(highest_of(score.unbind(-1), keep), -1)
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    return torch.zeros(score.shape, dtype=torch.bool, device=score.device).scatter_(-1, order, True)


def highest_of(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Where each of several tensors is among the ``keep`` highest; of equal ones the first. For few tensors."""
    ranks = [torch.zeros(scores[0].shape, dtype=torch.uint8, device=scores[0].device) for _ in scores]
    for first, second in itertools.combinations(range(len(scores)), 2):
        beaten = scores[second] > scores[first]
        ranks[first] += beaten
        ranks[second] += ~beaten
    return [rank < keep for rank in ranks]
