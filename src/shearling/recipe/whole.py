"""A recipe as a whole: its stages in their order."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, field_validator

from shearling.recipe.base import Strict
from shearling.recipe.masking import Denoise, Sparsify
from shearling.recipe.pruning import CFSP, Baseline, CFSPReference, Shearling
from shearling.recipe.quantising import Quantise
from shearling.recipe.sections import Calibration, Evaluation
from shearling.recipe.shapes import Ranked
from shearling.recipe.training import AST, SPP, Adapt, Full, LoRA, Recover, Shear, Train

PruneStage = Annotated[CFSP | CFSPReference | Shearling | Baseline | Ranked, Field(discriminator="method")]
RecoverStage = Annotated[LoRA | Full | AST | SPP, Field(discriminator="method")]
TrainStage = Adapt | Shear | LoRA | Full | AST | SPP
Stage = Annotated[
    Adapt | PruneStage | Sparsify | Denoise | Shear | RecoverStage | Quantise, Field(discriminator="stage")
]
MASK_METHODS = get_args(Sparsify.model_fields["method"].annotation)
STAGES = ("adapt", "prune", "sparsify", "denoise", "shear", "recover", "quantise")
RECOVERIES = ("lora", "full", "ast", "spp")
RANKED = get_args(Ranked.model_fields["method"].annotation)
METHODS = ("cfsp", "cfsp-reference", "shearling", "wanda-sp", "flap", "magnitude", "random", *RANKED)
#: parts of an error's place that say which form something has
TAGS = (*STAGES, *METHODS, *RECOVERIES, "sheared-llama", "shape", "budget")


class Recipe(Strict):
    """A model, the texts, and the stages in their order."""

    model: str
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    calibration: Calibration = Calibration()
    evaluate: Evaluation = Evaluation()
    #: who is told the numbers of training while it runs
    track: Literal["tensorboard", "trackio"] | None = None
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]

    @field_validator("stages")
    @classmethod
    def _adapted(cls, stages: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [stage.stage for stage in stages]
        if "adapt" in names[1:] or names[:2] in (["adapt"], ["adapt", "recover"], ["adapt", "quantise"]):
            raise ValueError(
                "adapt must stand once, at the start, and be followed by prune, sparsify, denoise or shear (a recipe "
                f"that only trains has recover alone); got {', '.join(names)}"
            )
        for stage in stages[1:] if names[0] == "adapt" else ():
            if isinstance(stage, TrainStage) and stage.teacher_cache is not None and stage.teacher is None:
                raise ValueError(
                    f"{stage.stage}.teacher_cache needs a teacher by name after adapt; a cache knows the adapted model "
                    "only by the name of the one before"
                )
        return stages

    @field_validator("stages")
    @classmethod
    def _order(cls, given: tuple[Any, ...]) -> tuple[Any, ...]:
        stages = given[1:] if isinstance(given[0], Adapt) else given
        names = [stage.stage for stage in stages]
        # quantise may end any recipe, or be alone
        before = names[:-1] if names[-1] == "quantise" else names
        if "quantise" in before or len(set(before)) < len(before) or before[1:] not in ([], ["recover"]):
            raise ValueError(
                "must be prune, sparsify, denoise or shear, then recover, then quantise, of which any may be left out; "
                f"got {', '.join(names)}"
            )
        if not before:
            return given
        last, names, end = stages[len(before) - 1], before, stages[-1]
        if isinstance(last, AST) and last.quantise is not None and isinstance(end, Quantise):
            trained, stored = (last.quantise, last.group), (end.format, end.group)
            if trained != stored:
                raise ValueError(
                    f"recover trains weights on the grid {_grid(*trained)}; quantise.format and quantise.group must "
                    f"be the same, not {_grid(*stored)}"
                )
        if names == ["recover"]:
            if isinstance(last, AST | SPP):
                raise ValueError(
                    f"recover.method = {last.method} needs the masks of a sparsify stage; alone it must be lora or full"
                )
            if isinstance(last, LoRA) and last.ranks == "damaged":
                raise ValueError("recover.ranks = damaged needs a prune stage; alone it must be important or uniform")
        elif names[1:] and isinstance(last, AST | SPP) != (names[0] == "sparsify"):
            wanted = "ast or spp, which keep to masks" if names[0] == "sparsify" else "lora or full"
            raise ValueError(f"after {names[0]}, recover.method must be {wanted}")
        if isinstance(stages[0], Ranked | Shear | Denoise) and isinstance(last, LoRA) and last.ranks == "damaged":
            raise ValueError(
                "recover.ranks = damaged: needs widths that differ by block, as cfsp and shearling leave them; use "
                "important or uniform"
            )
        return given

    @property
    def adapt(self) -> Adapt | None:
        """The stage that trains the model before it is pruned, if there is one."""
        stage = self.stages[0]
        return stage if isinstance(stage, Adapt) else None

    @property
    def first(self) -> PruneStage | Sparsify | Denoise | Shear | None:
        """The stage that changes the model at once or by gates; None where the recipe only trains or quantises."""
        return next((stage for stage in self.stages if not isinstance(stage, Adapt | Recover | Quantise)), None)

    @property
    def recover(self) -> RecoverStage | None:
        """The stage that trains what was pruned, if there is one."""
        return next((stage for stage in self.stages if isinstance(stage, Recover)), None)

    @property
    def quantise(self) -> Quantise | None:
        """The stage that quantises what the others left, if there is one."""
        stage = self.stages[-1]
        return stage if isinstance(stage, Quantise) else None

    @property
    def trained(self) -> tuple[TrainStage, ...]:
        """The stages that train, in their order."""
        return tuple(stage for stage in self.stages if isinstance(stage, Train))

    def dump(self) -> str:
        """The recipe with every default spelled out, as YAML that loads back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _grid(form: str, group: int | None) -> str:
    return f"{form}, " + ("a scale a row" if group is None else f"groups of {group}")
