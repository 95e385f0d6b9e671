"""Greedy decoding through a key/value cache, one step a call."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache, PreTrainedModel


def greedy_step(model: PreTrainedModel, ids_BT: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
    """Most likely next token of every row [B, 1], and the cache that now also holds ``ids_BT``.

    Rows are unpadded: each continues the tokens its cache already holds.
    """
    outputs = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return outputs.logits[:, -1].argmax(-1, keepdim=True), outputs.past_key_values
