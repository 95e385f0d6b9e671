"""Text that a model writes itself: calibration beyond the text at hand, over everything the model has learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: tokens of one sample; several are packed into a window
SAMPLE = 128


@torch.no_grad()
def sampled_windows(model: Any, starts: Tensor, num: int, length: int, *, start_token: int, seed: int = 0) -> Tensor:
    """``num`` windows [num, length] of tokens drawn from a causal language model at temperature 1, on its device.

    Each sample of at most 128 tokens is ``start_token``, a token drawn from ``starts`` (any shape), and what the model
    goes on with. The same seed, model and device give the same windows.
    """
    device = next(model.parameters()).device
    sample = min(SAMPLE, length)
    count = -(-num * length // sample)
    generator = torch.Generator(device=device).manual_seed(seed)
    pool = starts.flatten().to(device)
    first = pool[torch.randint(len(pool), (count,), generator=generator, device=device)]
    ids = torch.stack([torch.full_like(first, start_token), first], 1)
    written, cache = [ids], None
    for _ in range(sample - 2):
        outputs = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = outputs.past_key_values
        chances = outputs.logits[:, -1].float().softmax(-1)
        ids = torch.multinomial(chances, 1, generator=generator)
        written.append(ids)
    return torch.cat(written, 1).flatten()[: num * length].view(num, length)
