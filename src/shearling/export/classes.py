"""Transformers classes for checkpoints whose blocks differ in width, one pair a family."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from shearling.anatomy import PER_LAYER_PREFIX, anatomy_of, family_names
from shearling.surgery import resize_


@cache
def per_layer_classes(model_type: str) -> tuple[type[Any], type[Any]]:
    """Config and causal-LM class of a family with per-layer widths: the stock classes, resized after they are built."""
    stock_config: Any = CONFIG_MAPPING[model_type]
    stock_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[stock_config]
    config_class = type(
        f"Shearling{stock_config.__name__}",
        (stock_config,),
        {"model_type": PER_LAYER_PREFIX + model_type, "__module__": __name__},
    )

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock_model.__init__(self, config, *args, **kwargs)
        resize_(self, anatomy_of(config))

    model_class = type(
        f"Shearling{stock_model.__name__}",
        (stock_model,),
        {"__init__": __init__, "config_class": config_class, "__module__": __name__},
    )
    return config_class, model_class


def register() -> None:
    """Teach transformers' Auto classes the per-layer checkpoints of every family; harmless when repeated."""
    for model_type in family_names():
        config_class, model_class = per_layer_classes(model_type)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


register()
