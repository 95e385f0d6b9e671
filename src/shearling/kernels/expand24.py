"""Products of a few tokens with 2:4 weights on a CPU: packing for ``expand24.c``, and its calls.

O outputs, I inputs, B blocks of 64 inputs, filled up with zeros. A mask says which 32 inputs of a block stay; their
values lie packed, and one instruction of AVX-512 puts them in their places. Codes of 4 bits are put there as bytes, of
which every fourth is looked up for 16 inputs at once: byte 4 i + b of a block's 64 stands for its input 16 b + i.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import resources
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from shearling.errors import ShearlingError
from shearling.kernels.compact24 import Compact24, Compact24Int4, codes24, fields24
from shearling.kernels.compiled_c import library

#: most tokens of a product
TOKENS = 16
#: types of inputs
DTYPES = (torch.float32, torch.bfloat16)
_BLOCK, _KEPT = 64, 32
#: a field of positions 0 and 1
_NOWHERE = 4
_SOURCE, _NEEDS = "expand24", ("avx512f", "avx512bw", "avx512vl", "avx512_vbmi2")


class Masked24(NamedTuple):
    """A 2:4 weight as masks and packed values, for inputs of ``dtype``.

    ``values`` [O, 32 B] in that type; or codes (uint8, [O, 16 B]), value i of a block in the low half of byte i and
    value 16 + i in its high half, with ``scales`` [O, 64 B / group] (float32). ``masks`` [O, 8 B] (uint8), the lowest
    bit first. ``group`` is 0 without codes.
    """

    values: Tensor
    masks: Tensor
    scales: Tensor | None
    outputs: int
    inputs: int
    dtype: torch.dtype
    group: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense weight, (O, I)."""
        return self.outputs, self.inputs

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        return self.values.nbytes + self.masks.nbytes + (0 if self.scales is None else self.scales.nbytes)


def obstacle() -> str | None:
    """What stands in the way of such products on this machine, in one line; None where nothing does."""
    found = _library()
    return found if isinstance(found, str) else None


