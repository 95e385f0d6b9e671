"""Products of a few tokens with 2:4 weights on sparse tensor cores: packing for ``product24.cu``, and its launches.

``mma.sp`` takes 16 outputs and 32 inputs at a time. Of such a tile thread 4 g + t of a warp holds, of the rows g and
g + 8, the values of groups t and t + 4; four bits say where in a group its two values stood, and those of a tile are
held by two threads of every four: the words of two tiles fill a warp (PTX ISA, "Matrix fragments for sparse
mma.m16n8k32"). R row tiles, S steps of 64 inputs (128 in 4 bits), padded with zeros to whole ones.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import resources
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from shearling.kernels.compact24 import Compact24, Compact24Int4, codes24, fields24
from shearling.kernels.nvrtc import Kernel, compiled

#: most tokens of a product
TOKENS = 32
#: inputs of a step, of values and of codes; of the rank of a branch
STEP, STEP_INT4, STEP_UP = 64, 128, 32
#: inputs that share a scale: steps hold whole groups
GROUPS = (32, 64, 128)
#: inputs that a branch may sum up: steps hold whole sums
SUMS = (8, 16, 32, 64)
#: a field of positions 0 and 1, for groups that are not there
_NOWHERE = 4
_ROWS, _PAD, _APART, _REGISTERS, _SHARED = 16, 8, 4, 65536, 227 * 1024
#: (row tiles, warps, spread, steps) of blocks: loads under way are half a kilobyte a warp to several, over all of a
#: multiprocessor, and the more outputs a block has, the fewer times tokens are read
_SHAPES = (
    *((1, 8, 1, 4), (1, 8, 1, 8), (2, 4, 1, 4), (2, 8, 1, 4), (4, 4, 1, 2), (4, 8, 1, 2)),
    *((1, 8, 2, 4), (2, 8, 2, 4), (2, 4, 2, 4), (1, 8, 4, 8), (2, 8, 4, 4), (4, 8, 2, 2), (4, 8, 4, 2)),
    *((1, 8, 8, 8), (2, 4, 4, 4), (2, 8, 8, 4), (4, 4, 4, 2), (4, 8, 8, 2)),
    *((2, 2, 2, 4), (1, 4, 4, 8), (2, 4, 4, 8), (4, 2, 2, 2)),
)
_SHAPES_INT4 = (
    *((1, 8, 1, 2), (1, 4, 1, 4), (2, 4, 1, 4), (2, 8, 1, 2), (4, 4, 1, 2), (4, 8, 1, 1)),
    *((1, 8, 2, 4), (2, 8, 2, 2), (2, 4, 2, 4), (1, 8, 4, 4), (2, 8, 4, 4), (4, 8, 2, 2), (4, 8, 4, 2)),
    *((1, 8, 8, 4), (2, 4, 4, 4), (2, 8, 8, 4), (4, 4, 4, 2), (4, 8, 8, 2)),
    *((2, 2, 2, 4), (2, 4, 4, 2), (2, 4, 4, 8), (4, 2, 2, 2), (4, 4, 4, 4)),
)
_SOURCE = "product24.cu"


class Fragments(NamedTuple):
    """A 2:4 weight as sparse tensor cores take it, all int32.

    ``values`` [R, S, 2, 32, 4] are pairs of bfloat16, or [R, S, 32, 4] eight codes each; ``places`` [R, S, 32] or
    [R, S, 32, 2]; ``scales`` [R, groups, 8] pairs of bfloat16 of rows eight apart, or None; ``group`` 0 without.
    """

    values: Tensor
    places: Tensor
    scales: Tensor | None
    outputs: int
    inputs: int
    group: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense weight, (O, I)."""
        return self.outputs, self.inputs

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        return self.values.nbytes + self.places.nbytes + (0 if self.scales is None else self.scales.nbytes)


