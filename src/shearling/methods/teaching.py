"""From a recipe's recovery to the teacher that its model follows, and the policies that follow it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.data import Windows
from shearling.errors import ShearlingError
from shearling.events import OnEvent
from shearling.models import check_finite, load_config, load_model, resolve
from shearling.plan import Edit, Structure
from shearling.recipe import Recipe, TrainStage
from shearling.train import (
    CachedTeacher,
    Distillation,
    LayerwiseDistillation,
    Policy,
    Teacher,
    cache_teacher,
    compiled,
    in_dtype,
    join,
    offloaded,
)
from shearling.train.head import output_head


def check_teacher(recipe: Recipe) -> None:
    """Raise ShearlingError, from the configs alone, for a named teacher that the recipe's model cannot follow."""
    for stage in recipe.trained:
        if stage.teacher is not None:
            _check_vocabulary(recipe.model, stage.teacher)


def _check_vocabulary(model: str, teacher: str) -> None:
    own, theirs = (load_config(name).get_text_config() for name in (model, teacher))
    if theirs.vocab_size < own.vocab_size:
        raise ShearlingError(
            f"teacher {teacher!r}: vocabulary of {theirs.vocab_size}, the model's is {own.vocab_size}; it must "
            "be the same or begin with the model's"
        )


@contextmanager
def teaching(
    recipe: Recipe,
    stage: TrainStage,
    model: Any,
    dense: Any,
    windows: Tensor | Windows,
    separator: int | None,
    edits: Sequence[Edit],
    on_event: OnEvent,
) -> Iterator[list[Policy]]:
    """The policies by which ``model``, which ``edits`` made of ``dense``, follows the teacher of a recovery.

    None where it has none. ``windows`` are what the recovery reads, ``separator`` as ``separator_of`` has it.
    """
    if not (stage.distill or stage.layerwise):
        yield []
        return
    with ExitStack() as stack:
        teacher = build_teacher(recipe, stage, model, dense, windows, separator, on_event, stack)
        policies: list[Policy] = []
        if stage.distill:
            kind, temperature = stage.divergence, stage.temperature
            policies.append(Distillation(teacher, weight=stage.distill, temperature=temperature, kind=kind))
        if stage.layerwise:
            policies.append(LayerwiseDistillation(teacher, stage.layerwise, kept=_kept_hidden(stage, edits)))
        yield policies


def _kept_hidden(stage: TrainStage, edits: Sequence[Edit]) -> tuple[int, ...] | None:
    """The teacher's hidden dimensions that a cut left, None where nothing says so or another model teaches."""
    if stage.teacher is not None:
        return None
    return next((e.kept["hidden"] for e in edits if isinstance(e, Structure) and "hidden" in e.kept), None)


def build_teacher(
    recipe: Recipe,
    stage: TrainStage,
    model: Any,
    dense: Any,
    windows: Tensor | Windows,
    separator: int | None,
    on_event: OnEvent,
    stack: ExitStack,
) -> Teacher | CachedTeacher:
    """The teacher of a recovery stage, ``dense`` where it names no other; ``stack`` ends what it needs while it lives.

    Raises ShearlingError for a teacher that cannot be loaded, and a cache of something else.
    """
    if stage.teacher_cache is None:
        return _running(recipe, stage, model, dense, stack)
    folder, vocab = Path(stage.teacher_cache), output_head(model).weight.shape[0]
    if (folder / "index.json").exists():
        # the teacher is not even loaded
        cached = CachedTeacher(folder, windows)
        cached.check_vocabulary(vocab)
        cached.check_separator(separator)
        wanted = str(resolve(stage.teacher or recipe.model))
        for name, found, asked in (
            ("teacher", cached.teacher, wanted),
            ("k", cached.k, min(stage.teacher_top_k, vocab)),
        ):
            if found != asked:
                raise ShearlingError(f"{folder}: a cache with {name}={found}, not {asked}; give another folder")
        return cached
    world = join()
    if world.first:
        with ExitStack() as while_caching:
            cache_teacher(
                _running(recipe, stage, model, dense, while_caching),
                windows,
                folder,
                k=stage.teacher_top_k,
                batch=stage.micro_batch,
                vocab=vocab,
                separator=separator,
                on_progress=lambda done, total: on_event({"stage": "teacher", "done": done, "total": total}),
            )
    world.wait()
    return CachedTeacher(folder, windows)


def _running(recipe: Recipe, stage: TrainStage, model: Any, dense: Any, stack: ExitStack) -> Teacher:
    dtype = getattr(torch, stage.teacher_dtype or recipe.dtype)
    if stage.teacher is None:
        teacher = in_dtype(dense, dtype)
    else:
        teacher = load_model(stage.teacher, dtype=dtype, device="cpu" if stage.teacher_offload else model.device)
        check_finite(teacher)
    if stage.teacher_offload:
        stack.enter_context(offloaded(teacher, model.device))
    if stage.teacher_compile:
        stack.enter_context(compiled(teacher))
    return Teacher(teacher, device=model.device)
