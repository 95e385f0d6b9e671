"""Tasks through lm-eval (the extra ``eval``), which fetches its own data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shearling.errors import ShearlingError
from shearling.evaluate.logits import evaluating
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
    # its tags are left out: they stand for several tasks and get no result of their own
    check_names(tasks, [*manager.all_subtasks, *manager.all_groups])
    with evaluating(model):
        report = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
            tasks=list(tasks),
            num_fewshot=0,
            limit=limit,
            # only spent on metrics that are not reported here
            bootstrap_iters=100,
            log_samples=False,
            task_manager=manager,
            # likelihoods draw nothing, so the caller's generators are left alone
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    return {name: _result(name, report) for name in tasks}


def _result(name: str, report: dict[str, Any]) -> Result:
    metrics = report["results"][name]
    if "acc,none" not in metrics:
        found = sorted(key.partition(",")[0] for key in metrics if "," in key and "stderr" not in key)
        raise ShearlingError(f"task {name}: lm-eval reports {', '.join(found)} and no accuracy")
    stderr = metrics.get("acc_stderr,none")
    return {
        "accuracy": metrics["acc,none"],
        **({"accuracy_norm": metrics["acc_norm,none"]} if "acc_norm,none" in metrics else {}),
        # lm-eval says "N/A" where it is not defined
        "stderr": stderr if isinstance(stderr, float) else None,
        "num": metrics["sample_len"],
    }
