"""From a causal language model: the states before its head, and the head as plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from shearling.anatomy import anatomy_of
from shearling.errors import ShearlingError
from shearling.nn import EffectiveLinear
from shearling.train.documents import document_masks, document_numbers


class Head(NamedTuple):
    """``logits = cap(hidden weight^T + bias)``, with ``cap(z) = softcap tanh(z / softcap)`` where there is one.

    ``weight`` [V, D], ``bias`` [V].
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


def hidden_states(model: Any, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """States [B, T, D] that the output head reads, without running the head.

    Every row is a whole sequence, or with ``position_ids`` [B, T], which begin anew in each, several documents that do
    not see one another.
    """
    if position_ids is None:
        with _answered(_WHOLE):
            return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    # made here, since not every family tells transformers of positions when it makes a mask (OPT does not)
    with _answered(_PACKED):
        masks = document_masks(model, position_ids)
    return model.base_model(
        input_ids=input_ids, attention_mask=masks, position_ids=position_ids, use_cache=False
    ).last_hidden_state


#: what transformers asks before it makes a mask -> the answer for rows that are whole sequences
_WHOLE: dict[str, Callable[..., Any]] = {
    "find_packed_sequence_indices": lambda position_ids: None,
    "is_tracing": lambda tensor=None: False,
}
#: and for rows of several documents
_PACKED: dict[str, Callable[..., Any]] = {"find_packed_sequence_indices": document_numbers}


@contextmanager
def _answered(answers: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Within, transformers does not look for packed sequences but is told.

    Looking waits for the device. Where it cannot look, while a CUDA graph is captured, it writes out a causal mask, and
    with one there is no flash attention.
    """
    asked = {name: getattr(masking_utils, name) for name in answers if hasattr(masking_utils, name)}
    try:
        for name in asked:
            setattr(masking_utils, name, answers[name])
        yield
    finally:
        for name, function in asked.items():
            setattr(masking_utils, name, function)


def blocks_of(model: Any) -> list[Any]:
    """The blocks of a causal language model, in their order."""
    return list(model.get_submodule(anatomy_of(model.config).family.blocks))


@contextmanager
def narrow_stream(model: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """Within, what a model's blocks hand on, and its gradient, is bfloat16 where that is the type of products.

    Autocast alone leaves it in float32, as the embedding gives it: twice the traffic between products, and more kept
    for the backward pass. float16 could not hold it.
    """
    if dtype != torch.bfloat16:
        yield
        return

    def narrow(block: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].to(dtype), *args[1:])

    handle = blocks_of(model)[0].register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        handle.remove()


def output_head(model: Any) -> Head:
    """The output head of a transformers causal language model.

    Raises ShearlingError for a model without one, or whose logits are scaled in a way that is not described here.
    """
    module = model.get_output_embeddings()
    if module is None or model.base_model is model:
        raise ShearlingError(f"{type(model).__name__}: has no output head; training needs a causal language model")
    for name in ("logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) is not None:
            raise ShearlingError(f"{type(model).__name__}: training does not know its {name}")
    weight = module.merged_weight() if isinstance(module, EffectiveLinear) else module.weight
    return Head(weight, module.bias, getattr(model.config, "final_logit_softcapping", None))
