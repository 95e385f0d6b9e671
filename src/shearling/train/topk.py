"""The divergence from a teacher of whom only the likeliest tokens of each position are known."""

from __future__ import annotations

import math

from torch import Tensor

from shearling.train.head import Head
from shearling.train.loss import IGNORE, PLAIN_CHUNK, through_head

#: least probability of the tokens that are not among the likeliest: rounded ones may add up to 1 or a little more
REST_FLOOR = 1e-8


def chunked_topk_divergence(
    hidden: Tensor, head: Head, log_probs: Tensor, ids: Tensor, labels: Tensor, chunk: int = PLAIN_CHUNK
) -> Tensor:
    """Mean KL(teacher || student) over the teacher's k likeliest tokens and one bucket of all others.

    The teacher's share p_i of token ``ids[..., i]`` is ``exp(log_probs[..., i])``, that of the bucket
    r = max(1 - sum_i p_i, 1e-8); where k = V there is no bucket. Merging tokens makes the divergence no larger than
    that of the whole distributions. ``hidden`` [..., D], ``log_probs`` and ``ids`` [..., k], no token twice. Positions
    whose ``labels`` are -100 do not count. Precision as in chunked_cross_entropy.
    """
    k, vocab = ids.shape[-1], head.weight.shape[0]
    ignored = (labels == IGNORE).reshape(-1)
    count = (~ignored).sum().clamp(min=1)
    ids, log_probs = ids.reshape(-1, k), log_probs.reshape(-1, k)

    def chunk_loss(logits: Tensor, rows: slice, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        skip, top = ignored[rows][:, None], ids[rows]
        taught = log_probs[rows].to(logits.dtype)
        share = taught.exp()
        norm = logits.logsumexp(1, keepdim=True)
        mass = share.sum(1, keepdim=True)
        per_token = (share * (taught - logits.gather(1, top) + norm)).sum(1, keepdim=True)
        slope = None
        if k < vocab:
            # the others' own sum: 1 minus the sum of the likeliest has no digits left where the student is sure
            others = logits.scatter(1, top, -math.inf)
            rest_norm = others.logsumexp(1, keepdim=True)
            rest = (1 - mass).clamp_(min=REST_FLOOR)
            per_token = per_token + rest * (rest.log() - rest_norm + norm)
            mass = mass + rest
            if with_slope:
                slope = others.sub_(rest_norm).exp_().mul_(-rest)
        loss = per_token.masked_fill(skip, 0).sum() / count
        if not with_slope:
            return loss, None
        pulled = (logits - norm).exp_().mul_(mass)
        slope = pulled if slope is None else slope.add_(pulled)
        slope.scatter_add_(1, top, -share)
        return loss, slope.masked_fill_(skip, 0).div_(count)

    return through_head(hidden, head, chunk_loss, chunk)
