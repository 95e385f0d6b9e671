"""Tasks through lm-eval (the extra ``eval``), which fetches its own data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shearling.errors import ShearlingError
from shearling.evaluate.tasks.names import check_names
from shearling.evaluate.tasks.score import Result


def evaluate_with_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None,
    batch: int,
) -> dict[str, Result]:
    """Zero-shot results of lm-eval on the model in memory.

    Raises ShearlingError when lm-eval is not installed, for a task it does not know and for one without accuracy.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ShearlingError(
            "tasks: lm-eval is not installed; pip install 'shearling[eval]', or give a folder of raw task files (data)"
        ) from error
    manager = TaskManager()
    check_names(tasks, manager.all_tasks)
    # bootstrapping is only used for metrics that are not reported here
    report = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
        tasks=list(tasks),
        num_fewshot=0,
        limit=limit,
        bootstrap_iters=100,
        log_samples=False,
        task_manager=manager,
    )
    return {name: _result(name, report) for name in tasks}


def _result(name: str, report: dict[str, Any]) -> Result:
    metrics = report["results"][name]
    if "acc,none" not in metrics:
        found = sorted(key.partition(",")[0] for key in metrics if "," in key and "stderr" not in key)
        raise ShearlingError(f"task {name}: lm-eval reports {', '.join(found)} and no accuracy")
    stderr = metrics.get("acc_stderr,none")
    counts = report["n-samples"]
    # a group has no count of its own
    num = sum(counts[task]["effective"] for task in report.get("group_subtasks", {}).get(name) or [name])
    return {
        "accuracy": metrics["acc,none"],
        **({"accuracy_norm": metrics["acc_norm,none"]} if "acc_norm,none" in metrics else {}),
        "stderr": stderr if isinstance(stderr, float) else None,
        "num": num,
    }
