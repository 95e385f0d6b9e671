"""Weights of 2:4 in 9/16 of their bytes: the two of every four that stay, and where in the four they stood.

O outputs, I inputs, G = I / 4 groups, W = ceil(G / 8) words of positions. Word w of a row holds groups w, w + W, ...,
w + 7 W, four bits each from the lowest; files have the same words.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shearling.errors import ShearlingError

#: groups of a word of positions
SLOTS = 8
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Compact24(NamedTuple):
    """``values`` [O, I / 2] in the weight's type, ``positions`` [O, W] (int32): two of two bits a group, rising."""

    values: Tensor
    positions: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense weight, (O, I)."""
        return self.values.shape[0], 2 * self.values.shape[1]

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        return self.values.nbytes + self.positions.nbytes


class Compact24Int4(NamedTuple):
    """A 2:4 weight of 4-bit codes, ``code * scale``, with a scale for every ``group`` dense inputs.

    ``codes`` [O, G] (uint8): a byte for the two codes of a group, the first in its low half. ``positions`` as in
    ``Compact24``, ``scales`` [O, I / group].
    """

    codes: Tensor
    positions: Tensor
    scales: Tensor
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense weight, (O, I)."""
        return self.scales.shape[0], self.group * self.scales.shape[1]

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        return self.codes.nbytes + self.positions.nbytes + self.scales.nbytes


def pack24(weight_OI: Tensor, name: str = "weight") -> Compact24:
    """The weight without its zeros, to the bit; what stays beside a lone weight is the first zero of its group.

    Raises ShearlingError, which calls the weight ``name``, where it is not 2:4. A -0.0 is a weight that stays.
    """
    if weight_OI.dim() != 2 or weight_OI.shape[1] % 4:
        raise ShearlingError(f"{name}: {tuple(weight_OI.shape)} is no matrix with inputs in fours; 2:4 needs one")
    weight_OG4 = weight_OI.detach().unflatten(1, (-1, 4))
    stays_OG4 = weight_OG4.contiguous().view(_BITS[weight_OI.element_size()]) != 0
    device = weight_OI.device
    patterns_OG = (stays_OG4 * torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=device)).sum(-1, dtype=torch.uint8)
    fields_OG = torch.tensor(_FIELDS, dtype=torch.int8, device=device)[patterns_OG.int()]
    if (fields_OG < 0).any():
        row, group = (fields_OG < 0).nonzero()[0].tolist()
        raise ShearlingError(
            f"{name}: is not 2:4, row {row} has {int(stays_OG4[row, group].sum())} weights at inputs {4 * group} to "
            f"{4 * group + 3}; at most two may be other than +0.0"
        )
    values_OG2 = weight_OG4.gather(2, _positions(fields_OG))
    return Compact24(values_OG2.flatten(1), _words(fields_OG.int()))


def is_24(weight_OI: Tensor) -> bool:
    """Whether ``pack24`` takes it: at most two of every four along the input are other than +0.0."""
    if weight_OI.dim() != 2 or weight_OI.shape[1] % 4:
        return False
    stays_OI = weight_OI.detach().contiguous().view(_BITS[weight_OI.element_size()]) != 0
    return int(stays_OI.unflatten(1, (-1, 4)).sum(-1, dtype=torch.uint8).max()) <= 2


def unpack24(compact: Compact24) -> Tensor:
    """The dense weight [O, I] again, to the bit."""
    values_OG2 = compact.values.unflatten(1, (-1, 2))
    outputs, groups, _ = values_OG2.shape
    weight_OG4 = values_OG2.new_zeros(outputs, groups, 4)
    weight_OG4.scatter_(2, _positions(_fields(compact.positions, groups)), values_OG2)
    return weight_OG4.flatten(1)


def pack24_int4(codes_OI: Tensor, scales_OG: Tensor, name: str = "weight") -> Compact24Int4:
    """Codes -8 to 7 (int8) of a 2:4 weight and the scales of their groups, as ``plan.Grid`` gives them.

    Raises ShearlingError as ``pack24``.
    """
    compact = pack24(codes_OI, name)
    group = codes_OI.shape[1] // scales_OG.shape[1]
    assert group * scales_OG.shape[1] == codes_OI.shape[1], "scales of equal groups"
    first_OG, second_OG = compact.values.bitwise_and(15).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    return Compact24Int4(first_OG | second_OG << 4, compact.positions, scales_OG, group)


def unpack24_int4(compact: Compact24Int4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [O, I], multiplied out in float32."""
    codes_OI = unpack24(codes24(compact))
    scaled = codes_OI.unflatten(1, (-1, compact.group)) * compact.scales.float()[:, :, None]
    return scaled.flatten(1).to(dtype)


def codes24(compact: Compact24Int4) -> Compact24:
    """The codes alone, -8 to 7 (int32), where ``Compact24`` has values."""
    codes_OG2 = torch.stack([compact.codes & 15, compact.codes >> 4], -1).int()
    return Compact24(torch.where(codes_OG2 > 7, codes_OG2 - 16, codes_OG2).flatten(1), compact.positions)


def fields24(compact: Compact24) -> Tensor:
    """Of every group the two positions in one number, the first in its two lower bits, [O, G] (int32)."""
    return _fields(compact.positions, compact.shape[1] // 4)


def random_24(outputs: int, inputs: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A random 2:4 weight; ShearlingError where groups of four do not fill the inputs."""
    if inputs % 4:
        raise ShearlingError(f"shape {outputs} x {inputs}: inputs must be a multiple of 4 to be 2:4")
    generator = torch.Generator(device).manual_seed(0)
    weight_OG4 = torch.randn(outputs, inputs // 4, 4, generator=generator, device=device) / inputs**0.5
    least_OG2 = weight_OG4.abs().topk(2, largest=False).indices
    return weight_OG4.scatter_(2, least_OG2, 0.0).flatten(1).to(dtype)


def _field(pattern: int) -> int:
    """For the places of a group that hold a weight, a bit each: where the two that stay are; -1 for three or more."""
    places = [place for place in range(4) if pattern >> place & 1]
    if len(places) > 2:
        return -1
    zeros = [place for place in range(4) if place not in places]
    first, second = sorted(places + zeros[: 2 - len(places)])
    return first | second << 2


_FIELDS = [_field(pattern) for pattern in range(16)]


def _positions(fields_OG: Tensor) -> Tensor:
    """Positions [O, G, 2] (int64, to index with)."""
    return torch.stack([fields_OG & 3, fields_OG >> 2 & 3], -1).long()


def _words(fields_OG: Tensor) -> Tensor:
    groups = fields_OG.shape[1]
    words = -(-groups // SLOTS)
    fields_OSW = torch.nn.functional.pad(fields_OG, (0, SLOTS * words - groups)).unflatten(1, (SLOTS, words))
    shifts_S1 = torch.arange(0, 32, 4, dtype=torch.int32, device=fields_OG.device)[:, None]
    return (fields_OSW << shifts_S1).sum(1, dtype=torch.int32)


def _fields(words_OW: Tensor, groups: int) -> Tensor:
    shifts_S1 = torch.arange(0, 32, 4, dtype=torch.int32, device=words_OW.device)[:, None]
    return (words_OW[:, None] >> shifts_S1 & 15).flatten(1)[:, :groups]
