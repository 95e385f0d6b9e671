"""Shearling prunes language models, retrains them, and writes checkpoints that ordinary tools load.

    import shearling
    recipe = shearling.load_recipe("recipes/demo-cfsp.yaml")
    metrics = shearling.run(recipe, "runs/demo")

or, step by step:

    model, tokenizer = shearling.load_model("smollm2-135m"), shearling.load_tokenizer("smollm2-135m")
    tokens = shearling.windows(shearling.corpus_tokens("stdlib:calibration", tokenizer), 32, 1024)
    outcome = shearling.plan_structured(model, tokens, shearling.CFSP(sparsity=0.2))
    shearling.cut_(model, outcome.edits)
    shearling.save_model(model, tokenizer, "pruned", provenance={})

Importing this package also lets ``AutoModelForCausalLM.from_pretrained`` load checkpoints with per-layer widths. It
imports neither torch nor transformers: names are looked up when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shearling._hook import register_when_loaded

if TYPE_CHECKING:
    from shearling.data import corpus_tokens, windows
    from shearling.errors import RecipeError, ShearlingError
    from shearling.evaluate import divergence, perplexity
    from shearling.export import save_model
    from shearling.methods.masks import plan_masks
    from shearling.methods.ranking import plan_ranked
    from shearling.methods.structured import plan_structured, preview
    from shearling.models import load_model, load_tokenizer
    from shearling.plan import propose_shapes
    from shearling.recipe import (
        CFSP,
        Baseline,
        Budget,
        CFSPReference,
        Ranked,
        Recipe,
        Shearling,
        Sparsify,
        Target,
        load_recipe,
        parse_recipe,
    )
    from shearling.run import run
    from shearling.surgery import cut_
    from shearling.train import TrainSettings, train

_HOME = {
    "CFSP": "recipe",
    "Baseline": "recipe",
    "Budget": "recipe",
    "CFSPReference": "recipe",
    "Ranked": "recipe",
    "Recipe": "recipe",
    "RecipeError": "errors",
    "Shearling": "recipe",
    "ShearlingError": "errors",
    "Sparsify": "recipe",
    "Target": "recipe",
    "TrainSettings": "train",
    "corpus_tokens": "data",
    "cut_": "surgery",
    "divergence": "evaluate",
    "load_model": "models",
    "load_recipe": "recipe",
    "load_tokenizer": "models",
    "parse_recipe": "recipe",
    "perplexity": "evaluate",
    "plan_masks": "methods.masks",
    "plan_ranked": "methods.ranking",
    "plan_structured": "methods.structured",
    "preview": "methods.structured",
    "propose_shapes": "plan",
    "run": "run",
    "save_model": "export",
    "train": "train",
    "windows": "data",
}
__all__ = [
    "CFSP",
    "Baseline",
    "Budget",
    "CFSPReference",
    "Ranked",
    "Recipe",
    "RecipeError",
    "Shearling",
    "ShearlingError",
    "Sparsify",
    "Target",
    "TrainSettings",
    "corpus_tokens",
    "cut_",
    "divergence",
    "load_model",
    "load_recipe",
    "load_tokenizer",
    "parse_recipe",
    "perplexity",
    "plan_masks",
    "plan_ranked",
    "plan_structured",
    "preview",
    "propose_shapes",
    "run",
    "save_model",
    "train",
    "windows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shearling' has no attribute {name!r}")
    return getattr(import_module(f"shearling.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_loaded()
