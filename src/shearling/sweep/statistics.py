"""What a sweep collects of one block. Shapes: N tokens, D width of a linear's input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Moments:
    """Running sums over the inputs x_ND of a linear: sum, sum of squares, optionally the Gram matrix x^T x.

    Sums are float64, the Gram matrix float32 without TF32.
    """

    def __init__(self, gram: bool = False) -> None:
        self.count = 0
        self.sum: Tensor | None = None
        self.square: Tensor | None = None
        self.gram: Tensor | None = None
        self._with_gram = gram

    def __call__(self, x_ND: Tensor) -> None:
        """Add the rows of x."""
        width, device = x_ND.shape[1], x_ND.device
        if self.sum is None:
            self.sum = torch.zeros(width, dtype=torch.float64, device=device)
            self.square = torch.zeros(width, dtype=torch.float64, device=device)
            self.gram = torch.zeros(width, width, device=device) if self._with_gram else None
        self.count += len(x_ND)
        self.sum += x_ND.sum(0, dtype=torch.float32)
        if self.gram is None:
            self.square += torch.linalg.vector_norm(x_ND, dim=0, dtype=torch.float32).double().square_()
        else:
            add_product_(self.gram, x_ND, x_ND)

    def result(self) -> InputStatistics:
        """The sums so far, on the CPU."""
        assert self.sum is not None and self.square is not None, "nothing was collected"
        square = self.square if self.gram is None else self.gram.diagonal().double()
        gram = None if self.gram is None else self.gram.cpu()
        return InputStatistics(self.count, self.sum.cpu(), square.cpu(), gram)


def add_product_(total: Tensor, a_NI: Tensor, b_NJ: Tensor) -> None:
    """total_IJ += a^T b with float32 sums. Half-precision inputs multiply on tensor cores, exactly, into float32."""
    if a_NI.is_cuda and a_NI.dtype == b_NJ.dtype and a_NI.dtype in (torch.bfloat16, torch.float16):
        total += torch.mm(a_NI.T, b_NJ, out_dtype=torch.float32)
    else:
        total.addmm_(a_NI.T.float(), b_NJ.float())


class Magnitudes:
    """Running sum over sequences of (mean over the T tokens of one of a unit's size)^2, float64.

    A unit is ``width`` consecutive inputs of a linear, its size their L2 norm: one channel, or the elements of a head.
    """

    def __init__(self, length: int, width: int = 1) -> None:
        self.length, self.width = length, width
        self.square: Tensor | None = None

    def __call__(self, x_ND: Tensor) -> None:
        """Add whole sequences, one after the other in the rows of x; N is a multiple of T."""
        x = x_ND.unflatten(0, (-1, self.length))
        if self.width > 1:
            x = torch.linalg.vector_norm(x.unflatten(-1, (-1, self.width)), dim=-1, dtype=torch.float32)
        mean = torch.linalg.vector_norm(x, ord=1, dim=1, dtype=torch.float32).double() / self.length
        square = mean.square_().sum(0)
        self.square = square if self.square is None else self.square + square

    def result(self) -> Tensor:
        """Root of the sum of each unit, on the CPU."""
        assert self.square is not None, "nothing was collected"
        return self.square.sqrt().cpu()


class Angles:
    """Running sums of the angles between a block's inputs and outputs, as a share of pi, and of their cosines."""

    def __init__(self) -> None:
        self.count = 0
        self._total: Tensor | None = None
        self._cosines: Tensor | None = None

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Add the tokens of x and y, [B, T, hidden]."""
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        dot = torch.linalg.vecdot(x.float(), y.float())
        norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) * torch.linalg.vector_norm(
            y, dim=-1, dtype=torch.float32
        )
        # a zero state has no direction: it counts as a right angle, as in the released code
        cosine = torch.where(norms > 0, dot / norms, 0.0).clamp_(-1, 1)
        cosines = cosine.sum(dtype=torch.float64)
        total = cosine.arccos_().sum(dtype=torch.float64) / math.pi
        self._total = total if self._total is None else self._total + total
        self._cosines = cosines if self._cosines is None else self._cosines + cosines
        self.count += len(x)

    @property
    def mean(self) -> float:
        """Mean angle over all tokens, in [0, 1]."""
        assert self._total is not None, "nothing was collected"
        return self._total.item() / self.count

    @property
    def influence(self) -> float:
        """1 minus the mean cosine over all tokens, in [0, 2] (block influence, ShortGPT, arXiv 2403.03853, Eq. 1)."""
        assert self._cosines is not None, "nothing was collected"
        return 1 - self._cosines.item() / self.count


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Sums over ``count`` inputs of a linear: ``sum`` and ``square`` [D] float64, ``gram`` [D, D] float32 or None."""

    count: int
    sum: Tensor
    square: Tensor
    gram: Tensor | None = None

    def to(self, device: torch.device | str) -> InputStatistics:
        """The same sums on a device."""
        gram = None if self.gram is None else self.gram.to(device)
        return InputStatistics(self.count, self.sum.to(device), self.square.to(device), gram)

    @property
    def norm(self) -> Tensor:
        """Root of the mean square of each input, [D]."""
        return (self.square / self.count).sqrt()

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def variance(self) -> Tensor:
        """Variance of each input over the tokens, [D]."""
        return (self.square / self.count - self.mean.square()).clamp(min=0)


@dataclass(frozen=True, eq=False)
class BlockStatistics:
    """One block: mean angle between its input and output, and the inputs of its two output projections."""

    angle: float
    ffn: InputStatistics
    attention: InputStatistics

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and string metadata for a safetensors file."""
        tensors = {}
        for part in ("ffn", "attention"):
            inputs: InputStatistics = getattr(self, part)
            tensors |= {f"{part}.sum": inputs.sum, f"{part}.square": inputs.square}
            if inputs.gram is not None:
                tensors[f"{part}.gram"] = inputs.gram
        meta = {"angle": self.angle.hex(), "ffn": str(self.ffn.count), "attention": str(self.attention.count)}
        return tensors, meta

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> BlockStatistics:
        def part(name: str) -> InputStatistics:
            gram = tensors.get(f"{name}.gram")
            return InputStatistics(int(meta[name]), tensors[f"{name}.sum"], tensors[f"{name}.square"], gram)

        return cls(float.fromhex(meta["angle"]), part("ffn"), part("attention"))
