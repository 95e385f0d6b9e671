"""TRAWL (arXiv 2406.17261): weights of one shape, stacked, become a tensor of low rank, and with it the model changes.

    T [n, O, I]    n weights of a block's attention or feed-forward layer, those that read the other way transposed
    CP             T ~ sum_r  c_r (x) a_r (x) b_r                      R terms, by alternating least squares
    Tucker         T ~ G x_2 A x_3 B                                   shares of O and of I, by orthogonal iteration
    SVD            every weight by itself (LASER, arXiv 2312.13558)    rank R, the comparison

The shapes stay, so nothing becomes smaller or faster: the claim is that what is left out is noise, most of all in the
feed-forward layers of late blocks. R is a share of the smaller side. The paper does not say how CP starts; here
from the singular vectors of the weights side by side.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from shearling.anatomy import Anatomy, anatomy_of
from shearling.errors import ShearlingError
from shearling.methods.projections import as_out_in
from shearling.plan import Delta, Outcome, inventory_of, plan_of
from shearling.recipe import Denoise

#: alternations; what is captured hardly moves after these
ALTERNATIONS = 30


def plan_trawl(model: Any, settings: Denoise, *, name: str = "") -> Outcome:
    """New values for the weights of the chosen blocks; the model is left as it is.

    Raises ShearlingError for a block that the model has not.
    """
    anatomy = anatomy_of(model.config)
    values: dict[str, Tensor] = {}
    for layer in chosen_layers(anatomy, settings):
        weights = {path: as_out_in(anatomy, model.get_parameter(path)) for path in weights_of(anatomy, layer, settings)}
        for paths, turned in stacks({path: weight.shape for path, weight in weights.items()}):
            stack = torch.stack([weights[p].T if p in turned else weights[p] for p in paths])
            for path, found in zip(paths, denoised(stack, settings.rank, settings.method), strict=True):
                weight = found.T if path in turned else found
                values[path] = as_out_in(anatomy, weight.to(weights[path].dtype)).contiguous().cpu()
    edits = (Delta(values),)
    return Outcome(plan_of(name, settings.method, anatomy, inventory_of(model), edits), edits)


def chosen_layers(anatomy: Anatomy, settings: Denoise) -> list[int]:
    """The blocks in their order, each counted from 0; a recipe may count from the end."""
    last = anatomy.num_layers
    for layer in settings.layers:
        if not -last <= layer < last:
            raise ShearlingError(
                f"denoise.layers: {layer} is no block; the model has 0 to {last - 1}, or -{last} to -1"
            )
    return sorted({layer % last for layer in settings.layers})


def weights_of(anatomy: Anatomy, layer: int, settings: Denoise) -> list[str]:
    """Weights of a block's part, by their full names."""
    family = anatomy.family
    if settings.part == "ffn":
        linears = (*family.ffn_inputs, family.ffn_output)
    else:
        linears = (*family.attention_inputs, family.attention_output)
    return [f"{anatomy.path(layer, linear)}.weight" for linear in linears]


def stacks(shapes: dict[str, tuple[int, ...]]) -> list[tuple[list[str], set[str]]]:
    """Names that become one tensor, and those of them that are transposed for it: weights of one shape either way."""

    def kind(path: str) -> tuple[int, ...]:
        return tuple(sorted(shapes[path]))

    found = []
    for _, group in groupby(sorted(shapes, key=kind), key=kind):
        paths = list(group)
        found.append((paths, {path for path in paths if shapes[path] != shapes[paths[0]]}))
    return found


@torch.no_grad()
def denoised(stack_nOI: Tensor, share: float, method: str) -> Tensor:
    """The tensor's approximation of rank R (``cp``, ``tucker``, or ``svd`` of each matrix), float32 inside."""
    tensor = stack_nOI.float()
    outputs, inputs = (max(1, round(share * size)) for size in tensor.shape[1:])
    rank = min(outputs, inputs)
    match method:
        case "svd":
            u, s, v = torch.linalg.svd(tensor, full_matrices=False)
            return (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]
        case "tucker":
            a, b = _sides(tensor, outputs, inputs, ALTERNATIONS)
            return a @ (a.T @ tensor @ b) @ b.T
        case _:
            return _cp(tensor, rank)


def _sides(tensor: Tensor, outputs: int, inputs: int, alternations: int) -> tuple[Tensor, Tensor]:
    """Orthonormal A [O, outputs] and B [I, inputs] that capture much of all matrices; alternations capture more."""
    a, b = _leading((tensor @ tensor.mT).sum(0), outputs), _leading((tensor.mT @ tensor).sum(0), inputs)
    for _ in range(alternations):
        half = tensor @ b
        a = _leading((half @ half.mT).sum(0), outputs)
        half = tensor.mT @ a
        b = _leading((half @ half.mT).sum(0), inputs)
    return a, b


def _cp(tensor: Tensor, rank: int) -> Tensor:
    """CP of that rank by alternating least squares: sum_r c_r a_r b_r^T."""
    a, b = _sides(tensor, rank, rank, 0)
    c = (tensor @ b * a).sum(1)
    for _ in range(ALTERNATIONS):
        a = _least((tensor @ b * c[:, None]).sum(0), (c.T @ c) * (b.T @ b))
        b = _least((tensor.mT @ a * c[:, None]).sum(0), (c.T @ c) * (a.T @ a))
        c = _least((tensor @ b * a).sum(1), (a.T @ a) * (b.T @ b))
    return (c[:, None] * a) @ b.T


def _least(right: Tensor, gram: Tensor) -> Tensor:
    """X of X gram = right; terms that have become alike share what they do."""
    return (torch.linalg.pinv(gram.double(), hermitian=True) @ right.double().T).T.float()


def _leading(gram: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh(gram.double()).eigenvectors[:, -rank:].float()
