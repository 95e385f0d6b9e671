"""Which method carries out the stage of a recipe that prunes, and what a recipe will make of its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shearling.anatomy import Anatomy, anatomy_of
from shearling.methods.masks import plan_masks, preview_masks
from shearling.methods.ranking import plan_ranked, preview_target
from shearling.methods.recovery import recovery_memory
from shearling.methods.structured import Settings, plan_structured, preview
from shearling.methods.trawl import chosen_layers, plan_trawl
from shearling.models import empty_model
from shearling.plan import (
    Cost,
    Grid,
    Outcome,
    Plan,
    Proposal,
    TensorSize,
    Width,
    inventory_after,
    inventory_of,
    plan_of,
    propose_shapes,
    quantised_size,
    resolve_target,
)
from shearling.recipe import AST, Budget, Denoise, Ranked, Recipe, Shear, Sparsify, Target


def plan_stage(model: Any, tokens: Tensor, stage: Settings | Ranked | Sparsify | Denoise, **options: Any) -> Outcome:
    """Plan and edits of a stage; ``options`` as ``plan_structured``, ``plan_ranked`` and ``plan_masks`` take them."""
    if isinstance(stage, Denoise):
        # looks at no text
        return plan_trawl(model, stage, name=options.get("name", ""))
    if isinstance(stage, Sparsify):
        return plan_masks(model, tokens, stage, **options)
    if isinstance(stage, Ranked):
        return plan_ranked(model, tokens, stage, **options)
    return plan_structured(model, tokens, stage, **options)


def budget_of(recipe: Recipe) -> Budget | None:
    """The budget that a recipe names instead of a shape, if it does."""
    stage = recipe.first
    return stage.target if isinstance(stage, Ranked | Shear) and isinstance(stage.target, Budget) else None


def proposed(recipe: Recipe, model: Any, measured: Mapping[Width, Cost] | None = None) -> list[Proposal]:
    """Shapes that a recipe's budget allows its model, which may be on meta; none where it names no budget.

    ``measured`` as in ``propose_shapes``.
    """
    budget = budget_of(recipe)
    if budget is None:
        return []
    anatomy, inventory = anatomy_of(model.config), inventory_of(model)
    return propose_shapes(anatomy, inventory, budget.amount, budget.of, measured=measured)


def in_shape(recipe: Recipe, measured: Mapping[Width, Cost] | None = None) -> Recipe:
    """The recipe with an exact shape in place of a budget, by its model's config; others as they are.

    ``measured`` as in ``propose_shapes``. Raises ShearlingError as ``resolve_target``, and for a model without a
    config.
    """
    budget = budget_of(recipe)
    if budget is None:
        return recipe
    model = empty_model(recipe.model, recipe.dtype)
    return with_target(recipe, resolve_target(anatomy_of(model.config), inventory_of(model), budget, measured))


def with_target(recipe: Recipe, target: Target) -> Recipe:
    """The recipe with a shape in place of that of the stage that prunes."""
    stage = recipe.first
    assert isinstance(stage, Ranked | Shear)
    shaped = stage.model_copy(update={"target": target})
    return recipe.model_copy(update={"stages": tuple(shaped if each is stage else each for each in recipe.stages)})


def preview_recipe(recipe: Recipe, model: Any, processes: int = 1) -> Plan:
    """The plan before anything is done, with the memory that a process' training takes at most.

    ``model`` is the recipe's, and may be on meta. Products are in bfloat16, as the loop has them on a GPU, but for a
    recipe that names the CPU.
    """
    match recipe.first:
        case None:
            plan = plan_of(recipe.model, recipe.stages[0].method, anatomy_of(model.config), inventory_of(model), ())
        case Sparsify() as stage:
            plan = preview_masks(model, stage, recipe.model)
        case Denoise() as stage:
            anatomy = anatomy_of(model.config)
            chosen_layers(anatomy, stage)
            plan = plan_of(recipe.model, stage.method, anatomy, inventory_of(model), ())
        case Ranked() | Shear() as stage:
            plan = preview_target(model, stage, recipe.model)
        case stage:
            plan = preview(model, stage, recipe.model)
    plan = as_saved(recipe, model, plan)
    if not recipe.trained:
        return plan
    compute = None if recipe.device == "cpu" else torch.bfloat16
    found = (
        recovery_memory(recipe, stage, model, plan, compute=compute, processes=processes) for stage in recipe.trained
    )
    return replace(plan, estimate={"peak_bytes": max(memory.peak for memory in found)})


def as_saved(recipe: Recipe, model: Any, plan: Plan) -> Plan:
    """The plan of a recipe's model with what it is saved with: codes in place of weights, branches beside them.

    Raises ShearlingError where the grid's groups do not fill the inputs of a linear.
    """
    after = inventory_after(inventory_of(model), plan.anatomy_before, plan.anatomy_after, plan.layers)
    if recipe.quantise is not None:
        grid = Grid(recipe.quantise.format, recipe.quantise.group)
        plan = replace(plan, quantised=quantised_size(after, plan.anatomy_after, grid))
    return replace(plan, branches=_branches(recipe, after, plan.anatomy_after))


def _branches(recipe: Recipe, after: Mapping[str, TensorSize], anatomy: Anatomy) -> int | None:
    """The largest rank of the branches that a recipe leaves beside linears; None where it leaves none."""
    slorb = recipe.recover.slorb if isinstance(recipe.recover, AST) else None
    ranks = [0]
    for layer in range(anatomy.num_layers):
        for name in anatomy.weights(layer):
            outputs, inputs = after[name].shape[:: -1 if anatomy.family.input_first else 1]
            ranks.append(0 if slorb is None else slorb.rank(inputs))
            if recipe.quantise is not None:
                ranks[-1] += recipe.quantise.rank(outputs, inputs)
    return max(ranks) or None
