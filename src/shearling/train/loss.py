"""Losses through the output head, a chunk of tokens at a time: no full logits tensor exists.

Shapes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shearling.train.head import Head

#: label of a position that has no target
IGNORE = -100

Divergence = Literal["forward", "reverse", "jensen-shannon"]
#: (logits [n, V], rows, whether the slope is wanted) -> (loss, its derivative by the logits or None)
ChunkLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]


def chunked_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    softcap: float | None = None,
    chunk: int = 512,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of ``labels`` [...] under the logits of ``hidden`` [..., D] and ``head_weight`` [V, D].

    Positions labelled -100 do not count; where all are, the loss is 0. ``labels`` are not shifted here. Products are
    in the autocast type (else the type of ``hidden``), everything after them in float32 (float64 for float64 input).
    Gradients are computed in the forward pass, chunk by chunk, and scaled in the backward one.
    """
    labels = labels.reshape(-1)
    count = (labels != IGNORE).sum().clamp(min=1)

    def chunk_loss(logits: Tensor, rows: slice, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        ignored = (labels[rows] == IGNORE)[:, None]
        target = labels[rows][:, None].masked_fill(ignored, 0)
        norm = logits.logsumexp(1, keepdim=True)
        loss = (norm - logits.gather(1, target)).masked_fill(ignored, 0).sum() / count
        if not with_slope:
            return loss, None
        slope = (logits - norm).exp_()
        slope.scatter_add_(1, target, torch.full_like(norm, -1))
        return loss, slope.masked_fill_(ignored, 0).div_(count)

    return through_head(hidden, Head(head_weight, bias, softcap), chunk_loss, chunk)


def chunked_divergence(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    labels: Tensor,
    temperature: float = 1.0,
    chunk: int = 512,
    kind: Divergence = "forward",
) -> Tensor:
    """Mean divergence between teacher and student at a temperature, times its square (Hinton et al. 2015).

    ``kind`` is ``forward``, KL(teacher || student), ``reverse``, KL(student || teacher), or ``jensen-shannon``, the
    mean of both against their average. ``hidden`` [..., D] and ``teacher_hidden`` [..., D'] go through their own heads;
    of a teacher's larger vocabulary the student's part counts, as a distribution of its own. Positions whose
    ``labels`` are -100 do not count. The teacher gets no gradient. Precision as in chunked_cross_entropy.
    """
    divergence = _DIVERGENCES[kind]
    ignored = (labels == IGNORE).reshape(-1)
    count = (~ignored).sum().clamp(min=1)
    taught = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
    vocab = head.weight.shape[0]
    dtype = _product_dtype(taught)
    weight = teacher_head.weight[:vocab].detach().to(dtype)
    bias = None if teacher_head.bias is None else teacher_head.bias[:vocab].detach()

    def chunk_loss(logits: Tensor, rows: slice, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        skip = ignored[rows][:, None]
        student = (logits / temperature).log_softmax(1)
        teacher = (_logits(taught[rows].to(dtype), weight, bias, teacher_head.softcap) / temperature).log_softmax(1)
        per_token, slope = divergence(student, teacher, with_slope)
        loss = per_token.masked_fill(skip, 0).sum() * (temperature**2 / count)
        return loss, None if slope is None else slope.masked_fill_(skip, 0).mul_(temperature / count)

    return through_head(hidden, head, chunk_loss, chunk)


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


def through_head(hidden: Tensor, head: Head, chunk_loss: ChunkLoss, chunk: int) -> Tensor:
    """Sum of ``chunk_loss`` over the logits of ``hidden`` [..., D], ``chunk`` rows at a time."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    # inside forward gradients are always off, so the question is asked here
    grad = torch.is_grad_enabled()
    dtype = _product_dtype(hidden)
    return _ThroughHead.apply(flat, head.weight, head.bias, head.softcap, chunk_loss, chunk, dtype, grad)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Logits in float32 (float64 for float64 input)."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if bias is not None:
        logits = logits + bias
    return logits if softcap is None else (logits / softcap).tanh_().mul_(softcap)


class _ThroughHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        chunk_loss: ChunkLoss,
        chunk: int,
        dtype: torch.dtype,
        grad: bool,
    ) -> Tensor:
        with_hidden, with_weight, with_bias = (grad and needed for needed in ctx.needs_input_grad[:3])
        with_slope = with_hidden or with_weight or with_bias
        total_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=total_dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=total_dtype) if with_weight else None
        grad_bias = torch.zeros_like(bias, dtype=total_dtype) if with_bias and bias is not None else None
        # products are cast by hand: under autocast the additions below would be cast too
        with torch.autocast(hidden.device.type, enabled=False):
            cast = weight.to(dtype)
            for start in range(0, len(hidden), chunk):
                rows = slice(start, min(start + chunk, len(hidden)))
                states = hidden[rows].to(dtype)
                logits = _logits(states, cast, bias, softcap)
                value, slope = chunk_loss(logits, rows, with_slope)
                loss += value
                if slope is None:
                    continue
                if softcap is not None:
                    slope = slope.mul_(1 - (logits / softcap).square_())
                if grad_bias is not None:
                    grad_bias += slope.sum(0)
                slope = slope.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = slope @ cast
                if grad_weight is not None:
                    grad_weight += slope.T @ states
        found = (grad_hidden, grad_weight, grad_bias)
        ctx.save_for_backward(*(g for g in found if g is not None))
        ctx.present = tuple(g is not None for g in found)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        saved = iter(ctx.saved_tensors)
        grads = [next(saved) if present else None for present in ctx.present]
        scaled = (None if g is None else (g * grad_loss).to(d) for g, d in zip(grads, ctx.dtypes, strict=True))
        return (*scaled, None, None, None, None, None)
