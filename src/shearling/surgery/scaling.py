"""Embeddings that the stock code multiplies by sqrt(hidden), when the hidden size changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shearling.anatomy import Anatomy


def embedding_factor(model: Any, before: Anatomy, after: Anatomy) -> float:
    """What an embedding must be multiplied by, so that the stock code's scale for a new hidden size changes nothing."""
    if not before.family.embedding_scaled:
        return 1.0
    dtype = model.get_input_embeddings().weight.dtype
    # the stock code rounds the scale to the type of the weights
    old, new = (torch.tensor(hidden**0.5).to(dtype).item() for hidden in (before.hidden, after.hidden))
    return old / new


def scaled_parameters(model: Any, anatomy: Anatomy) -> list[str]:
    """Tensors that ``embedding_factor`` concerns: the embedding, and the last norm where the head shares its weight."""
    family = anatomy.family
    if not family.embedding_scaled:
        return []
    embedding = f"{family.embeddings[0]}.weight"
    tied = model.get_output_embeddings().weight is model.get_parameter(embedding)
    norm = [f"{family.final_norm}.{part}" for part in ("weight", "bias")] if tied else []
    known = {name for name, _ in model.named_parameters()}
    return [name for name in (embedding, *norm) if name in known]


def rescaled(tensor: Tensor, name: str, anatomy: Anatomy, factor: float) -> Tensor:
    """One of ``scaled_parameters`` when the embedding is multiplied by ``factor`` and the logits stay as they were."""
    wide = tensor.double()
    if name == f"{anatomy.family.embeddings[0]}.weight":
        return (wide * factor).to(tensor.dtype)
    offset = 1.0 if anatomy.family.norm_one_plus and name.endswith(".weight") else 0.0
    return ((wide + offset) / factor - offset).to(tensor.dtype)
