"""Taking the elements that stay out of one tensor, and putting them back into place."""

from __future__ import annotations

import torch
from torch import Tensor

from shearling.anatomy import Anatomy
from shearling.plan import Structure, kept_elements


def axis_indices(anatomy: Anatomy, structure: Structure, parts: tuple[str, ...], layer: int | None) -> list[int] | None:
    """Elements that stay along an axis that stores ``parts`` one after the other; None where all do."""
    if parts == ("fixed",):
        return None
    indices: list[int] = []
    offset, changed = 0, False
    for part in parts:
        size = anatomy.size(part, layer)
        kept = kept_elements(anatomy, structure, part, layer)
        changed |= kept is not None
        indices.extend(offset + index for index in (range(size) if kept is None else kept))
        offset += size
    return indices if changed else None


def slice_tensor(tensor: Tensor, name: str, anatomy: Anatomy, structure: Structure) -> Tensor:
    """The part of a tensor that a structural cut keeps; the tensor itself where nothing goes."""
    layer = anatomy.layer_of(name)
    for axis, parts in enumerate(anatomy.layout(name)):
        kept = axis_indices(anatomy, structure, parts, layer)
        if kept is not None:
            tensor = tensor.index_select(axis, torch.tensor(kept, device=tensor.device))
    return tensor


def scatter_tensor(cut: Tensor, into: Tensor, name: str, anatomy: Anatomy, structure: Structure) -> Tensor:
    """``into`` with the elements that a cut keeps replaced by those of ``cut``: the inverse of slicing."""
    layer = anatomy.layer_of(name)
    grid = []
    for axis, parts in enumerate(anatomy.layout(name)):
        kept = axis_indices(anatomy, structure, parts, layer)
        indices = torch.arange(into.shape[axis]) if kept is None else torch.tensor(kept)
        grid.append(indices.to(into.device))
    result = into.clone()
    result[torch.meshgrid(*grid, indexing="ij")] = cut.to(into)
    return result
