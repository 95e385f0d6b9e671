"""How far a model has moved from a reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shearling.errors import ShearlingError
from shearling.evaluate.checks import check_length, check_windows
from shearling.evaluate.logits import evaluating, logits_in_pieces, vocabulary


@dataclass(frozen=True)
class Divergence:
    """``kl`` = KL(reference || model) in mean nats a token; ``agreement`` = share of equal argmaxes, in 0..1."""

    kl: float
    agreement: float
    tokens: int


def divergence(
    model: PreTrainedModel, reference: PreTrainedModel, tokens: Tensor, *, context: int, batch: int = 1
) -> Divergence:
    """Mean KL(reference || model) over the next-token distributions of disjoint windows of ``tokens`` (int64 [N]).

    The ``context - 1`` distributions of a window that perplexity scores are compared; the incomplete tail of the
    text is dropped. The models may sit on different devices. Log-probabilities are fp32, their sums fp64.

    Raises ShearlingError for vocabularies of different size, a text shorter than one window, more tokens than
    learned positions, and a divergence that is not finite.
    """
    if vocabulary(model) != vocabulary(reference):
        raise ShearlingError(
            f"divergence: the model has {vocabulary(model)} logits and its reference {vocabulary(reference)}; "
            "both must share one vocabulary"
        )
    check_windows(model, tokens, context=context, batch=batch, what="divergence")
    check_length(reference, context, "divergence: context")
    windows_WT = tokens.unfold(0, context, context)
    kl, agreed, num_compared = 0.0, 0.0, 0
    with evaluating(model), evaluating(reference):
        for start in range(0, windows_WT.shape[0], batch):
            ids_BT = windows_WT[start : start + batch]
            select_BT = torch.ones(ids_BT.shape, dtype=torch.bool)
            select_BT[:, -1] = False
            sums_2 = _sums(model, reference, ids_BT, select_BT)
            kl += sums_2[0].item()
            agreed += sums_2[1].item()
            num_compared += int(select_BT.sum())
    if not math.isfinite(kl):
        raise ShearlingError("divergence: not finite; look for NaN in the weights or use a wider dtype")
    return Divergence(kl=kl / num_compared, agreement=agreed / num_compared, tokens=num_compared)


def _sums(model: PreTrainedModel, reference: PreTrainedModel, ids_BT: Tensor, select_BT: Tensor) -> Tensor:
    """Summed divergence in nats and number of equal argmaxes, fp64 [2]."""
    parts = [
        _piece(logits_nV, logits_of_reference_nV.to(logits_nV.device))
        for logits_nV, logits_of_reference_nV in zip(
            logits_in_pieces(model, ids_BT, select_BT), logits_in_pieces(reference, ids_BT, select_BT), strict=True
        )
    ]
    return torch.stack(parts).sum(0)


def _piece(logits_nV: Tensor, logits_of_reference_nV: Tensor) -> Tensor:
    agreed = (logits_nV.argmax(-1) == logits_of_reference_nV.argmax(-1)).double().sum()
    log_q_nV = logits_nV.log_softmax(-1)
    log_p_nV = logits_of_reference_nV.log_softmax(-1)
    kl = (log_p_nV.exp() * (log_p_nV - log_q_nV)).sum(dtype=torch.float64)
    return torch.stack((kl, agreed))
