"""Which method carries out a recipe's first stage."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shearling.methods.masks import plan_masks, preview_masks
from shearling.methods.structured import Settings, plan_structured, preview
from shearling.plan import Outcome, Plan
from shearling.recipe import Sparsify


def plan_stage(model: Any, tokens: Tensor, stage: Settings | Sparsify, **options: Any) -> Outcome:
    """Plan and edits of a stage; ``options`` as ``plan_structured`` and ``plan_masks`` take them."""
    if isinstance(stage, Sparsify):
        return plan_masks(model, tokens, stage, **options)
    return plan_structured(model, tokens, stage, **options)


def preview_stage(model: Any, stage: Settings | Sparsify, name: str = "") -> Plan:
    """The plan before anything is measured; ``model`` may be on meta."""
    return preview_masks(model, stage, name) if isinstance(stage, Sparsify) else preview(model, stage, name)
