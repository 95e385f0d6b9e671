"""Grids: the values that a quantised weight may take, and the codes that name them.

O outputs, I inputs, G groups along the input, i inputs of one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shearling.errors import ShearlingError

#: first code, last code and their type; codes that start at 0 have a zero point in every group
FORMATS: dict[str, tuple[int, int, torch.dtype]] = {
    "int4": (-8, 7, torch.int8),
    "int8": (-128, 127, torch.int8),
    "uint4": (0, 15, torch.uint8),
    "uint8": (0, 255, torch.uint8),
    "float8_e4m3": (-448, 448, torch.float8_e4m3fn),
}
#: stretches a group with a zero point by more than float32 loses, so that its two ends never round inward together
REACH = 1 + 2**-20


class Codes(NamedTuple):
    """A weight on a grid as a ``Quant`` edit holds it: codes [O, I], scales (float32) and zeros [O, G]."""

    codes_OI: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor


@dataclass(frozen=True)
class Grid:
    """A format of ``FORMATS``, with its own scale for every ``group`` weights along the input (None: for every row).

    Raises ShearlingError for a format that is not there and a group below 1.
    """

    format: str
    group: int | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ShearlingError(f"grid {self.format!r}: there is no such format; formats are {', '.join(FORMATS)}")
        if self.group is not None and self.group < 1:
            raise ShearlingError(f"grid {self.format}: a group of {self.group} is empty; it must be 1 or more, or None")

    @property
    def has_zeros(self) -> bool:
        """Whether every group has a zero point of its own."""
        return FORMATS[self.format][0] == 0

    @property
    def bits(self) -> int:
        """Of a stored code."""
        return 4 if self.format.endswith("int4") else 8

    def check(self, inputs: int) -> None:
        """ShearlingError unless groups fill ``inputs``."""
        if self.group is not None and inputs % self.group:
            raise ShearlingError(
                f"grid {self.format}: {inputs} inputs are no multiple of its group of {self.group}; "
                f"choose a group that divides them, or None for one a row"
            )

    @torch.no_grad()
    def quantise(self, weight_OI: Tensor) -> Codes:
        """The weight rounded to the nearest values of the grid that covers it, computed in float32.

        Nothing is clipped by more than half a step. 0 is on every grid and comes back as 0. The weight that the codes
        stand for gives the same codes and zeros again, and scales within 3e-7 of these. Stored in bfloat16, or in
        float16 where no step is subnormal there, it gives the same codes and zeros still, and scales as near as that
        type rounds; only ``uint8`` is too fine for bfloat16. A group too small for a normal float32 scale becomes 0
        with scale 1, and one with a NaN or an infinity gives values that are not finite.
        Raises ShearlingError where the groups do not fill the inputs.
        """
        scales_OG, zeros_OG = self.cover(weight_OI)
        return Codes(self.round(weight_OI, scales_OG, zeros_OG), scales_OG, zeros_OG)

    @torch.no_grad()
    def cover(self, weight_OI: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Scales (float32) and zeros [O, G] of the grid that covers a share of every group's range and clips the rest.

        Raises ShearlingError where the groups do not fill the inputs.
        """
        inputs = weight_OI.shape[1]
        self.check(inputs)
        first, last, dtype = FORMATS[self.format]
        weight_OGi = weight_OI.float().unflatten(1, (-1, self.group or inputs))
        high_OG = weight_OGi.amax(-1).clamp(min=0) * share
        low_OG = weight_OGi.amin(-1).clamp(max=0) * share
        if first:
            # the smallest step that clips nothing: integers have one code more on the negative side
            scales_OG = _divisor(torch.maximum(high_OG / last, low_OG / first))
            return scales_OG, torch.zeros_like(scales_OG).to(dtype)
        scales_OG = _divisor((high_OG - low_OG) / last)
        return scales_OG, (-(low_OG / scales_OG * REACH)).round().to(dtype)

    @torch.no_grad()
    def round(self, weight_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor) -> Tensor:
        """Codes [O, I] of the nearest values of the grid with these scales and zeros; groups are alike in size."""
        first, last, dtype = FORMATS[self.format]
        places_OGi = weight_OI.float().unflatten(1, (scales_OG.shape[1], -1)) / scales_OG.unsqueeze(-1)
        if dtype.is_floating_point:
            codes_OGi = _positive_zeros(places_OGi.clamp(first, last).to(dtype).float())
        else:
            places_OGi = places_OGi if first else places_OGi * REACH
            codes_OGi = (places_OGi.round() + zeros_OG.float().unsqueeze(-1)).clamp(first, last)
        return codes_OGi.flatten(1).to(dtype)


def dequantise(codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that codes stand for, ``(codes - zeros) * scales`` per group, [O, I]; without -0.0 in any type."""
    codes_OGi = codes_OI.float().unflatten(1, (scales_OG.shape[1], -1))
    weight_OGi = (codes_OGi - zeros_OG.float().unsqueeze(-1)) * scales_OG.float().unsqueeze(-1)
    return _positive_zeros(weight_OGi.flatten(1).to(dtype))


def _divisor(scale: Tensor) -> Tensor:
    # a device may flush what is below to 0
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


def _positive_zeros(values: Tensor) -> Tensor:
    # -0.0 is a kept weight to 2:4 compressors, and small negative values round to it
    return torch.where(values == 0, 0.0, values)
