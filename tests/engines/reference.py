"""What transformers makes of a model, and how far an engine is from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "In 1889 the tower was 312 metres high, and",
)


def greedy(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """The text that transformers' greedy search continues a prompt with."""
    asked = tokenizer(prompt, return_tensors="pt")
    found = model.generate(**asked, do_sample=False, max_new_tokens=tokens)[0, asked["input_ids"].shape[1] :]
    return tokenizer.decode(found, skip_special_tokens=True)


@torch.no_grad()
def logits(model: Any, prompts: Sequence[Tensor]) -> Tensor:
    """Logits of all positions of prompts [T], one after another, [N, V]."""
    return torch.cat([model(input_ids=ids[None]).logits[0].float() for ids in prompts])


def difference(found_NV: Tensor, right_NV: Tensor) -> float:
    """Norm of the difference over that of the logits, of which a common summand says nothing."""
    assert found_NV.shape == right_NV.shape
    centred = right_NV - right_NV.mean(-1, keepdim=True)
    return float((found_NV - right_NV).norm() / centred.norm())
