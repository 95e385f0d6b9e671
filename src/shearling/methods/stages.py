"""Which method carries out a recipe's first stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shearling.methods.masks import plan_masks, preview_masks
from shearling.methods.recovery import recovery_memory
from shearling.methods.structured import Settings, plan_structured, preview
from shearling.plan import Outcome, Plan
from shearling.recipe import Recipe, Sparsify


def plan_stage(model: Any, tokens: Tensor, stage: Settings | Sparsify, **options: Any) -> Outcome:
    """Plan and edits of a stage; ``options`` as ``plan_structured`` and ``plan_masks`` take them."""
    if isinstance(stage, Sparsify):
        return plan_masks(model, tokens, stage, **options)
    return plan_structured(model, tokens, stage, **options)


def preview_stage(model: Any, stage: Settings | Sparsify, name: str = "") -> Plan:
    """The plan before anything is measured; ``model`` may be on meta."""
    return preview_masks(model, stage, name) if isinstance(stage, Sparsify) else preview(model, stage, name)


def with_memory(recipe: Recipe, plan: Plan, model: Any, processes: int = 1) -> Plan:
    """The plan with the memory that a process' training takes at most; ``model`` is the dense one, on meta.

    Products are in bfloat16, as the loop has them on a GPU, but for a recipe that names the CPU.
    """
    assert recipe.recover is not None
    compute = None if recipe.device == "cpu" else torch.bfloat16
    found = recovery_memory(recipe, recipe.recover, model, plan, compute=compute, processes=processes)
    return replace(plan, estimate={"peak_bytes": found.peak})
