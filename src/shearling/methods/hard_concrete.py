"""Hard-concrete gates (Louizos, Welling and Kingma, arXiv 1712.01312), as Sheared LLaMA has them.

    s = sigmoid((log u - log(1 - u) + a) / beta),   z = clip(s (zeta - gamma) + gamma, 0, 1),   u uniform in (0, 1)
    q(a) = P(z = 0) = sigmoid(beta log(-gamma / zeta) - a)

a is the log-alpha of a gate; it is held within +-log 100, where q has the extremes q_min = 0.0020 and q_max = 0.9529. A
mean of q that meets a target with all gates at their extremes has more gates closed than the target says: the units
that a cut keeps would be up to 5 % dead. ``sparsity`` therefore counts (q - q_min) / (q_max - q_min) unless it is told
otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3
#: bound of log-alpha
LIMIT = math.log(100)
#: bound of the noise, and of q
EPS = 1e-6


def sample(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """z for noise drawn uniformly from (0, 1)."""
    smooth = torch.sigmoid((noise.logit(EPS) + log_alpha) / BETA)
    return (smooth * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def closed(log_alpha: Tensor) -> Tensor:
    """q(a), the probability that a gate is zero."""
    return torch.sigmoid(BETA * math.log(-GAMMA / ZETA) - log_alpha).clamp(EPS, 1 - EPS)


#: q at the bounds of log-alpha
_LOW, _HIGH = closed(torch.tensor([LIMIT, -LIMIT], dtype=torch.float64)).tolist()


def share_closed(log_alpha: Tensor, *, corrected: bool = True) -> Tensor:
    """What a gate counts of a closed one: q, ``corrected`` so that it runs from 0 to 1."""
    found = closed(log_alpha)
    return (found - _LOW) / (_HIGH - _LOW) if corrected else found


def sparsity(log_alpha: Tensor, *, corrected: bool = True) -> Tensor:
    """Expected share of closed gates along the last axis."""
    return share_closed(log_alpha, corrected=corrected).mean(-1)


def settled(log_alpha: Tensor) -> Tensor:
    """What a gate is without noise, before any is closed: sigmoid(0.8 a / beta)."""
    return torch.sigmoid(0.8 * log_alpha / BETA)


def most_open(log_alpha: Tensor, keep: int) -> Tensor:
    """Bool mask of the ``keep`` largest along the last axis; of equals the first."""
    order = log_alpha.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(log_alpha, dtype=torch.bool).scatter_(-1, order[..., :keep], True)
