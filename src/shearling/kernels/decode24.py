"""Products of a few tokens with compact 2:4 weights, as Triton kernels that read 9/16 of the dense bytes, or 3/16.

Both add up a part of the inputs in every program. ``lanes`` has no tensor cores: for each two values that stay it
picks the two of four inputs they meet. ``tiles`` makes the dense tile again, in registers, and multiplies by that.

Annotations are not postponed here: Triton reads them.
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shearling.kernels.compact24 import Compact24, Compact24Int4

#: most tokens of a product
TOKENS = 16


class Candidate(NamedTuple):
    """How a product is carried out: ``kind`` lanes or tiles, ``rows`` outputs and ``words`` at a time in a program.

    ``split`` programs share the inputs of the same outputs. ``select`` is how lanes pick inputs: by ``where``, or by
    one byte permutation, which no interpreter knows.
    """

    kind: str
    rows: int
    words: int
    split: int
    warps: int
    stages: int = 1
    select: str = "permute"


#: worth timing, by the number of tokens: lanes do work in proportion to it
LANES = tuple(
    Candidate("lanes", rows, words, split, warps, 1, "permute")
    for rows, warps in ((1, 1), (2, 2), (4, 2), (4, 4), (8, 4), (16, 8))
    for words in (64, 128)
    for split in (1, 2)
)
TILES = tuple(
    Candidate("tiles", rows, words, split, warps, 1)
    for rows, warps in ((32, 2), (64, 4), (128, 8))
    for words in (16, 32)
    for split in (2, 4, 8)
)


def candidates(tokens: int) -> tuple[Candidate, ...]:
    """What may be the fastest at so many tokens."""
    return LANES if tokens == 1 else LANES + TILES if tokens <= 4 else TILES


def decode24(
    x_MI: Tensor,
    weight: Compact24 | Compact24Int4,
    candidate: Candidate,
    workspace: Tensor,
    branch: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``x W^T`` [M, O] in bfloat16 for up to ``TOKENS`` tokens, as ``compact_product`` gives it, summed in float32.

    ``x_MI`` is contiguous bfloat16. ``branch`` is (x down^T [M, R], up [O, R]), both bfloat16 and contiguous, added
    before the sum is rounded. ``workspace`` is as ``workspace_of`` makes it and may serve one launch after another.
    """
    tokens, inputs = x_MI.shape
    outputs = weight.shape[0]
    assert tokens <= TOKENS and x_MI.is_contiguous() and x_MI.dtype == torch.bfloat16 and inputs == weight.shape[1]
    int4 = isinstance(weight, Compact24Int4)
    values = weight.codes if int4 else weight.values
    assert int4 or values.dtype == torch.bfloat16, values.dtype
    y_MO = torch.empty(tokens, outputs, dtype=torch.bfloat16, device=x_MI.device)
    blocks = triton.cdiv(outputs, candidate.rows)
    if candidate.split > 1:
        assert workspace.numel() >= blocks + candidate.split * tokens * outputs
    inner, up = branch if branch is not None else (x_MI, x_MI)
    rank = inner.shape[1] if branch is not None else 0
    lanes, interpreted = candidate.kind == "lanes", os.environ.get("TRITON_INTERPRET") == "1"
    # Triton launches on the current device
    with torch.cuda.device_of(x_MI):
        (_lanes if lanes else _tiles)[(blocks, candidate.split)](
            x_MI.view(torch.int64) if lanes else x_MI,
            values if int4 else values.view(torch.int32),
            weight.positions,
            weight.scales if int4 else weight.positions,
            inner,
            up,
            y_MO,
            workspace,
            workspace[blocks:].view(torch.float32),
            outputs,
            TOKENS=tokens,
            GROUPS=inputs // 4,
            WORDS=weight.positions.shape[1],
            SCALED=weight.group // 4 if int4 else 0,
            RANK=rank,
            RANKS=min(64, max(16, triton.next_power_of_2(rank))),
            ROWS=candidate.rows,
            BLOCK=candidate.words,
            SPLIT=candidate.split,
            PERMUTE=candidate.select == "permute" and not interpreted,
            INTERPRETED=interpreted,
            num_warps=candidate.warps,
            num_stages=candidate.stages,
        )
    return y_MO


