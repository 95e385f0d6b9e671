"""What must hold before a model is run on some tokens."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from shearling.errors import ShearlingError

#: last part of the name of a learned position table (GPT-2; OPT)
POSITION_TABLES = ("wpe", "embed_positions")


def longest_context(model: PreTrainedModel, default: int = 2048) -> int:
    """Positions a model was made for, or ``default`` where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or default


def check_length(model: PreTrainedModel, length: int, what: str) -> None:
    """ShearlingError when a model with learned positions has none for ``length`` tokens.

    Rotary models run past their trained length (badly), so they are left to the caller.
    """
    learned = any(
        isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES
        for name, module in model.named_modules()
    )
    limit = longest_context(model)
    if learned and length > limit:
        raise ShearlingError(f"{what}: {length} tokens exceed the {limit} learned positions of the model")


def check_windows(model: PreTrainedModel, tokens: Tensor, *, context: int, batch: int, what: str) -> None:
    """ShearlingError unless int64 ``tokens`` [N] fill a window of ``context`` that the model can read."""
    if tokens.ndim != 1:
        raise ShearlingError(f"{what}: tokens have shape {list(tokens.shape)}; one row of token ids is needed")
    if context < 2 or batch < 1:
        raise ShearlingError(f"{what}: context {context}, batch {batch}; context >= 2 and batch >= 1 are needed")
    if tokens.numel() < context:
        raise ShearlingError(f"{what}: {tokens.numel()} tokens do not fill one window; context {context} needs as many")
    check_length(model, context, f"{what}: context")
    lowest, highest = int(tokens.min()), int(tokens.max())
    rows = model.get_input_embeddings().weight.shape[0]  # pyrefly: ignore[bad-index]
    if lowest < 0 or highest >= rows:
        raise ShearlingError(
            f"{what}: token id {lowest if lowest < 0 else highest} lies outside the model's 0..{rows - 1}; "
            "use the model's own tokenizer"
        )
