"""N:M masks of many weights by their size, and how many of their entries change, as one Triton kernel.

Annotations are not postponed here: Triton reads them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shearling.kernels.tables import Table

#: groups of a program
GROUPS = 1024
WARPS = 8


def nm_masks(table: Table, keep: int, of: int) -> Tensor:
    """Choose masks anew in place; returns how many entries differ from before, and from the start [2] (int64).

    The kinds of ``table``, in blocks of ``GROUPS * of`` elements, are weights (float32, stored [out, in]), masks and
    the masks of the start (bool). Of equal sizes the lower index stays.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=table.addresses.device)
    # Triton launches on the current device
    with torch.cuda.device_of(table.addresses):
        _nm_masks[(len(table.owners),)](
            table.addresses,
            table.sizes,
            table.owners,
            table.starts,
            len(table.sizes),
            counts,
            KEEP=keep,
            OF=of,
            WIDTH=triton.next_power_of_2(of),
            GROUPS=GROUPS,
            num_warps=WARPS,
        )
    return counts


@triton.jit
def _nm_masks(
    addresses,
    sizes,
    owners,
    starts,
    tensors,
    counts,
    KEEP: tl.constexpr,
    OF: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    block = tl.program_id(0)
    owner = tl.load(owners + block)
    column = tl.arange(0, WIDTH)
    at = tl.load(starts + block) + (tl.arange(0, GROUPS) * OF)[:, None] + column[None, :]
    inside = (at < tl.load(sizes + owner)) & (column < OF)[None, :]
    weights = tl.load(addresses + owner).to(tl.pointer_type(tl.float32)) + at
    masks = tl.load(addresses + tensors + owner).to(tl.pointer_type(tl.uint8)) + at
    begun = tl.load(addresses + 2 * tensors + owner).to(tl.pointer_type(tl.uint8)) + at

    size_of = tl.abs(tl.load(weights, mask=inside, other=0.0))
    rank = tl.zeros([GROUPS, WIDTH], tl.int32)
    for rival in range(0, OF):
        theirs = tl.sum(tl.where((column == rival)[None, :], size_of, 0.0), 1)[:, None]
        ahead = (theirs > size_of) | ((theirs == size_of) & (rival < column)[None, :])
        rank += ahead.to(tl.int32)
    kept = (rank < KEEP).to(tl.uint8)
    moved = (kept != tl.load(masks, mask=inside, other=0)) & inside
    away = (kept != tl.load(begun, mask=inside, other=0)) & inside
    tl.store(masks, kept, mask=inside)
    tl.atomic_add(counts, tl.sum(tl.sum(moved.to(tl.int64), 1), 0))
    tl.atomic_add(counts + 1, tl.sum(tl.sum(away.to(tl.int64), 1), 0))
