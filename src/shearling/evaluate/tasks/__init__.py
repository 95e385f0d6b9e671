"""Zero-shot tasks: through lm-eval, or from the tasks' raw files without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shearling.errors import ShearlingError
from shearling.evaluate.tasks.files import TASKS, read_items
from shearling.evaluate.tasks.harness import evaluate_with_harness
from shearling.evaluate.tasks.names import check_names
from shearling.evaluate.tasks.score import Result, score_items

__all__ = ["TASKS", "evaluate_tasks"]


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    batch: int = 8,
) -> dict[str, Result]:
    """Zero-shot ``accuracy``, ``accuracy_norm`` where defined, its ``stderr`` and ``num`` items of each task.

    With ``data``, a folder of raw task files (arc_easy/ARC-Easy-Test.jsonl and so on, see ``tasks.files``), the
    tasks in ``TASKS`` run offline; without, lm-eval runs any of its own. Both word their prompts alike, score by
    summed log-likelihood, and divide it by the characters of a choice for ``accuracy_norm``. ``limit`` keeps the
    first items of each task.

    Raises ShearlingError for an unknown task, a missing file or a malformed line (before anything is scored), and
    for a missing lm-eval.
    """
    if batch < 1 or (limit is not None and limit < 1):
        raise ShearlingError(f"tasks: batch {batch}, limit {limit}; both must be at least 1")
    if data is None:
        return evaluate_with_harness(model, tokenizer, tasks, limit=limit, batch=batch)
    check_names(tasks, TASKS)
    items = {name: read_items(name, data, limit) for name in tasks}
    return {name: score_items(model, tokenizer, TASKS[name], items[name], batch=batch) for name in tasks}
