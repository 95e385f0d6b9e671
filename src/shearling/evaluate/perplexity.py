"""Perplexity over windows of one long text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shearling.errors import ShearlingError
from shearling.evaluate.checks import check_windows
from shearling.evaluate.logits import evaluating, logits_in_pieces


@dataclass(frozen=True)
class Perplexity:
    """``value`` = exp(``nll``); ``nll`` in mean nats a token; ``tokens`` were scored, in windows of ``context``."""

    value: float
    nll: float
    tokens: int
    context: int
    stride: int


def perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    context: int,
    stride: int,
    batch: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of ``tokens`` (int64 [N]) over windows of ``context`` tokens, one starting every ``stride``.

    With ``stride == context`` the windows are disjoint and each scores its ``context - 1`` next tokens: the usual
    WikiText-2 protocol. With a smaller stride each window after the first scores only its last ``stride`` tokens,
    those no window scored before. Only whole windows count: the incomplete tail of the text is dropped.
    ``on_progress`` is called with (windows done, windows in all). Log-probabilities are fp32, their sum fp64.

    Raises ShearlingError for a text shorter than one window, a stride outside 1..context, more tokens than learned
    positions, a token id outside the vocabulary, and a loss that is not finite.
    """
    check_windows(model, tokens, context=context, batch=batch, what="perplexity")
    if not 1 <= stride <= context:
        raise ShearlingError(f"perplexity: stride {stride} must lie in 1..{context} (the context)")
    windows_WT = tokens.unfold(0, context, stride)
    num_windows = windows_WT.shape[0]
    total, num_scored = 0.0, 0
    with evaluating(model):
        for start in range(0, num_windows, batch):
            ids_BT = windows_WT[start : start + batch]
            select_BT = _unscored(ids_BT.shape, stride, first=start == 0)
            nll = _nll(model, ids_BT, select_BT)
            if not math.isfinite(nll):
                last = start + ids_BT.shape[0]
                raise ShearlingError(
                    f"perplexity: the loss is not finite in windows {start + 1}..{last} of {num_windows}; "
                    "look for NaN in the weights or use a wider dtype"
                )
            total += nll
            num_scored += int(select_BT.sum())
            if on_progress is not None:
                on_progress(start + ids_BT.shape[0], num_windows)
    mean = total / num_scored
    # torch's exp overflows to inf where math.exp raises
    value = torch.tensor(mean, dtype=torch.float64).exp().item()
    return Perplexity(value=value, nll=mean, tokens=num_scored, context=context, stride=stride)


def _unscored(shape: torch.Size, stride: int, *, first: bool) -> Tensor:
    """Positions [B, T] whose next token no earlier window has scored; ``first`` when row 0 is the text's start."""
    rows, context = shape
    select_BT = torch.zeros(rows, context, dtype=torch.bool)
    select_BT[:, max(0, context - 1 - stride) : context - 1] = True
    if first:
        select_BT[0, : context - 1] = True
    return select_BT


def _nll(model: PreTrainedModel, ids_BT: Tensor, select_BT: Tensor) -> float:
    """Summed negative log-likelihood, in nats, of the tokens after the selected positions."""
    targets_N = ids_BT.roll(-1, dims=1)[select_BT.to(ids_BT.device)]
    sums, at = [], 0
    for logits_nV in logits_in_pieces(model, ids_BT, select_BT):
        targets_n = targets_N[at : at + logits_nV.shape[0]].to(logits_nV.device)
        sums.append(torch.nn.functional.cross_entropy(logits_nV, targets_n, reduction="none").double().sum())
        at += logits_nV.shape[0]
    return torch.stack(sums).sum().item()
