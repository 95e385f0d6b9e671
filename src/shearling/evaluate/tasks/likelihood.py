"""Log-likelihoods of continuations, batched.

Shapes: B rows, T positions, n positions of one piece, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shearling.errors import ShearlingError
from shearling.evaluate.checks import longest_context
from shearling.evaluate.logits import evaluating, logits_in_pieces


@dataclass(frozen=True)
class Likelihood:
    """``log`` = log-likelihood of a continuation in nats; ``greedy``: greedy decoding would write just it."""

    log: float
    greedy: bool


@dataclass(frozen=True)
class _Request:
    """Tokens the model reads, and the tokens it should say at the last ``len(targets)`` of them."""

    read: tuple[int, ...]
    targets: tuple[int, ...]


def log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], *, batch: int
) -> list[Likelihood]:
    """Log-likelihood of each continuation after its context, ``batch`` rows at a time, longest first.

    Tokens are split as lm-eval splits them: context and continuation are encoded together, spaces that end a
    context count to the continuation, an empty context becomes the start (or end) token, and what does not fit
    the model loses its beginning. Continuations that share all tokens but their last are read once.

    Raises ShearlingError for a continuation longer than the model's context.
    """
    limit = longest_context(model)
    requests = [_request(tokenizer, context, continuation, limit) for context, continuation in pairs]
    # rows are padded on the right, behind everything that is scored: causal attention never sees it
    rows = sorted({request.read for request in requests}, key=lambda read: (-len(read), read))
    asked: dict[tuple[int, ...], list[int]] = {read: [] for read in rows}
    for index, request in enumerate(requests):
        asked[request.read].append(index)
    results: dict[int, Likelihood] = {}
    with evaluating(model):
        for start in range(0, len(rows), batch):
            reads = rows[start : start + batch]
            indices = [asked[read] for read in reads]
            scored = _score(model, reads, [[requests[i].targets for i in row] for row in indices])
            results.update(zip((i for row in indices for i in row), scored, strict=True))
    return [results[index] for index in range(len(requests))]


def _score(
    model: PreTrainedModel, reads: list[tuple[int, ...]], targets: list[list[tuple[int, ...]]]
) -> list[Likelihood]:
    """Likelihoods of every continuation of every row, in order."""
    ids_BT = torch.zeros(len(reads), len(reads[0]), dtype=torch.long)
    select_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
    for row, read in enumerate(reads):
        ids_BT[row, : len(read)] = torch.tensor(read)
        select_BT[row, len(read) - max(map(len, targets[row])) : len(read)] = True
    # (selected position, wanted token) of every token to score, and how many each continuation has
    place_BT = (select_BT.flatten().cumsum(0) - 1).view(ids_BT.shape)
    wanted = [
        (int(place_BT[row, len(reads[row]) - len(tokens) + offset]), token)
        for row in range(len(reads))
        for tokens in targets[row]
        for offset, token in enumerate(tokens)
    ]
    counts = [len(tokens) for row in targets for tokens in row]
    logs_M, greedy_M = _at(model, ids_BT, select_BT, torch.tensor(wanted))
    return [
        Likelihood(log=logs.sum().item(), greedy=bool(greedy.all()))
        for logs, greedy in zip(logs_M.split(counts), greedy_M.split(counts), strict=True)
    ]


def _at(model: PreTrainedModel, ids_BT: Tensor, select_BT: Tensor, wanted_M2: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (fp64, CPU) of each wanted token at its selected position, and whether it is the argmax."""
    logs_M = torch.zeros(wanted_M2.shape[0], dtype=torch.float64)
    greedy_M = torch.zeros(wanted_M2.shape[0], dtype=torch.bool)
    begin = 0
    for logits_nV in logits_in_pieces(model, ids_BT, select_BT):
        here_M = (wanted_M2[:, 0] >= begin) & (wanted_M2[:, 0] < begin + logits_nV.shape[0])
        place, token = ((wanted_M2[here_M] - torch.tensor([begin, 0])).to(logits_nV.device)).unbind(1)
        logs = logits_nV[place, token] - logits_nV.logsumexp(-1)[place]
        logs_M[here_M] = logs.double().cpu()
        greedy_M[here_M] = (logits_nV.argmax(-1)[place] == token).cpu()
        begin += logits_nV.shape[0]
    return logs_M, greedy_M


def _request(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, limit: int) -> _Request:
    context_ids, targets = _encode(tokenizer, context, continuation)
    if len(targets) > limit:
        raise ShearlingError(
            f"a continuation of {len(targets)} tokens exceeds the model's context of {limit}: {continuation[:40]!r}"
        )
    ids = (context_ids + targets)[-(limit + 1) :]
    return _Request(read=tuple(ids[:-1]), targets=tuple(targets))


def _encode(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    stripped = context.rstrip()
    if not stripped:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ShearlingError("a context is empty and the tokenizer has no start or end token to stand for it")
        targets = tokenizer.encode(context + continuation, add_special_tokens=False)
        return [start], targets
    whole = tokenizer.encode(context + continuation)
    # where both merge into one token, that token is scored: a continuation is never empty
    split = min(len(tokenizer.encode(stripped)), len(whole) - 1)
    return whole[:split], whole[split:]
