"""SparseGPT's sweep over a block of columns as one Triton kernel: a program for a few rows, which need no others.

Annotations are not postponed here: Triton reads them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: rows of a program, and its warps: with one, no column waits for other warps
ROWS = 4
WARPS = 1


def column_sweep(part_BO: Tensor, corner_BB: Tensor, stays_BO: Tensor, pattern: tuple[int, int] | None) -> Tensor:
    """As ``sweep_reference`` of methods/sparsegpt.py, for contiguous float32; at most 128 columns or so pay.

    ``pattern`` is (keep, of), or None where ``stays_BO`` says already what stays. Both tensors are changed in place;
    returns the errors [B, O].
    """
    columns, outputs = part_BO.shape
    keep, of = pattern or (0, 0)
    assert part_BO.is_contiguous() and stays_BO.is_contiguous() and corner_BB.stride(1) == 1
    assert part_BO.dtype == corner_BB.dtype == torch.float32, "the kernel computes in float32"
    assert not of or columns % of == 0, "groups must not be cut"
    errors = torch.empty_like(part_BO)
    # Triton launches on the current device
    with torch.cuda.device_of(part_BO):
        _sweep[(triton.cdiv(outputs, ROWS),)](
            part_BO,
            # Triton's own type for truth has one bit
            stays_BO.view(torch.uint8),
            errors,
            corner_BB,
            outputs,
            corner_BB.stride(0),
            # numbers for Triton's interpreter, which cannot make a range of a tensor under NumPy 2.4
            COLUMNS=columns,
            KEEP=keep,
            OF=of,
            ROWS=ROWS,
            SIZE=triton.next_power_of_2(columns),
            num_warps=WARPS,
        )
    return errors


@triton.jit
def _sweep(
    part,
    stays,
    errors,
    corner,
    outputs,
    corner_stride,
    COLUMNS: tl.constexpr,
    KEEP: tl.constexpr,
    OF: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    inside = (row < outputs)[:, None] & (column < COLUMNS)[None, :]
    at = column[None, :].to(tl.int64) * outputs + row[:, None]
    weight = tl.load(part + at, mask=inside, other=0.0)
    diagonal = tl.load(corner + column * (corner_stride + 1), mask=column < COLUMNS, other=1.0)
    kept = tl.load(stays + at, mask=inside, other=0) > 0
    for now in range(0, COLUMNS):
        # not in one condition: whether there are groups is known when this is compiled
        if OF > 0:  # noqa: SIM102
            if now % OF == 0:
                ratio = weight / diagonal[None, :]
                score = ratio * ratio
                rank = tl.zeros([ROWS, SIZE], tl.int32)
                for rival in range(now, now + OF):
                    theirs = tl.sum(tl.where((column == rival)[None, :], score, 0.0), 1)[:, None]
                    # of equal scores the lower index stays
                    ahead = (theirs > score) | ((theirs == score) & (rival < column)[None, :])
                    rank += ahead.to(tl.int32)
                group = ((column >= now) & (column < now + OF))[None, :]
                kept = tl.where(group, rank < KEEP, kept)
        here = (column == now)[None, :]
        own = tl.sum(tl.where(column == now, diagonal, 0.0), 0)
        gone = tl.sum(tl.where(here & ~kept, weight, 0.0), 1) / own
        line = tl.load(corner + now * corner_stride + column, mask=(column >= now) & (column < COLUMNS), other=0.0)
        weight -= gone[:, None] * line[None, :]
        tl.store(errors + tl.cast(now, tl.int64) * outputs + row, gone, mask=row < outputs)
    tl.store(part + at, tl.where(kept, weight, 0.0), mask=inside)
    tl.store(stays + at, kept.to(tl.uint8), mask=inside)
