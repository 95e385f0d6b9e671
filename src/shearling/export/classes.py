"""Transformers classes for checkpoints whose blocks differ in width, one pair a family."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from shearling.anatomy import PER_LAYER_PREFIX, anatomy_of, family_names
from shearling.surgery import resize_


def per_layer_classes(model_type: str) -> tuple[type[Any], type[Any]]:
    """Config and causal-LM class of a family with per-layer widths: the stock classes, resized after they are built."""
    return _config_class(model_type), _model_class(model_type)


@cache
def _config_class(model_type: str) -> type[Any]:
    stock_config: Any = CONFIG_MAPPING[model_type]
    content = {"model_type": PER_LAYER_PREFIX + model_type, "__module__": __name__}
    return type(f"Shearling{stock_config.__name__}", (stock_config,), content)


@cache
def _model_class(model_type: str) -> type[Any]:
    stock_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock_model.__init__(self, config, *args, **kwargs)
        resize_(self, anatomy_of(config))

    content = {"__init__": __init__, "config_class": _config_class(model_type), "__module__": __name__}
    return type(f"Shearling{stock_model.__name__}", (stock_model,), content)


class _Later(type):
    """Makes classes that stand for a family's model class, which is looked up when something is asked of it.

    Transformers may still be importing the modules of some family when all of them are registered.
    """

    model_type: str

    def __getattr__(cls, name: str) -> Any:
        return getattr(_model_class(cls.model_type), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _model_class(cls.model_type)(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _model_class(cls.model_type))


def register() -> None:
    """Teach transformers' Auto classes the per-layer checkpoints of every family; harmless when repeated."""
    for model_type in family_names():
        config_class = _config_class(model_type)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        stand_in = _Later(config_class.__name__, (), {"model_type": model_type, "config_class": config_class})
        AutoModelForCausalLM.register(config_class, stand_in, exist_ok=True)


register()
