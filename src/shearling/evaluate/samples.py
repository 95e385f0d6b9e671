"""What a model writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shearling.errors import ShearlingError
from shearling.evaluate.checks import check_length
from shearling.evaluate.decode import greedy_step
from shearling.evaluate.logits import evaluating


def generate_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Greedy continuations of the prompts, without the prompts; each stops at an end token or ``max_new_tokens``.

    Every prompt runs alone, so no padding can change what is written.

    Raises ShearlingError for an empty prompt (when the tokenizer has no start token), for ``max_new_tokens`` below 1
    and for more tokens than learned positions.
    """
    if max_new_tokens < 1:
        raise ShearlingError(f"samples: max_new_tokens {max_new_tokens} must be at least 1")
    ends = _end_tokens(model, tokenizer)
    with evaluating(model):
        return [_sample(model, tokenizer, prompt, max_new_tokens, ends) for prompt in prompts]


def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, ends: frozenset[int]
) -> str:
    prompt_ids: list[int] = tokenizer.encode(prompt)
    if not prompt_ids:
        if tokenizer.bos_token_id is None:
            raise ShearlingError("samples: a prompt is empty and the tokenizer has no start token; give it some text")
        prompt_ids = [tokenizer.bos_token_id]
    check_length(model, len(prompt_ids) + max_new_tokens, "samples: prompt and continuation")
    device = model.get_input_embeddings().weight.device
    ids_1T: Tensor = torch.tensor([prompt_ids], device=device)  # pyrefly: ignore[bad-argument-type]
    cache, written = None, []
    while len(written) < max_new_tokens:
        ids_1T, cache = greedy_step(model, ids_1T, cache)
        token = int(ids_1T)
        if token in ends:
            break
        written.append(token)
    return _continuation(tokenizer, prompt_ids, written)


def _continuation(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], written: list[int]) -> str:
    # some tokenizers drop the space before a first word, so the whole is decoded and the prompt taken off
    head = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    whole = tokenizer.decode(prompt_ids + written, skip_special_tokens=True)
    if whole.startswith(head):  # pyrefly: ignore[missing-attribute]
        return whole[len(head) :]  # pyrefly: ignore[bad-return]
    return tokenizer.decode(written, skip_special_tokens=True)  # pyrefly: ignore[bad-return]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return frozenset(end for end in (*ends, tokenizer.eos_token_id) if end is not None)
