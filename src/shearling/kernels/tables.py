"""Many tensors in one launch: a table of their addresses, and which block of work belongs to which.

Annotations are not postponed here: Triton reads them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Table(NamedTuple):
    """``addresses`` [kinds, tensors] (int64), ``sizes`` [tensors]; block b begins at ``starts[b]`` of ``owners[b]``."""

    addresses: Tensor
    sizes: Tensor
    owners: Tensor
    starts: Tensor
    key: tuple[int, ...]


def table_of(kinds: Sequence[Sequence[Tensor]], block: int, last: Table | None = None) -> Table:
    """A table of equally long lists of contiguous tensors, of which those at one place are of one size.

    ``last`` is taken again where it is of the same tensors. Blocks have ``block`` elements.
    """
    key = tuple(tensor.data_ptr() for kind in kinds for tensor in kind)
    if last is not None and last.key == key:
        return last
    first = kinds[0]
    for kind in kinds:
        for tensor, like in zip(kind, first, strict=True):
            assert tensor.is_contiguous() and tensor.numel() == like.numel() and tensor.device == like.device
    device = first[0].device
    counts = [-(-tensor.numel() // block) for tensor in first]
    owners = [place for place, count in enumerate(counts) for _ in range(count)]
    starts = [number * block for count in counts for number in range(count)]
    return Table(
        torch.tensor(key, dtype=torch.int64, device=device).view(len(kinds), -1),
        torch.tensor([tensor.numel() for tensor in first], dtype=torch.int64, device=device),
        torch.tensor(owners, dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int64, device=device),
        key,
    )
