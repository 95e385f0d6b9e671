"""From a recipe's recovery to what the training loop is told, and the memory that it will take."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shearling.anatomy import anatomy_of
from shearling.methods.ast import ASTPolicy
from shearling.methods.ig_lora import LoRAPolicy, allocate_ranks
from shearling.methods.masks import pattern_of
from shearling.methods.sheared_llama import Shearing, ShearingPolicy, kept_of
from shearling.methods.spp import SPPPolicy
from shearling.nn import is_linear
from shearling.plan import Plan, leading
from shearling.recipe import AST, SPP, Adapt, Full, Recipe, Shear, Sparsify, TrainStage
from shearling.surgery import cut_
from shearling.train import Policy, TrainSettings, in_dtype
from shearling.train.memory import Memory, training_memory


def recovery_settings(recipe: Recipe, stage: TrainStage, separator: int | None) -> TrainSettings:
    """What the training loop is told; ``separator`` as ``separator_of`` has it."""
    return TrainSettings(
        tokens=stage.tokens,
        length=stage.length,
        batch=stage.batch,
        micro_batch=min(stage.micro_batch, stage.batch),
        learning_rate=stage.learning_rate,
        warmup=stage.warmup,
        schedule=stage.schedule,
        cross_entropy=stage.cross_entropy,
        log_every=1,
        checkpoint_every=stage.checkpoint_every,
        recompute=stage.recompute,
        compile=stage.compile,
        capture=stage.capture,
        separator=separator,
        validate_every=stage.validate_every,
        keep=stage.keep,
        seed=recipe.seed,
    )


def made_trainable(
    recipe: Recipe,
    stage: TrainStage,
    model: Any,
    plan: Plan,
    masks: Mapping[str, Tensor] | None = None,
    norms: Mapping[str, Tensor] | None = None,
    scores: Mapping[str, Tensor] | None = None,
) -> tuple[Any, list[Policy]]:
    """The cut model in the precision it is trained in, and the policies that say which of its parameters are.

    ``masks`` are as ``ASTPolicy`` and ``SPPPolicy`` have them, ``norms`` as ``ASTPolicy``, ``scores`` as
    ``ShearingPolicy``.
    """
    if isinstance(stage, Adapt | Full):
        # an optimizer's small steps vanish in half precision
        return model.float(), []
    if isinstance(stage, Shear):
        shearing = Shearing(
            stage.gate_learning_rate,
            stage.multiplier_learning_rate,
            stage.target_warmup,
            stage.target_schedule,
            stage.binary,
            stage.closed == "corrected",
        )
        return model.float(), [ShearingPolicy(plan.anatomy_before, kept_of(plan.anatomy_after), shearing, scores)]
    if isinstance(stage, AST):
        assert isinstance(recipe.first, Sparsify), "recipes let ast follow masks alone"
        return model.float(), [ASTPolicy(anatomy_of(model.config), pattern_of(recipe.first), stage, masks, norms)]
    if isinstance(stage, SPP):
        return model, [SPPPolicy(anatomy_of(model.config), stage.rank, stage.scale, masks)]
    ranks = allocate_ranks(_shares(plan, stage.ranks), stage.mean_rank, stage.ranks)
    return model, [LoRAPolicy(anatomy_of(model.config), ranks, stage.alpha_over_rank)]


def recovery_memory(
    recipe: Recipe, stage: TrainStage, dense: Any, planned: Plan, *, compute: torch.dtype | None, processes: int = 1
) -> Memory:
    """Memory of a recovery, from the ``dense`` model's shapes (it may be on meta) and the plan of its cut.

    ``compute`` is the type of products, None the weights' own.
    """
    model = copy.deepcopy(dense)
    if not isinstance(stage, Adapt | Shear):
        cut_(model, [leading(planned.anatomy_before, planned.anatomy_after, planned.layers)])
    # what they are counts for nothing here
    linears = {f"{name}.weight": m.weight for name, m in model.named_modules() if is_linear(m)}
    norms = {
        name: w.new_ones(w.shape[0 if anatomy_of(model.config).family.input_first else 1])
        for name, w in linears.items()
    }
    model, policies = made_trainable(recipe, stage, model, planned, norms=norms)
    teaches = bool(stage.distill or stage.layerwise) and stage.teacher_cache is None and stage.teacher is None
    dtype = getattr(torch, stage.teacher_dtype or recipe.dtype)
    own = sum(p.numel() * p.element_size() for p in dense.parameters())
    # the dense model stays for the comparison afterwards; in another precision it teaches as a copy
    beside = own if not teaches or dtype != next(dense.parameters()).dtype else 0
    width, taught = (anatomy_of(m.config).hidden for m in (model, dense))
    if teaches and stage.layerwise and width != taught:
        # the projection of layerwise losses with its gradient and two moments
        beside += 4 * 4 * width * taught
    return training_memory(
        model,
        # which token it is counts for nothing here
        recovery_settings(recipe, stage, None if stage.documents == "together" else 0),
        policies,
        compute=compute,
        teacher=in_dtype(dense, dtype) if teaches else None,
        processes=processes,
        beside=beside,
    )


def _shares(plan: Plan, ranks: str) -> list[float]:
    """What ranks are shared out by: importance, or the share of its channels that a block lost."""
    if ranks == "damaged":
        pairs = zip(plan.anatomy_before.shapes, plan.anatomy_after.shapes, strict=True)
        return [1 - after.ffn / before.ffn for before, after in pairs]
    return [plan.importance[layer] if plan.importance else 1.0 for layer in plan.layers]
