"""SLoRB: a low-rank branch beside a sparse linear, y += S (X x), that starts from what the mask took away.

AST (arXiv 2407.20584) puts the branch there and trains it with the weights that stay. With M = W - W_kept, which is
[out, in], the factors start as one of

    block mean        X[i, ik .. ik+k-1] = 1,  S[n, i] = mean of M[n, ik .. ik+k-1]        the paper's, k = 16
    truncated SVD     S X = U_r U_r^T M,  U_r the leading left singular vectors of M       min ||M - S X||^2
    activation SVD    S X = U_r U_r^T M,  U_r those of M L,  L L^T = H + lam I             min ||(M - S X) L||^2

H is the Gram matrix of the linear's inputs and lam a share of its mean diagonal. The rows of the paper's X are
orthogonal and |X_i|^2 = k, so its S = M X^T / k is the least squares one, with the zeros where weights stayed counted.
With a diagonal H the third is SLiM-LoRA (arXiv 2410.09615). ``down`` is X and ``up`` is S everywhere. The branch is no
part of the sparse matrix: merged, it would fill the zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shearling.errors import ShearlingError
from shearling.methods.obs import ridge
from shearling.plan import Adapters


def block_mean(missing_OI: Tensor, size: int = 16) -> tuple[Tensor, Tensor]:
    """``down`` [I / size, I], which sums blocks of ``size`` inputs, and ``up`` [O, I / size], the mean of each block.

    Raises ShearlingError where blocks do not fill the inputs.
    """
    inputs = missing_OI.shape[1]
    if size < 1 or inputs % size:
        raise ShearlingError(f"block size {size}: must be at least 1 and divide the linear's {inputs} inputs")
    up = missing_OI.double().unflatten(1, (-1, size)).mean(-1)
    down = torch.eye(inputs // size, dtype=torch.float32, device=missing_OI.device).repeat_interleave(size, 1)
    return down, up.float()


def truncated_svd(missing_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``down`` [R, I] and ``up`` [O, R] of the best approximation; each has the square roots of the singular values.

    Raises ShearlingError for a rank that the matrix cannot have.
    """
    _check_rank(missing_OI, rank)
    return _balanced(*_leading(missing_OI.double(), rank))


def activation_svd(missing_OI: Tensor, gram_II: Tensor, rank: int, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """``down`` [R, I] and ``up`` [O, R] of the best approximation on inputs with that Gram matrix, or any multiple.

    Raises ShearlingError for a rank that the matrix cannot have, and when the damped Gram matrix is not positive
    definite.
    """
    _check_rank(missing_OI, rank)
    system = gram_II.double().clone()
    system.diagonal().add_(ridge(system, damping))
    try:
        factor = torch.linalg.cholesky(system)
    except torch.linalg.LinAlgError as error:
        raise ShearlingError(
            f"activation SVD: the Gram matrix is not positive definite at damping {damping:g}; use more text"
        ) from error
    up, down = _leading(missing_OI.double() @ factor, rank)
    return _balanced(up, torch.linalg.solve_triangular(factor, down, upper=False, left=False))


def overhead(adapters: Adapters, *, down_trained: bool) -> float:
    """Parameters of the branches over those of the weights they stand beside; ``down`` counts where it is trained."""
    added = of = 0
    for path, up in adapters.up.items():
        down = adapters.down[path]
        added += up.numel() + (down.numel() if down_trained else 0)
        of += up.shape[0] * down.shape[1]
    return added / of


def _leading(matrix_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [O, R] and [R, I] of the best rank-R approximation, components in falling order; one is orthonormal.

    By the eigenvectors of the smaller product of the matrix with itself, which cost less than singular vectors. Small
    singular values come out inexact, but what is captured falls short only by rounding of the whole.
    """
    if matrix_OI.shape[0] > matrix_OI.shape[1]:
        right, left = _leading(matrix_OI.T, rank)
        return left.T, right.T
    vectors = torch.linalg.eigh(matrix_OI @ matrix_OI.T).eigenvectors[:, -rank:].flip(1)
    return vectors, vectors.T @ matrix_OI


def _balanced(up_OR: Tensor, down_RI: Tensor) -> tuple[Tensor, Tensor]:
    """(down, up) with the same product, in float32, where a component has the same norm in both.

    A component that is zero keeps its other factor: with both zero neither would get a gradient.
    """
    share = (down_RI.norm(dim=1) / up_OR.norm(dim=0)).sqrt()
    share = torch.where((share > 0) & share.isfinite(), share, 1.0)
    return (down_RI / share[:, None]).float().contiguous(), (up_OR * share).float().contiguous()


def _check_rank(matrix_OI: Tensor, rank: int) -> None:
    limit = min(matrix_OI.shape)
    if not 1 <= rank <= limit:
        raise ShearlingError(f"rank {rank}: a {list(matrix_OI.shape)} matrix takes ranks from 1 to {limit}")
