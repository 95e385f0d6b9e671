"""Logits in pieces, so that no full [batch, context, vocab] copy exists.

Shapes: B rows, T positions, N selected positions, n positions of one piece, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shearling.errors import ShearlingError

#: logits held at once (128 MiB in fp32); larger pieces no longer speed up the product
PIECE = 2**25


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; on leaving, every module has its own mode back.

    Not ``inference_mode``: rotary buffers that a model renews inside it could not be trained through afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def vocabulary(model: PreTrainedModel) -> int:
    """Number of logits of a model."""
    return model.config.get_text_config().vocab_size


def logits_in_pieces(model: PreTrainedModel, ids_BT: Tensor, select_BT: Tensor) -> Iterator[Tensor]:
    """Logits [n, V] of the selected positions in row-major order, at least fp32, from one pass of the decoder.

    The model's own ``forward`` turns hidden states into logits (with its decoder answering from memory), so
    softcapping and scaling are whatever the family says. Call it within ``evaluating``.

    Raises ShearlingError when the model has no language-modelling head.
    """
    decoder = model.get_decoder()
    if decoder is model or model.get_output_embeddings() is None:
        raise ShearlingError(f"{type(model).__name__}: has no language-modelling head; load it as AutoModelForCausalLM")
    device = model.get_input_embeddings().weight.device
    outputs = decoder(input_ids=ids_BT.to(device), use_cache=False)  # pyrefly: ignore[no-matching-overload]
    hidden_BTD = outputs.last_hidden_state
    hidden_ND = hidden_BTD[select_BT.to(hidden_BTD.device)]
    for hidden_nD in hidden_ND.split(max(1, PIECE // vocabulary(model))):
        with _answering(decoder, type(outputs)(last_hidden_state=hidden_nD[None])):
            logits_nV = model(inputs_embeds=hidden_nD[None], use_cache=False).logits[0]
        yield logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))


@contextmanager
def _answering(module: nn.Module, answer: Any) -> Iterator[None]:
    # device-placement hooks also set `forward` on the instance, so the previous one must come back
    previous = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous
