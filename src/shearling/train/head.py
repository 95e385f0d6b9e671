"""From a causal language model: the states before its head, and the head as plain tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from shearling.anatomy import anatomy_of
from shearling.errors import ShearlingError
from shearling.nn import EffectiveLinear


class Head(NamedTuple):
    """``logits = cap(hidden weight^T + bias)``, with ``cap(z) = softcap tanh(z / softcap)`` where there is one.

    ``weight`` [V, D], ``bias`` [V].
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


def hidden_states(model: Any, input_ids: Tensor) -> Tensor:
    """States [B, T, D] that the output head reads, without running the head."""
    return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state


def blocks_of(model: Any) -> list[Any]:
    """The blocks of a causal language model, in their order."""
    return list(model.get_submodule(anatomy_of(model.config).family.blocks))


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
