"""Losses through the output head, a chunk of tokens at a time: no full logits tensor exists.

Shapes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shearling.kernels import IGNORE, Divergence, Terms, triton_usable
from shearling.kernels.head_loss_reference import head_loss_reference
from shearling.train.head import Head

#: tokens at a time where losses are computed in plain PyTorch
PLAIN_CHUNK = 512
#: bytes of a chunk's logits that the kernel gets: as many tokens as keep the gradient of the weight, which every
#: chunk reads and writes whole, cheap beside the products
FUSED_BYTES = 2**28


#: (logits [n, V], rows, whether the slope is wanted) -> (loss, its derivative by the logits or None)
ChunkLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]


class HeadLoss(NamedTuple):
    """The weighted sum of two losses, and both unweighted, which carry no gradient."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor


def chunked_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    softcap: float | None = None,
    chunk: int | None = None,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of ``labels`` [...] under the logits of ``hidden`` [..., D] and ``head_weight`` [V, D].

    Positions labelled -100 do not count; where all are, the loss is 0. ``labels`` are not shifted here. Products are
    in the autocast type (else the type of ``hidden``), everything after them in float32 (float64 for float64 input).
    Where Triton is, logits and their slopes are kept in the type of the products, and one kernel takes them. ``chunk``
    is the number of tokens at a time: without it 512, for the kernel as many as fill 128 to 256 MiB with logits.
    Gradients are computed in the forward pass, chunk by chunk, and scaled in the backward one.
    """
    return _head_loss(hidden, Head(head_weight, bias, softcap), labels, Terms(softcap=softcap), None, chunk).total


def chunked_divergence(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    labels: Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    kind: Divergence = "forward",
) -> Tensor:
    """Mean divergence between teacher and student at a temperature, times its square (Hinton et al. 2015).

    ``kind`` is ``forward``, KL(teacher || student), ``reverse``, KL(student || teacher), or ``jensen-shannon``, the
    mean of both against their average. ``hidden`` [..., D] and ``teacher_hidden`` [..., D'] go through their own heads;
    of a teacher's larger vocabulary the student's part counts, as a distribution of its own. Positions whose
    ``labels`` are -100 do not count. The teacher gets no gradient. Precision and ``chunk`` as in chunked_cross_entropy.
    """
    return chunked_head_loss(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        labels,
        temperature,
        chunk,
        kind,
        cross_entropy_weight=0.0,
        divergence_weight=1.0,
    ).total


def chunked_head_loss(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    labels: Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    kind: Divergence = "forward",
    *,
    cross_entropy_weight: float,
    divergence_weight: float,
) -> HeadLoss:
    """chunked_cross_entropy and chunked_divergence in one pass through the student's head.

    ``total`` is their sum with the weights given. A loss of weight 0 is not computed and is 0.
    """
    terms = Terms(
        cross_entropy_weight,
        divergence_weight,
        kind,
        temperature,
        softcap=head.softcap,
        teacher_softcap=teacher_head.softcap,
    )
    taught = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
    vocab = head.weight.shape[0]
    bias = None if teacher_head.bias is None else teacher_head.bias[:vocab].detach()
    teacher = _Teacher(taught, teacher_head.weight[:vocab].detach(), bias, _product_dtype(taught))
    return _head_loss(hidden, head, labels, terms, teacher, chunk)


@dataclass(frozen=True)
class _Teacher:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype


def through_head(hidden: Tensor, head: Head, loss: ChunkLoss, chunk: int = PLAIN_CHUNK) -> Tensor:
    """The sum of a loss over chunks of tokens, each with logits [chunk, V] of its own, under their soft cap.

    ``hidden`` is [..., D]. Precision and gradients as in chunked_cross_entropy; the slope that ``loss`` returns goes on
    to ``hidden``, weight and bias.
    """
    softcap = head.softcap

    def uncapped(logits: Tensor, rows: slice, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        if softcap is None:
            value, slope = loss(logits, rows, with_slope)
        else:
            logits = (logits / softcap).tanh_().mul_(softcap)
            value, slope = loss(logits, rows, with_slope)
            slope = None if slope is None else slope.mul_(1 - (logits / softcap).square_())
        return value[None], slope

    task = _Task(uncapped, (1.0,), chunk, _product_dtype(hidden), fused=False, grad=torch.is_grad_enabled())
    return _ThroughHead.apply(hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias, task)[0]


@dataclass(frozen=True)
class _Task:
    """What goes through the head beside tensors with gradients; ``dtype`` is that of the products.

    ``loss`` gives the ``weights``' summands and the slope, by logits that are not capped yet: as the product wrote them
    where it is ``fused``, else in float32 or float64.
    """

    loss: ChunkLoss
    weights: tuple[float, ...]
    chunk: int
    dtype: torch.dtype
    fused: bool
    #: inside forward gradients are always off
    grad: bool


def _head_loss(
    hidden: Tensor, head: Head, labels: Tensor, terms: Terms, teacher: _Teacher | None, chunk: int | None
) -> HeadLoss:
    dtype = _product_dtype(hidden)
    dtypes = [dtype] if teacher is None else [dtype, teacher.dtype]
    fused = triton_usable(hidden) and torch.float64 not in dtypes
    chunk = chunk or (_fused_chunk(len(head.weight), dtype) if fused else PLAIN_CHUNK)
    labels = labels.reshape(-1)
    count = (labels != IGNORE).sum().clamp(min=1)
    theirs = None if teacher is None else teacher.weight.to(teacher.dtype)
    carry_out = _implementation(fused)

    def loss(logits: Tensor, rows: slice, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        taught = None
        if teacher is not None and theirs is not None:
            taught = _logits(teacher.hidden[rows].to(teacher.dtype), theirs, teacher.bias, fused)
        entropy, divergence = carry_out(logits, labels[rows], count, terms, taught, with_slope=with_slope)
        values = torch.stack([entropy.sum() / count, divergence.sum() * (terms.temperature**2 / count)])
        # the logits hold their slope now
        return values, logits if with_slope else None

    weights = (terms.cross_entropy, terms.divergence)
    task = _Task(loss, weights, chunk, dtype, fused, grad=torch.is_grad_enabled())
    total, values = _ThroughHead.apply(hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias, task)
    return HeadLoss(total, *values)


def _fused_chunk(vocab: int, dtype: torch.dtype) -> int:
    """The power of two whose rows of logits fill between half of FUSED_BYTES and all of it."""
    return 1 << max(FUSED_BYTES // (vocab * dtype.itemsize), 1).bit_length() - 1


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _implementation(fused: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    if not fused:
        return head_loss_reference
    # imports Triton
    from shearling.kernels.head_loss import head_loss

    return head_loss


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, fused: bool) -> Tensor:
    """Logits as the product wrote them for the kernel, else in float32 (float64 for float64 input)."""
    if fused:
        return hidden @ weight.T if bias is None else torch.addmm(bias.to(hidden.dtype), hidden, weight.T)
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if bias is None else logits + bias


def _add_product_(total: Tensor, slope: Tensor, states: Tensor) -> None:
    """total [V, D] += slope^T states. On a GPU no product of that size is kept, and half precision sums in float32."""
    if not slope.is_cuda:
        total += slope.T @ states
    elif slope.dtype == total.dtype:
        total.addmm_(slope.T, states)
    else:
        torch.addmm(total, slope.T, states, out_dtype=total.dtype, out=total)


class _ThroughHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task) -> tuple[Tensor, Tensor]:
        with_hidden, with_weight, with_bias = (task.grad and needed for needed in ctx.needs_input_grad[:3])
        with_slope = with_hidden or with_weight or with_bias
        dtype = task.dtype
        total_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        values = torch.zeros(len(task.weights), dtype=total_dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=total_dtype) if with_weight else None
        grad_bias = torch.zeros_like(bias, dtype=total_dtype) if with_bias and bias is not None else None
        # products are cast by hand: under autocast the additions below would be cast too
        with torch.autocast(hidden.device.type, enabled=False):
            cast = weight.to(dtype)
            for start in range(0, len(hidden), task.chunk):
                rows = slice(start, min(start + task.chunk, len(hidden)))
                states = hidden[rows].to(dtype)
                found, slope = task.loss(_logits(states, cast, bias, task.fused), rows, with_slope)
                values += found
                if slope is None:
                    continue
                if grad_bias is not None:
                    grad_bias += slope.sum(0, dtype=total_dtype)
                # the kernel's are of that type already
                slope = slope.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = slope @ cast
                if grad_weight is not None:
                    _add_product_(grad_weight, slope, states)
                # before the next chunk makes its own
                del slope
        grads = (grad_hidden, grad_weight, grad_bias)
        ctx.save_for_backward(*(g for g in grads if g is not None))
        ctx.present = tuple(g is not None for g in grads)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(values)
        total = torch.stack([part * share for part, share in zip(values, task.weights, strict=True)]).sum()
        return total, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        saved = iter(ctx.saved_tensors)
        grads = [next(saved) if present else None for present in ctx.present]
        scaled = (None if g is None else (g * grad_loss).to(d) for g, d in zip(grads, ctx.dtypes, strict=True))
        return (*scaled, None)
