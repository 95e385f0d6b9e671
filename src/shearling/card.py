"""What a checkpoint says about itself: provenance and model card."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from shearling.anatomy import expressible
from shearling.plan import Plan
from shearling.recipe import Recipe
from shearling.report import model_names

_PACKAGES = ("shearling", "torch", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """Python and the packages that decide the result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def provenance(recipe: Recipe, plan: dict[str, Any]) -> dict[str, Any]:
    """Content of ``shearling.json``."""
    return {"versions": versions(), "recipe": recipe.model_dump(mode="json"), "plan": plan}


def model_card(recipe: Recipe, plan: Plan, results: dict[str, dict[str, Any]]) -> str:
    """Markdown with the before => after table and how to load the model."""
    trained = recipe.first is None
    done = "trained" if trained else "pruned"
    stages = ", then ".join(f"{'train' if trained else stage.stage} ({stage.method})" for stage in recipe.stages)
    names = model_names(trained=trained)
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [shearling, {done}]",
        "---",
        f"# {recipe.model}, {done}",
        "",
        f"Made by Shearling from `{recipe.model}`: {stages}.",
        "",
        "| | before | after | ratio |",
        "|---|--:|--:|--:|",
        *(f"| {' | '.join(row)} |" for row in plan.rows()),
        "",
    ]
    if results:
        lines += ["| model | perplexity | text | context | tokens |", "|---|--:|---|--:|--:|"]
        lines += [
            f"| {names[key]} | {row['perplexity']:.3f} | {row['corpus']} | {row['context']} | {row['tokens']} |"
            for key, row in results.items()
        ]
        lines.append("")
    lines += [
        "```python",
        *([] if expressible(plan.anatomy_after) else ["import shearling  # registers the class with per-layer widths"]),
        "from transformers import AutoModelForCausalLM",
        "",
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        "```",
        "",
    ]
    return "\n".join(lines)
