"""Muon's direction (arXiv 2502.16982): the momentum of a matrix with its singular values brought near 1."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

#: of the quintic whose iteration brings singular values between 0 and 1 near 1, fast rather than exactly
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
#: root mean square of a step at a learning rate of 1, about that of Adam
_SIZE = 0.2
#: elements of the matrices that are iterated together
_TOGETHER = 2**26


@torch.no_grad()
def orthogonal_steps(momenta: Sequence[Tensor]) -> list[Tensor]:
    """What each momentum [O, I] moves its weight by at a learning rate of 1, the sign left alone, in its type.

    That is U V^T 0.2 sqrt(max(O, I)) where the momentum is U S V^T, its singular values being between 0.7 and 1.2.
    Matrices of one shape are multiplied together, on a GPU in bfloat16.
    """
    places: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, momentum in enumerate(momenta):
        places[tuple(momentum.shape)].append(place)
    found: list[Tensor] = list(momenta)
    for shape, same in places.items():
        most = max(1, _TOGETHER // (shape[0] * shape[1]))
        for start in range(0, len(same), most):
            chosen = same[start : start + most]
            steps = _orthogonal(torch.stack([momenta[place] for place in chosen]))
            for place, step in zip(chosen, steps.unbind(), strict=True):
                found[place] = step.to(momenta[place].dtype)
    return found


def _orthogonal(x_NOI: Tensor) -> Tensor:
    outputs, inputs = x_NOI.shape[1:]
    size = _SIZE * max(outputs, inputs) ** 0.5
    x_NOI = x_NOI / x_NOI.norm(dim=(1, 2), keepdim=True).clamp_min(1e-20)
    if x_NOI.is_cuda:
        x_NOI = x_NOI.bfloat16()
    # the smaller side's Gram matrix
    x = x_NOI.mT if outputs > inputs else x_NOI
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x.mT if outputs > inputs else x) * size
