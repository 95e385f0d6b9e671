"""From a recipe's recovery to the windows that it reads and is scored on, and the policy that mixes its domains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from shearling.data import Domains, PackedTokens, Windows, corpus_tokens, is_packed, spread, windows
from shearling.errors import ShearlingError
from shearling.events import OnEvent
from shearling.methods.dynamic_loading import DynamicLoading
from shearling.methods.reference_losses import reference_losses, source_losses
from shearling.recipe import Loading, LoRA, Recipe, TrainStage
from shearling.train import Policy, TrainSettings, affordable_windows, join

#: a held-out text is read up to so many times what is scored of it, since tokenising takes time
HELD_OUT = 16


def training_windows(recipe: Recipe, stage: TrainStage, tokenizer: Any) -> Tensor | Windows:
    """What a recovery reads: a text's windows, those of a packed corpus, or the windows of all domains."""

    def read(source: str) -> Tensor | Windows:
        if is_packed(Path(source)):
            return PackedTokens(Path(source)).windows(stage.length)
        return windows(corpus_tokens(source, tokenizer, max_tokens=stage.tokens), None, stage.length, seed=recipe.seed)

    if stage.domains is None:
        assert stage.text is not None
        return read(stage.text)
    weights = {name: domain.weight for name, domain in stage.domains.items() if domain.weight is not None}
    return Domains({name: read(domain.text) for name, domain in stage.domains.items()}, weights or None)


def separator_of(stage: TrainStage, tokenizer: Any) -> int | None:
    """The token by which a recovery keeps documents apart, None where they stay together.

    Raises ShearlingError for a tokenizer that ends no document.
    """
    if stage.documents == "together":
        return None
    if tokenizer.eos_token_id is None:
        raise ShearlingError("documents = 'apart': the tokenizer has no end-of-sequence token; leave them together")
    return tokenizer.eos_token_id


def validation_windows(stage: TrainStage, tokenizer: Any) -> Tensor | dict[str, Tensor] | None:
    """What a recovery is scored on: windows spread over its held-out text, or over every domain's.

    Its first ones may all be of one document.
    """
    wanted = stage.validation_windows
    if wanted == "auto":
        trained = 0.0 if isinstance(stage, LoRA) else 1.0
        parts = 1 if stage.domains is None else len(stage.domains)
        wanted = affordable_windows(stage.batch, stage.validate_every, parts, trained=trained)

    def read(source: str) -> Tensor:
        if is_packed(Path(source)):
            return spread(PackedTokens(Path(source)).windows(stage.length), wanted)
        tokens = corpus_tokens(source, tokenizer, max_tokens=HELD_OUT * wanted * stage.length)
        return spread(windows(tokens, None, stage.length), wanted)

    if stage.domains is None:
        return None if stage.validation is None else read(stage.validation)
    found = {name: domain.validation for name, domain in stage.domains.items()}
    return {name: read(source) for name, source in found.items() if source is not None} or None


def dynamic_loading(
    loading: Loading,
    table: Mapping[str, float | Mapping[float, float]] | None,
    parameters: int,
    dense: Any,
    validation: Mapping[str, Tensor],
    settings: TrainSettings,
    on_event: OnEvent,
) -> Policy:
    """The policy that moves the weights of domains, towards those of ``table`` or, without it, the losses of ``dense``.

    References of several models are extrapolated to ``parameters``; what is to doubt about that goes to ``on_event`` as
    warnings.
    """
    if table is None:
        reference, doubts = source_losses(dense, validation, settings, join()), []
    else:
        reference, doubts = reference_losses(table, parameters)
    for doubt in doubts:
        on_event({"step": 0, "warning": doubt})
    options = loading.model_dump(exclude={"method", "reference"})
    return DynamicLoading(reference, **options)