def workspace_of(outputs: int, device: torch.device) -> Tensor:
    """What programs that share outputs need: a counter for each of them (int32, left at 0), and their parts."""
    most = max(candidate.split for candidate in (*LANES, *TILES))
    return torch.zeros(outputs * (1 + most * TOKENS), dtype=torch.int32, device=device)


@triton.jit
def _halves(pair):
    """The two bfloat16 of a word, as float32."""
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _code(word, shift: tl.constexpr):
    """The 4-bit number at ``shift`` of a word whose codes are 8 too high; converting integers would take longer."""
    return (((word >> shift) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def _dot(a, b, sums, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        # the interpreter multiplies the bits of a bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    return tl.dot(a, b, sums)


@triton.jit
def _pick(low, high, field, PERMUTE: tl.constexpr):
    """Of four bfloat16 in two words the two that a field of positions names, as float32."""
    if PERMUTE:
        # a nibble for every byte of the result
        which = ((field & 3) | ((field & 12) << 6)) * 0x22 + 0x1010
        pair = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, which], dtype=tl.int32, is_pure=True, pack=1
        )
        return _halves(pair)
    a, b = _halves(low)
    c, d = _halves(high)
    first = tl.where((field & 2) > 0, tl.where((field & 1) > 0, d, c), tl.where((field & 1) > 0, b, a))
    second = tl.where((field & 8) > 0, tl.where((field & 4) > 0, d, c), tl.where((field & 4) > 0, b, a))
    return first, second


@triton.jit
def _lanes(
    x,
    values,
    positions,
    scales,
    inner,
    up,
    y,
    counters,
    parts,
    outputs,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    SCALED: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    PERMUTE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    in_row = row < outputs
    wide_row = row.to(tl.int64)
    sums = ()
    for _ in tl.static_range(TOKENS):
        # the compiler knows no starred expressions
        sums = sums + (tl.zeros([ROWS, BLOCK], tl.float32),)  # noqa: RUF005
    # a count that is known: Triton's interpreter makes no range of a tensor
    for step in range(0, (WORDS + SPLIT * BLOCK - 1) // (SPLIT * BLOCK)):
        word = (step * SPLIT + tl.program_id(1)) * BLOCK + tl.max_contiguous(tl.arange(0, BLOCK), 2)[None, :]
        in_word = word < WORDS
        fields = tl.load(positions + wide_row * WORDS + word, mask=in_row & in_word, other=0)
        low_codes = fields
        high_codes = fields
        if SCALED > 0:
            at = values + wide_row * (2 * WORDS) + word
            # 8 is added to every code
            low_codes = tl.load(at, mask=in_row & in_word, other=0) ^ -2004318072
            high_codes = tl.load(at + WORDS, mask=in_row & in_word, other=0) ^ -2004318072
        for slot in tl.static_range(8):
            group = slot * WORDS + word
            here = in_word
            if GROUPS != 8 * WORDS:
                here = in_word & (group < GROUPS)
            if SCALED > 0:
                codes = low_codes if slot < 4 else high_codes
                first = _code(codes, 8 * (slot % 4))
                second = _code(codes, 8 * (slot % 4) + 4)
                scale = tl.load(scales + wide_row * (GROUPS // SCALED) + group // SCALED, mask=in_row & here, other=0.0)
                first *= scale.to(tl.float32)
                second *= scale.to(tl.float32)
            else:
                first, second = _halves(tl.load(values + wide_row * GROUPS + group, mask=in_row & here, other=0))
            field = fields >> (4 * slot)
            # a load for every row, or its layout would be another and all others brought into it, through shared memory
            wanted = tl.broadcast_to(group, [ROWS, BLOCK])
            added = ()
            for token in tl.static_range(TOKENS):
                four = tl.load(x + token * GROUPS + wanted, mask=here & in_row, other=0)
                one, other = _pick(four.to(tl.int32), (four >> 32).to(tl.int32), field, PERMUTE)
                added = added + (sums[token] + first * one + second * other,)  # noqa: RUF005
            sums = added
    for token in tl.static_range(TOKENS):
        total = tl.sum(sums[token], 1)[:, None]
        if RANK > 0:  # noqa: SIM102
            if tl.program_id(1) == 0:
                for begin in range(0, RANK, RANKS):
                    rank = begin + tl.arange(0, RANKS)[None, :]
                    a = tl.load(inner + token * RANK + rank, mask=rank < RANK, other=0.0).to(tl.float32)
                    b = tl.load(up + wide_row * RANK + rank, mask=in_row & (rank < RANK), other=0.0).to(tl.float32)
                    total += tl.sum(a * b, 1)[:, None]
        if SPLIT == 1:
            tl.store(y + token * outputs + row, total.to(tl.bfloat16), mask=in_row)
        else:
            tl.store(parts + (tl.program_id(1) * TOKENS + token) * outputs + row, total, mask=in_row)
    if SPLIT > 1:
        tl.debug_barrier()
        if tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel") == SPLIT - 1:
            for token in tl.static_range(TOKENS):
                total = tl.zeros([ROWS, 1], tl.float32)
                for other in range(SPLIT):
                    at = parts + (other * TOKENS + token) * outputs + row
                    # not from a cache that another program's part is too new for
                    total += tl.load(at, mask=in_row, other=0.0, cache_modifier=".cg")
                tl.store(y + token * outputs + row, total.to(tl.bfloat16), mask=in_row)
            tl.store(counters + tl.program_id(0), 0)


@triton.jit
def _tiles(
    x,
    values,
    positions,
    scales,
    inner,
    up,
    y,
    counters,
    parts,
    outputs,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    SCALED: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    PERMUTE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    in_row = row < outputs
    wide_row = row.to(tl.int64)
    # tensor cores take no fewer
    token = tl.arange(0, 16)[None, :]
    in_token = token < TOKENS
    sums = tl.zeros([ROWS, 16], tl.float32)
    # a count that is known: Triton's interpreter makes no range of a tensor
    for step in range(0, (WORDS + SPLIT * BLOCK - 1) // (SPLIT * BLOCK)):
        word = (step * SPLIT + tl.program_id(1)) * BLOCK + tl.arange(0, BLOCK)
        there = in_row & (word < WORDS)[None, :]
        fields = tl.load(positions + wide_row * WORDS + word[None, :], mask=there, other=0)
        low_codes = fields
        high_codes = fields
        if SCALED > 0:
            at = values + wide_row * (2 * WORDS) + word[None, :]
            # 8 is added to every code
            low_codes = tl.load(at, mask=there, other=0) ^ -2004318072
            high_codes = tl.load(at + WORDS, mask=there, other=0) ^ -2004318072
        for slot in tl.static_range(8):
            group = slot * WORDS + word
            here = (word < WORDS) & (group < GROUPS)
            if SCALED > 0:
                codes = low_codes if slot < 4 else high_codes
                at = scales + wide_row * (GROUPS // SCALED) + (group // SCALED)[None, :]
                scale = tl.load(at, mask=in_row & here[None, :], other=0.0).to(tl.float32)
                first = (_code(codes, 8 * (slot % 4)) * scale).to(tl.bfloat16)
                second = (_code(codes, 8 * (slot % 4) + 4) * scale).to(tl.bfloat16)
            else:
                at = values + wide_row * GROUPS + group[None, :]
                pair = tl.load(at, mask=in_row & here[None, :], other=0)
                first = pair.to(tl.int16).to(tl.bfloat16, bitcast=True)
                second = (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
            field = fields >> (4 * slot)
            one, two = field & 3, field & 12
            none = tl.zeros([ROWS, BLOCK], tl.bfloat16)
            for place in tl.static_range(4):
                # the first is never at the last place, the second never at the first
                tile = none
                if place > 0:
                    tile = tl.where(two == 4 * place, second, none)
                if place < 3:
                    tile = tl.where(one == place, first, tile)
                at = x + token * (4 * GROUPS) + (4 * group + place)[:, None]
                sums = _dot(tile, tl.load(at, mask=here[:, None] & in_token, other=0.0), sums, INTERPRETED)
    if RANK > 0:  # noqa: SIM102
        if tl.program_id(1) == 0:
            for begin in range(0, RANK, RANKS):
                rank = begin + tl.arange(0, RANKS)
                in_rank = rank < RANK
                a = tl.load(up + wide_row * RANK + rank[None, :], mask=in_row & in_rank[None, :], other=0.0)
                b = tl.load(inner + token * RANK + rank[:, None], mask=in_rank[:, None] & in_token, other=0.0)
                sums = _dot(a, b, sums, INTERPRETED)
    at = token * outputs + row
    inside = in_row & in_token
    if SPLIT == 1:
        tl.store(y + at, sums.to(tl.bfloat16), mask=inside)
    else:
        total = TOKENS * outputs
        tl.store(parts + tl.program_id(1) * total + at, sums, mask=inside)
        tl.debug_barrier()
        if tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel") == SPLIT - 1:
            sums = tl.zeros([ROWS, 16], tl.float32)
            for other in range(SPLIT):
                sums += tl.load(parts + other * total + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(y + at, sums.to(tl.bfloat16), mask=inside)
            tl.store(counters + tl.program_id(0), 0)


#: words of a program of ``expand24``, and its warps
WORDS_AT_ONCE = 64
EXPAND_WARPS = 2


def expand24(weight: Compact24 | Compact24Int4) -> Tensor:
    """The dense weight [O, I] in bfloat16, as ``unpack24`` or ``unpack24_int4`` gives it, in one pass."""
    int4 = isinstance(weight, Compact24Int4)
    values = weight.codes if int4 else weight.values
    outputs, inputs = weight.shape
    words = weight.positions.shape[1]
    dense_OI = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=values.device)
    # Triton launches on the current device
    with torch.cuda.device_of(values):
        _expand[(outputs, triton.cdiv(words, WORDS_AT_ONCE))](
            values if int4 else values.view(torch.int32),
            weight.positions,
            weight.scales if int4 else weight.positions,
            dense_OI.view(torch.int32),
            GROUPS=inputs // 4,
            WORDS=words,
            SCALED=weight.group // 4 if int4 else 0,
            BLOCK=WORDS_AT_ONCE,
            num_warps=EXPAND_WARPS,
        )
    return dense_OI


@triton.jit
def _rounded(number):
    """The bits of the bfloat16 nearest to a float32, of two the even one."""
    bits = number.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def _expand(
    values,
    positions,
    scales,
    dense,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_word = word < WORDS
    fields = tl.load(positions + row * WORDS + word, mask=in_word, other=0)
    low_codes = fields
    high_codes = fields
    if SCALED > 0:
        # 8 is added to every code
        low_codes = tl.load(values + row * (2 * WORDS) + word, mask=in_word, other=0) ^ -2004318072
        high_codes = tl.load(values + row * (2 * WORDS) + WORDS + word, mask=in_word, other=0) ^ -2004318072
    for slot in tl.static_range(8):
        group = slot * WORDS + word
        here = in_word & (group < GROUPS)
        if SCALED > 0:
            codes = low_codes if slot < 4 else high_codes
            scale = tl.load(scales + row * (GROUPS // SCALED) + group // SCALED, mask=here, other=0.0).to(tl.float32)
            first = _rounded(_code(codes, 8 * (slot % 4)) * scale)
            second = _rounded(_code(codes, 8 * (slot % 4) + 4) * scale)
        else:
            pair = tl.load(values + row * GROUPS + group, mask=here, other=0)
            first = pair & 0xFFFF
            second = (pair >> 16) & 0xFFFF
        field = fields >> (4 * slot)
        one = field & 3
        two = (field >> 2) & 3
        # a shift by 32 or more would be undefined
        low = tl.where(one < 2, first << (16 * (one & 1)), 0) | tl.where(two < 2, second << (16 * (two & 1)), 0)
        high = tl.where(one > 1, first << (16 * (one & 1)), 0) | tl.where(two > 1, second << (16 * (two & 1)), 0)
        tl.store(dense + row * (2 * GROUPS) + 2 * group, low, mask=here)
        tl.store(dense + row * (2 * GROUPS) + 2 * group + 1, high, mask=here)
