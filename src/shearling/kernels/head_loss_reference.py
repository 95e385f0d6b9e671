"""Cross-entropy and divergence of rows of logits, and their slope, in plain PyTorch. Shapes: n rows, V vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shearling.kernels.terms import IGNORE, Terms


def head_loss_reference(
    student: Tensor,
    labels: Tensor,
    count: Tensor,
    terms: Terms,
    teacher: Tensor | None = None,
    *,
    with_slope: bool = True,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy [n] and divergence [n] of every row, unweighted; the weighted slope replaces ``student`` [n, V].

    ``labels`` [n] are int64: rows labelled -100 give 0. ``teacher`` [n, V] is read where there is a divergence. The
    slope is the derivative of the ``terms``, summed over rows and divided by ``count`` [], by the student's logits, in
    their type; without ``with_slope`` they stay as they are. Computed in float32 (float64 for float64 logits). A row
    with a logit that is not finite gives NaN.
    """
    wide = _wide(student)
    capped = _cap(wide, terms.softcap)
    skip = (labels == IGNORE)[:, None]
    entropy = divergence = wide.new_zeros(len(wide), 1)
    # nothing to add to a sound row; a soft cap would hide infinities
    broken = wide.sum(1, keepdim=True).mul_(0)
    slopes = []
    if terms.cross_entropy:
        value, slope = _cross_entropy(capped, labels[:, None].masked_fill(skip, 0), with_slope)
        entropy = (value + broken).masked_fill(skip, 0)
        if slope is not None:
            slopes.append(slope.masked_fill_(skip, 0).div_(count / terms.cross_entropy))
    if terms.divergence:
        assert teacher is not None, "a divergence needs a teacher"
        theirs = _wide(teacher)
        temperature = terms.temperature
        student_log = (capped / temperature).log_softmax(1)
        teacher_log = (_cap(theirs, terms.teacher_softcap) / temperature).log_softmax(1)
        value, slope = _DIVERGENCES[terms.kind](student_log, teacher_log, with_slope)
        divergence = (value + broken + theirs.sum(1, keepdim=True).mul_(0)).masked_fill(skip, 0)
        if slope is not None:
            slopes.append(slope.masked_fill_(skip, 0).mul_(terms.divergence * temperature / count))
    if slopes:
        total = slopes[0] if len(slopes) == 1 else slopes[0].add_(slopes[1])
        if terms.softcap is not None:
            total = total.mul_(1 - (capped / terms.softcap).square_())
        student.copy_(total)
    return entropy[:, 0], divergence[:, 0]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else (logits / softcap).tanh_().mul_(softcap)


def _cross_entropy(logits: Tensor, target: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    norm = logits.logsumexp(1, keepdim=True)
    value = norm - logits.gather(1, target)
    if not with_slope:
        return value, None
    slope = (logits - norm).exp_()
    return value, slope.scatter_add_(1, target, torch.full_like(norm, -1))


# Each takes log-probabilities log s and log t [n, V] and gives the divergence [n, 1] and its derivative by the
# student's logits at temperature 1. A function f(s) of the softmax s has the derivative s (f' - sum_j s_j f'_j).


def _forward(student: Tensor, teacher: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    share = teacher.exp()
    value = (share * (teacher - student)).sum(1, keepdim=True)
    return value, student.exp_().sub_(share) if with_slope else None


def _reverse(student: Tensor, teacher: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    share, gap = student.exp(), student - teacher
    value = (share * gap).sum(1, keepdim=True)
    return value, gap.sub_(value).mul_(share) if with_slope else None


def _jensen_shannon(student: Tensor, teacher: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    middle = torch.logaddexp(student, teacher).sub_(math.log(2))
    share, gap = student.exp(), student - middle
    own = (share * gap).sum(1, keepdim=True)
    value = (own + (teacher.exp() * (teacher - middle)).sum(1, keepdim=True)) / 2
    return value, gap.sub_(own).mul_(share).div_(2) if with_slope else None


_DIVERGENCES = {"forward": _forward, "reverse": _reverse, "jensen-shannon": _jensen_shannon}