class Up(NamedTuple):
    """S of a branch y += S t as tensor cores take it: ``values`` (int32) of bfloat16, or of 8 bits with ``scales``.

    Those are [R, 1, 8] pairs of bfloat16 of rows eight apart. ``block`` is 0 where t is given; else t are the sums of
    every so many inputs, one of ``SUMS``, which the kernel adds up itself.
    """

    values: Tensor
    scales: Tensor | None
    rank: int
    block: int = 0

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)


class Config(NamedTuple):
    """How a product is spread out: ``spread`` of the ``warps`` of a block have ``row_tiles`` * 16 outputs each.

    The warps behind each of them take the block's inputs in turn, ``steps`` under way at once. ``ranks`` blocks share
    outputs. ``early``: weights are loaded while the kernel before still runs; they must not be what that writes.
    """

    row_tiles: int
    warps: int
    spread: int
    steps: int
    ranks: int
    early: bool = True


def fragments_of(weight: Compact24 | Compact24Int4) -> Fragments:
    """The weight in the order of the fragments, to the bit; values and scales are bfloat16.

    On a GPU it waits until they are written: kernels that start early read them without waiting.
    """
    outputs, inputs = weight.shape
    if isinstance(weight, Compact24Int4):
        assert weight.group in GROUPS and weight.scales.dtype == torch.bfloat16, (weight.group, weight.scales.dtype)
        codes = codes24(weight)
        nibbles = _tiled(codes.values + 8, STEP_INT4, 8).to(torch.int32)
        # c columns, h halves of the rows, e of a pair: register 2 c + h has nibbles 2 c + h and 2 c + h + 4
        shifts = torch.tensor([4 * (i + 4 * e) for i in range(4) for e in range(2)], dtype=torch.int32).view(2, 2, 2)
        values = (nibbles << shifts.to(nibbles.device)).sum((-3, -2, -1), dtype=torch.int32)
        places = _places(fields24(codes), STEP_INT4)
        values = values.permute(0, 1, 3, 4, 2).reshape(*values.shape[:2], 32, 4).contiguous()
        places = places.unflatten(1, (-1, 2)).transpose(2, 3).contiguous()
        scales = _scales(weight.scales, -(-inputs // STEP_INT4) * STEP_INT4 // weight.group)
        _written(scales)
        return Fragments(values, places, scales, outputs, inputs, weight.group)
    assert weight.values.dtype == torch.bfloat16, weight.values.dtype
    tiled = _tiled(weight.values, STEP, 0).contiguous().view(torch.int32)
    values = tiled.reshape(*tiled.shape[:3], 32, 4).contiguous()
    places = _places(fields24(weight), STEP).contiguous()
    _written(places)
    return Fragments(values, places, None, outputs, inputs)


def up_fragments(up_OR: Tensor, *, block: int = 0, eight_bits: bool = False) -> Up:
    """S [O, R] of a branch as fragments, in bfloat16 or rounded to 8 bits with a scale for every output."""
    assert not block or block in SUMS, f"sums of {block} inputs"
    outputs, rank = up_OR.shape
    scales = None
    if eight_bits:
        codes_OR, scales_O = in_8_bits(up_OR)
        scales = _scales(scales_O[:, None], 1)
        up_OR = (codes_OR + 128).to(torch.uint8)
    else:
        up_OR = up_OR.bfloat16()
    padded = F.pad(up_OR, (0, -rank % STEP_UP, 0, -outputs % _ROWS), value=128 if eight_bits else 0)
    # rows r, halves h, g; steps s, tiles i, columns c, threads t, e of a pair
    split = padded.view(-1, 2, 8, padded.shape[1] // STEP_UP, 2, 2, 4, 2)
    order = (0, 3, 2, 6, 4, 5, 1, 7) if eight_bits else (0, 3, 4, 2, 6, 5, 1, 7)
    values = split.permute(order).contiguous().flatten().view(torch.int32)
    _written(values)
    return Up(values, scales, rank, block)


def in_8_bits(up_OR: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -127 to 127 (float32) of S [O, R] and the scale of every output, [O], in bfloat16."""
    scales = (up_OR.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
    # a scale that was rounded down would lead beyond
    return (up_OR.float() / scales[:, None].float()).round().clamp(-127, 127), scales


def configs(outputs: int, inputs: int, tokens: int, int4: bool) -> tuple[Config, ...]:
    """What may be the fastest for a shape: enough blocks to fill a Hopper GPU, and not many times more."""
    tiles, steps = -(-outputs // _ROWS), -(-inputs // (STEP_INT4 if int4 else STEP))
    found = []
    for row_tiles, warps, spread, ahead in _SHAPES_INT4 if int4 else _SHAPES:
        for ranks in (1, 2, 4, 8):
            blocks = -(-tiles // (spread * row_tiles)) * ranks
            if ranks * warps // spread <= steps and 100 <= blocks <= 1100:
                found.append(Config(row_tiles, warps, spread, ahead, ranks))
    if not found:
        found = [Config(1, 4, 1, 2, 1)]
    widths = [-(-steps // config.ranks) * (STEP_INT4 if int4 else STEP) for config in found]
    # x of a block, half of which is left to what a branch needs and to a second block
    return tuple(c for c, width in zip(found, widths, strict=True) if tokens * (width + _PAD) * 2 <= _SHARED // 2)


def product24(
    x_MI: Tensor,
    weight: Fragments,
    config: Config,
    up: Up | None = None,
    inner_MR: Tensor | None = None,
    bias_O: Tensor | None = None,
) -> Tensor:
    """``x W^T`` [M, O], and with ``up`` the branch ``t S^T``, and the bias, in bfloat16 for up to ``TOKENS`` tokens.

    All sums are float32; t is rounded to bfloat16 before it is multiplied. ``x_MI`` and ``inner_MR``, which is t where
    ``up.block`` is 0, are contiguous bfloat16; I and the rank of a t that is given are multiples of 8.
    """
    if torch.compiler.is_compiling():
        branch = (None, None, []) if up is None else (up.values, up.scales, [up.rank, up.block])
        return _product24(x_MI, *_parts(weight), [int(number) for number in config], *branch, inner_MR, bias_O)
    assert x_MI.is_contiguous() and x_MI.dtype == torch.bfloat16 and x_MI.shape[1] == weight.inputs
    y_MO = torch.empty(x_MI.shape[0], weight.outputs, dtype=torch.bfloat16, device=x_MI.device)
    launch = launch_of(x_MI, weight, config, up, inner_MR, bias_O, y_MO)
    with torch.cuda.device_of(x_MI):
        kernel = _kernel("product24", x_MI.device.index or 0, tuple(sorted(launch.macros.items())))
        kernel(
            launch.grid,
            32 * config.warps,
            launch.shared,
            launch.arguments,
            cluster=config.ranks,
            early=config.early,
        )
    return y_MO


def dense24(weight: Fragments) -> Tensor:
    """The dense weight [O, I] again, in bfloat16; to the bit, where there are no scales."""
    if torch.compiler.is_compiling():
        return _dense24(*_parts(weight))
    dense = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.values.device)
    macros = _macros(weight, Config(1, 8, 1, 1, 1), 1, None)
    with torch.cuda.device_of(dense):
        kernel = _kernel("unpack24", dense.device.index or 0, tuple(sorted(macros.items())))
        kernel((weight.values.shape[0], -(-weight.values.shape[1] // 8)), 256, 0, unpack_arguments(weight, dense))
    return dense


# torch.compile cannot look into a launch: for it they are operators, which take no more than tensors and numbers


@torch.library.custom_op(
    "shearling::product24",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor places, Tensor? scales, int[] sizes, int[] config, Tensor? up, "
    "Tensor? up_scales, int[] up_sizes, Tensor? inner, Tensor? bias) -> Tensor",
)
def _product24(
    x_MI: Tensor,
    values: Tensor,
    places: Tensor,
    scales: Tensor | None,
    sizes: list[int],
    config: list[int],
    up: Tensor | None,
    up_scales: Tensor | None,
    up_sizes: list[int],
    inner_MR: Tensor | None,
    bias_O: Tensor | None,
) -> Tensor:
    branch = None if up is None else Up(up, up_scales, *up_sizes)
    given = Config(*config[:-1], early=bool(config[-1]))
    return product24(x_MI, Fragments(values, places, scales, *sizes), given, branch, inner_MR, bias_O)


@_product24.register_fake
def _(x_MI: Tensor, values: Tensor, places: Tensor, scales: Tensor | None, sizes: list[int], *_: object) -> Tensor:
    return x_MI.new_empty(x_MI.shape[0], sizes[0])


@torch.library.custom_op(
    "shearling::dense24",
    mutates_args=(),
    schema="(Tensor values, Tensor places, Tensor? scales, int[] sizes) -> Tensor",
)
def _dense24(values: Tensor, places: Tensor, scales: Tensor | None, sizes: list[int]) -> Tensor:
    return dense24(Fragments(values, places, scales, *sizes))


@_dense24.register_fake
def _(values: Tensor, places: Tensor, scales: Tensor | None, sizes: list[int]) -> Tensor:
    return values.new_empty(sizes[:2], dtype=torch.bfloat16)


def _parts(weight: Fragments) -> tuple[Tensor, Tensor, Tensor | None, list[int]]:
    return weight.values, weight.places, weight.scales, [weight.outputs, weight.inputs, weight.group]


def unpacked(weight: Fragments) -> Tensor:
    """What ``dense24`` gives, in plain PyTorch."""
    row_tiles, steps = weight.values.shape[:2]
    tiles = 4 if weight.group else 2
    device = weight.values.device
    if weight.group:
        words = weight.values.view(row_tiles, steps, 8, 4, 4).permute(0, 1, 4, 2, 3)
        shifts = torch.tensor([4 * (i + 4 * e) for i in range(4) for e in range(2)], device=device).view(2, 2, 2)
        pairs = ((words[..., None, None, None] >> shifts & 15) - 8).float()
        places = weight.places.view(row_tiles, steps, 32, 2).transpose(2, 3)
    else:
        pairs = weight.values.view(torch.bfloat16).view(row_tiles, steps, 2, 8, 4, 2, 2, 2)
        places = weight.places
    # r, s, tile, g, t, c, h, e -> r, h, g, s, tile, c, t, e: groups are 4 c + t
    values_OG2 = pairs.permute(0, 6, 3, 1, 2, 5, 4, 7).reshape(row_tiles * _ROWS, -1, 2)
    # r, s, pair of tiles, g, tile of the pair, c -> 16 bits of row g, 16 of row g + 8, four of each t
    words = places.reshape(row_tiles, steps, tiles // 2, 8, 2, 2)
    shifts = (torch.arange(2)[:, None] * 16 + torch.arange(4) * 4).to(device)
    fields = words[..., None, None] >> shifts & 15
    fields_OG = fields.permute(0, 6, 3, 1, 2, 4, 5, 7).reshape(row_tiles * _ROWS, -1)
    dense = values_OG2.new_zeros(*fields_OG.shape, 4)
    dense.scatter_(2, torch.stack([fields_OG & 3, fields_OG >> 2], -1).long(), values_OG2)
    dense_OI = dense.flatten(1)
    if weight.scales is not None:
        scales = weight.scales.contiguous().view(torch.bfloat16).view(row_tiles, -1, 8, 2).permute(0, 3, 2, 1)
        dense_OI = dense_OI * scales.reshape(row_tiles * _ROWS, -1).float().repeat_interleave(weight.group, 1)
    return dense_OI[: weight.outputs, : weight.inputs].bfloat16()


class Launch(NamedTuple):
    """What a launch needs: macros of the source, blocks across and down, bytes of shared memory, arguments."""

    macros: dict[str, int]
    grid: tuple[int, int]
    shared: int
    arguments: list[ctypes.Structure | ctypes._SimpleCData]


def launch_of(
    x_MI: Tensor,
    weight: Fragments,
    config: Config,
    up: Up | None,
    inner_MR: Tensor | None,
    bias_O: Tensor | None,
    y_MO: Tensor,
) -> Launch:
    """How ``product24`` is launched; tensors are read and written where they are."""
    tokens, inputs = x_MI.shape
    assert 1 <= tokens <= TOKENS and inputs % 8 == 0, (tokens, inputs)
    step, steps = STEP_INT4 if weight.group else STEP, weight.values.shape[1]
    starts = [rank * steps // config.ranks * step for rank in range(config.ranks + 1)]
    pairs = list(itertools.pairwise(starts))
    widest = max(end - start for start, end in pairs)
    # beside 4 bits the registers of a step hold half as much of S
    step_up = STEP_UP // 2 if weight.group and up is not None and up.scales is None else STEP_UP
    up_steps = 0 if up is None else -(-up.rank // STEP_UP) * STEP_UP // step_up
    if up is not None and up.block:
        of_step = step_up * up.block
        widest_inner = step_up * max(-(-end // of_step) - start // of_step for start, end in pairs)
    else:
        assert up is None or (inner_MR is not None and inner_MR.shape == (tokens, up.rank)), "t must be given"
        assert up is None or up.rank % 8 == 0, up.rank
        widest_inner = step_up * -(-up_steps // config.ranks)
    turns, rows = config.warps // config.spread, config.spread * config.row_tiles * _ROWS
    sums = tokens * (rows + _APART) * 4
    shared = 32 + max(tokens * (widest + _PAD) * 2, turns * sums if turns > 1 else 0)
    shared += max(sums, 0 if up is None else tokens * (widest_inner + _PAD) * 2)
    if config.ranks > 1:
        shared += -(-tokens * rows // (4 * config.ranks)) * config.ranks * 16
    branch = _Branch(
        _at(None if up is None else up.values),
        _at(None if up is None else up.scales),
        _at(inner_MR),
        0 if up is None else up.rank,
        up_steps,
    )
    numbers = (tokens, weight.outputs, inputs, widest, widest_inner)
    return Launch(
        _macros(weight, config, tokens, up),
        (-(-weight.values.shape[0] // (config.spread * config.row_tiles)), config.ranks),
        shared,
        [
            _weights(weight),
            branch,
            *(ctypes.c_void_p(_at(t)) for t in (x_MI, bias_O, y_MO)),
            *(ctypes.c_int(number) for number in numbers),
        ],
    )


def unpack_arguments(weight: Fragments, dense_OI: Tensor) -> list[ctypes.Structure | ctypes._SimpleCData]:
    """The arguments of the kernel ``unpack24``."""
    return [_weights(weight), ctypes.c_void_p(_at(dense_OI)), ctypes.c_int(weight.outputs), ctypes.c_int(weight.inputs)]


class _Weights(ctypes.Structure):
    _fields_ = [
        ("values", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("row_tiles", ctypes.c_int),
        ("steps", ctypes.c_int),
    ]


class _Branch(ctypes.Structure):
    _fields_ = [
        ("up", ctypes.c_void_p),
        ("up_scales", ctypes.c_void_p),
        ("inner", ctypes.c_void_p),
        ("rank", ctypes.c_int),
        ("steps", ctypes.c_int),
    ]


def _weights(weight: Fragments) -> _Weights:
    return _Weights(_at(weight.values), _at(weight.places), _at(weight.scales), *weight.values.shape[:2])


def _at(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous() and tensor.data_ptr() % 4 == 0
    return tensor.data_ptr()


def _macros(weight: Fragments, config: Config, tokens: int, up: Up | None) -> dict[str, int]:
    token_tiles = 1 if tokens <= 8 else 2 if tokens <= 16 else 4
    # what a thread holds: loads under way, two sums, and what counting takes, and unpacking codes
    step, count = (7, 40) if weight.group else (9, 24)
    held = config.row_tiles * (config.steps * step + token_tiles * 8)
    held += 4 * token_tiles + count
    threads = 32 * config.warps
    return {
        "INT4": int(weight.group > 0),
        "GROUP": weight.group or STEP_INT4,
        "ROW_TILES": config.row_tiles,
        "WARPS": config.warps,
        "SPREAD": config.spread,
        "TOKEN_TILES": token_tiles,
        "STEPS": config.steps,
        "RANKS": config.ranks,
        "BLOCKS": max(1, min(2048 // threads, _REGISTERS // (threads * -(-held // 8) * 8))),
        "BRANCH": 0 if up is None else 2 if up.block else 1,
        "SUM": up.block if up is not None and up.block else STEP,
        "UP8": int(up is not None and up.scales is not None),
        "EARLY": int(config.early),
    }


@cache
def source() -> str:
    """The CUDA C++ of the kernels."""
    return resources.files("shearling.kernels").joinpath(_SOURCE).read_text()


def compile_all(weight: Fragments, kinds: Iterable[tuple[Config, int, Up | None]]) -> None:
    """Compile the kernels for such weights, several at a time: each of them (config, tokens, branch)."""
    macros = {tuple(sorted(_macros(weight, *kind).items())) for kind in kinds}
    with ThreadPoolExecutor() as pool:
        list(pool.map(_code, macros))


@cache
def _kernel(name: str, device: int, macros: tuple[tuple[str, int], ...]) -> Kernel:
    return Kernel(_code(macros), name)


@cache
def _code(macros: tuple[tuple[str, int], ...]) -> bytes:
    return compiled(source(), dict(macros))


def _written(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _tiled(values_OV: Tensor, step: int, fill: int) -> Tensor:
    """Values [O, I / 2] as [R, S, tiles, g, t, c, h, e], with ``fill`` where there are none."""
    outputs, kept = values_OV.shape
    padded = F.pad(values_OV, (0, -kept % (step // 2), 0, -outputs % _ROWS), value=fill)
    split = padded.view(-1, 2, 8, padded.shape[1] * 2 // step, step // 32, 2, 4, 2)
    return split.permute(0, 3, 4, 2, 6, 5, 1, 7)


def _places(fields_OG: Tensor, step: int) -> Tensor:
    """Fields [O, G] as words [R, pairs of tiles, 32]: 16 bits of row g, 16 of row g + 8; a tile is two threads'."""
    outputs, groups = fields_OG.shape
    padded = F.pad(fields_OG, (0, -groups % (step // 4), 0, -outputs % _ROWS), value=_NOWHERE)
    # r, h, g, pair, tile of the pair, c, t
    split = padded.view(-1, 2, 8, padded.shape[1] // 16, 2, 2, 4)
    shifts = (torch.arange(2)[:, None] * 16 + torch.arange(4) * 4).to(torch.int32).to(fields_OG.device)
    words = (split.permute(0, 3, 2, 4, 5, 1, 6) << shifts).sum((-2, -1), dtype=torch.int32)
    return words.reshape(*words.shape[:2], 32)


def _scales(scales_OG: Tensor, groups: int) -> Tensor:
    """Scales [O, G] as [R, groups, 8] pairs of rows g and g + 8; those that are not there are 0."""
    outputs, there = scales_OG.shape
    padded = F.pad(scales_OG, (0, groups - there, 0, -outputs % _ROWS))
    pairs = padded.view(-1, 2, 8, groups).permute(0, 3, 2, 1).contiguous()
    return pairs.view(torch.int32).squeeze(-1)
