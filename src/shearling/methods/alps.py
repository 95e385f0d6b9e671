"""ALPS (arXiv 2406.07831): a linear's mask and values found together by ADMM, then its values by conjugate gradients.

W, W^      new and dense weight, a row for each output
H          X X^T + lam I of the inputs, scaled so that its diagonal is 1
D, V       the copy of W that follows the pattern, and the multipliers of W = D
rho        the penalty, which rises the slower the fewer weights change sides (Section 3.2)

W <- (W^ H - V + rho D) (H + rho I)^-1,   D <- P(W + V / rho),   V <- V + rho (W - D)          (Eq. 4)
"""

from __future__ import annotations

import torch
from torch import Tensor

from shearling.errors import ShearlingError
from shearling.methods.sparse import Sparse
from shearling.plan.patterns import Pattern, mask_of

#: penalty at the start; how often it rises, and by what while more than a share of the kept weights changed sides
RHO, EVERY = 0.1, 3
RISES = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
#: rounds of ADMM at most, and steps of conjugate gradients after them
ROUNDS, STEPS = 300, 30


@torch.no_grad()
def alps(weight_OI: Tensor, gram_II: Tensor, pattern: Pattern | float, damping: float = 0.01) -> Sparse:
    """Prune a weight to an N:M pattern, or to a share of each row, with its inputs' Gram matrix.

    The decomposition of H runs in float64, everything else in float32 at least. Inputs that never fired lose their
    weights. Raises ShearlingError for a Gram matrix that is zero or not finite.
    """
    gram = gram_II.to(torch.float64, copy=True)
    mean = gram.diagonal().mean()
    if not torch.isfinite(mean) or mean <= 0:
        raise ShearlingError("alps: the inputs of a linear are all zero or not finite on the calibration text")
    dead = gram.diagonal() == 0
    gram.diagonal().add_(damping * mean)
    scale = gram.diagonal().rsqrt()
    gram.mul_(scale[:, None]).mul_(scale)
    values, vectors = torch.linalg.eigh(gram)
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    values, vectors, gram, scale = (t.to(dtype) for t in (values, vectors, gram, scale))
    dense = weight_OI.to(dtype).masked_fill(dead, 0.0) / scale
    pull = dense @ gram

    def project(matrix: Tensor) -> Tensor:
        # in the scaled problem as in the paper: a weight matters by what it adds to the output
        return mask_of(matrix.square(), pattern)

    mask = project(dense)
    kept = torch.where(mask, dense, 0.0)
    multiplier = torch.zeros_like(dense)
    rho, before = RHO, mask
    for number in range(1, ROUNDS + 1):
        new = ((pull - multiplier + rho * kept) @ vectors / (values + rho)) @ vectors.T
        moved = new + multiplier / rho
        mask = project(moved)
        kept = torch.where(mask, moved, 0.0)
        multiplier += rho * (new - kept)
        if number % EVERY == 0:
            changed = float((mask & ~before).sum()) / float(mask.sum())
            before = mask
            if not changed:
                break
            rho *= next(rise for share, rise in RISES if changed > share)
    kept = _refined(kept, mask, pull, gram)
    weight = torch.where(mask, kept * scale, 0.0)
    return Sparse(weight.to(weight_OI.dtype), mask, damping)


def _refined(start: Tensor, mask: Tensor, pull: Tensor, gram: Tensor) -> Tensor:
    """Rows w of W H ~ pull, least squares over what the mask keeps, by conjugate gradients for all rows at once."""
    weight = start.clone()
    residual = (pull - weight @ gram).masked_fill_(~mask, 0.0)
    direction = residual.clone()
    size = residual.square().sum(1, keepdim=True)
    for _ in range(STEPS):
        image = (direction @ gram).masked_fill_(~mask, 0.0)
        curve = (direction * image).sum(1, keepdim=True)
        # rows that are solved stay where they are
        step = torch.where(curve > 0, size / curve, 0.0)
        weight += step * direction
        residual -= step * image
        new = residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(size > 0, new / size, 0.0) * direction
        size = new
    return weight