def masked24(weight: Compact24 | Compact24Int4) -> Masked24:
    """The copy of a weight of float32 or bfloat16, or with scales of that type; in groups of 32, 64 or 128 inputs."""
    group = weight.group if isinstance(weight, Compact24Int4) else 0
    dtype = weight.scales.dtype if isinstance(weight, Compact24Int4) else weight.values.dtype
    assert dtype in DTYPES, dtype
    (outputs, inputs), missing = weight.shape, -weight.shape[1] % _BLOCK
    codes = codes24(weight) if isinstance(weight, Compact24Int4) else weight
    # of groups that are not there any two stay, so that all blocks have as many values
    fields_OG = F.pad(fields24(codes).to(torch.uint8), (0, missing // 4), value=_NOWHERE)
    one = torch.ones((), dtype=torch.uint8)
    stays_OG = one << (fields_OG & 3) | one << (fields_OG >> 2)
    if not isinstance(weight, Compact24Int4):
        masks = stays_OG[:, ::2] | stays_OG[:, 1::2] << 4
        return Masked24(F.pad(codes.values, (0, missing // 2)), masks, None, outputs, inputs, dtype)
    stays_OI = (stays_OG[..., None] >> torch.arange(4, dtype=torch.uint8) & 1).bool().flatten(1)
    kept = F.pad(codes.values & 15, (0, missing // 2)).to(torch.uint8)
    dense_OI = torch.zeros_like(stays_OI, dtype=torch.uint8).masked_scatter_(stays_OI, kept)
    stays_OB = _in_places(stays_OI)
    low, high = _in_places(dense_OI).masked_select(stays_OB).view(outputs, -1, 2, _KEPT // 2).unbind(2)
    masks = (stays_OB.unflatten(1, (-1, 8)) * _bits()).sum(-1, dtype=torch.uint8)
    scales = F.pad(weight.scales.float(), (0, (inputs + missing) // group - weight.scales.shape[1])).contiguous()
    return Masked24((low | high << 4).flatten(1), masks, scales, outputs, inputs, dtype, group)


def masked_product(x_MI: Tensor, weight: Masked24) -> Tensor:
    """``x W^T`` [M, O] of contiguous inputs in the weight's type, summed in float32.

    Raises ShearlingError where ``obstacle`` says that it cannot be.
    """
    if torch.compiler.is_compiling():
        return _masked_product(x_MI, *_parts(weight))
    tokens = x_MI.shape[0]
    assert tokens <= TOKENS and x_MI.is_contiguous() and x_MI.dtype == weight.dtype and x_MI.shape[1] == weight.inputs
    y_MO = torch.empty(tokens, weight.outputs, dtype=weight.dtype)
    arguments = (x_MI.data_ptr(), y_MO.data_ptr(), tokens, torch.get_num_threads())
    if _usable().product(ctypes.byref(_weight(weight)), *arguments):
        raise MemoryError(f"product: no memory for {tokens} x {weight.inputs} inputs")
    return y_MO


def inflated(weight: Masked24) -> Tensor:
    """The dense weight [O, I] again, in its type; to the bit where there are no scales. Raises as the product."""
    if torch.compiler.is_compiling():
        return _inflated(*_parts(weight), weight.dtype)
    dense_OI = torch.empty(weight.shape, dtype=weight.dtype)
    _usable().inflate(ctypes.byref(_weight(weight)), dense_OI.data_ptr(), torch.get_num_threads())
    return dense_OI


# torch.compile cannot look into a call of C: for it they are operators, which take no more than tensors and numbers


@torch.library.custom_op(
    "shearling::masked_product",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor masks, Tensor? scales, int[] sizes) -> Tensor",
)
def _masked_product(x_MI: Tensor, values: Tensor, masks: Tensor, scales: Tensor | None, sizes: list[int]) -> Tensor:
    return masked_product(x_MI, _masked24(values, masks, scales, sizes, x_MI.dtype))


@_masked_product.register_fake
def _(x_MI: Tensor, values: Tensor, masks: Tensor, scales: Tensor | None, sizes: list[int]) -> Tensor:
    return x_MI.new_empty(x_MI.shape[0], sizes[0])


@torch.library.custom_op(
    "shearling::inflated",
    mutates_args=(),
    schema="(Tensor values, Tensor masks, Tensor? scales, int[] sizes, ScalarType dtype) -> Tensor",
)
def _inflated(values: Tensor, masks: Tensor, scales: Tensor | None, sizes: list[int], dtype: torch.dtype) -> Tensor:
    return inflated(_masked24(values, masks, scales, sizes, dtype))


@_inflated.register_fake
def _(values: Tensor, masks: Tensor, scales: Tensor | None, sizes: list[int], dtype: torch.dtype) -> Tensor:
    return values.new_empty(sizes[:2], dtype=dtype)


def _parts(weight: Masked24) -> tuple[Tensor, Tensor, Tensor | None, list[int]]:
    return weight.values, weight.masks, weight.scales, [weight.outputs, weight.inputs, weight.group]


def _masked24(values: Tensor, masks: Tensor, scales: Tensor | None, sizes: list[int], dtype: torch.dtype) -> Masked24:
    outputs, inputs, group = sizes
    return Masked24(values, masks, scales, outputs, inputs, dtype, group)


def inflated_reference(weight: Masked24) -> Tensor:
    """What ``inflated`` gives, in plain PyTorch."""
    stays_OB = (weight.masks[..., None] & _bits() > 0).flatten(1)
    values = weight.values
    if weight.group:
        codes = values.view(weight.outputs, -1, 1, _KEPT // 2)
        codes = torch.cat([codes & 15, codes >> 4], 2).int()
        values = torch.where(codes > 7, codes - 16, codes)
    dense_OI = torch.zeros_like(stays_OB, dtype=values.dtype).masked_scatter_(stays_OB, values.flatten())
    if weight.group:
        dense_OI = dense_OI.unflatten(1, (-1, 16, 4)).transpose(2, 3).flatten(1)
    if weight.scales is not None:
        dense_OI = dense_OI * weight.scales.repeat_interleave(weight.group, 1)
    return dense_OI[:, : weight.inputs].to(weight.dtype)


class _Weight(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "masks", "scales")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "blocks")),
        *((name, ctypes.c_int) for name in ("kind", "bfloat16", "group")),
    ]


def _weight(weight: Masked24) -> _Weight:
    bfloat16 = int(weight.dtype == torch.bfloat16)
    kind = 2 if weight.group else bfloat16
    scales = None if weight.scales is None else weight.scales.data_ptr()
    blocks = -(-weight.inputs // _BLOCK)
    pointers = weight.values.data_ptr(), weight.masks.data_ptr(), scales
    return _Weight(*pointers, weight.outputs, weight.inputs, blocks, kind, bfloat16, weight.group)


def _in_places(dense_OI: Tensor) -> Tensor:
    """Of whole blocks, in the order of the bytes that codes are put in."""
    return dense_OI.unflatten(1, (-1, 4, 16)).transpose(2, 3).flatten(1)


def _bits() -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8)


def _usable() -> ctypes.CDLL:
    found = _library()
    if isinstance(found, str):
        raise ShearlingError(found)
    return found


@cache
def _library() -> ctypes.CDLL | str:
    try:
        found = library(resources.files("shearling.kernels").joinpath(f"{_SOURCE}.c").read_text(), _SOURCE, _NEEDS)
    except ShearlingError as error:
        return str(error)
    weight, place = ctypes.POINTER(_Weight), ctypes.c_void_p
    found.product.argtypes = [weight, place, place, ctypes.c_int64, ctypes.c_int]
    found.product.restype = ctypes.c_int
    found.inflate.argtypes = [weight, place, ctypes.c_int]
    found.inflate.restype = None
    return found
