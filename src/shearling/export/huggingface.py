"""Saving a cut model as a checkpoint that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shearling.anatomy import PER_LAYER_PREFIX, anatomy_of
from shearling.export.adapters import save_adapters
from shearling.export.classes import per_layer_classes
from shearling.export.compressed import compressed_state, quantization_config
from shearling.files import beside, writing
from shearling.nn import EffectiveLinear, is_linear, plain_state
from shearling.plan import Quant
from shearling.surgery import adapters_of

#: where in a checkpoint's folder its branches are
ADAPTER = "adapter"


def save_model(
    model: Any,
    tokenizer: Any,
    folder: Path | str,
    *,
    provenance: Mapping[str, Any],
    card: str | None = None,
    quant: Quant | None = None,
) -> None:
    """Write weights, config, generation config, tokenizer, ``shearling.json`` and the model card into a new folder.

    Everything is written beside the folder first and moved there whole. Uniform widths load with plain
    ``AutoModelForCausalLM.from_pretrained``; per-layer widths after ``import shearling``. Weights are written as they
    are multiplied, after any transforms; branches beside them become a peft folder ``adapter/``, which
    ``shearling.load_model`` attaches again and ``peft.PeftModel.from_pretrained`` loads. With ``quant``, which the
    model's weights already stand for, they are stored as codes (``export/compressed.py``).
    Raises ShearlingError when the folder exists or cannot be written, and for a transformed weight that is tied.
    """
    folder = Path(folder)
    with beside(folder) as unfinished, writing(folder):
        state, adapters = plain_state(model), adapters_of(model)
        if quant is not None:
            state = compressed_state(quant, state)
        model.save_pretrained(unfinished, state_dict=state)
        if adapters.down:
            save_adapters(adapters, unfinished / ADAPTER, anatomy_of(model.config))
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        more = {} if quant is None else {"quantization_config": quantization_config(quant, linears_of(model))}
        _complete_config(unfinished / "config.json", model, more)
        (unfinished / "shearling.json").write_text(json.dumps(provenance, indent=2) + "\n")
        if card is not None:
            (unfinished / "README.md").write_text(card)


def linears_of(model: Any) -> list[str]:
    """Paths of all linears, the head included."""
    return [name for name, module in model.named_modules() if is_linear(module) or isinstance(module, EffectiveLinear)]


def _complete_config(path: Path, model: Any, more: Mapping[str, Any]) -> None:
    """Let config.json name the class that can hold the model's widths, and say ``more``."""
    config = json.loads(path.read_text()) | dict(more)
    model_type = model.config.model_type.removeprefix(PER_LAYER_PREFIX)
    config_class, model_class = per_layer_classes(model_type)
    if "shearling" in config:
        config["model_type"], config["architectures"] = config_class.model_type, [model_class.__name__]
    else:
        stock = model_class.__mro__[1]
        config["model_type"], config["architectures"] = anatomy_of(model.config).family.model_type, [stock.__name__]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
