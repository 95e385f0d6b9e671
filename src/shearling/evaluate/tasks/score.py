"""Items scored by likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shearling.evaluate.tasks.files import Task
from shearling.evaluate.tasks.items import Item
from shearling.evaluate.tasks.likelihood import Likelihood, log_likelihoods

Result = dict[str, float | int | None]


def score_items(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, items: Sequence[Item], *, batch: int
) -> Result:
    """Accuracy of a model on items, as ``result`` describes it."""
    pairs = [pair for item in items for pair in item.pairs]
    likelihoods = iter(log_likelihoods(model, tokenizer, pairs, batch=batch))
    answers = [[next(likelihoods) for _ in item.pairs] for item in items]
    right = [_is_right(item, answer, cloze=task.cloze) for item, answer in zip(items, answers, strict=True)]
    right_norm = None
    if task.normalised:
        right_norm = [
            _likeliest([each.log / length for each, length in zip(answer, item.lengths, strict=True)]) == item.gold
            for item, answer in zip(items, answers, strict=True)
        ]
    return result(right, right_norm)


def result(right: Sequence[bool], right_norm: Sequence[bool] | None = None) -> Result:
    """``accuracy``, ``accuracy_norm`` where defined, ``stderr`` of the accuracy (None for one item) and ``num``.

    The standard error is that of a mean, with the sample's deviation: sqrt(p (1 - p) / (num - 1)).
    """
    num = len(right)
    accuracy = sum(right) / num
    return {
        "accuracy": accuracy,
        **({} if right_norm is None else {"accuracy_norm": sum(right_norm) / num}),
        "stderr": math.sqrt(accuracy * (1 - accuracy) / (num - 1)) if num > 1 else None,
        "num": num,
    }


def _is_right(item: Item, answer: Sequence[Likelihood], *, cloze: bool) -> bool:
    if cloze:
        return answer[item.gold].greedy
    return _likeliest([each.log for each in answer]) == item.gold


def _likeliest(logs: Sequence[float]) -> int:
    return max(range(len(logs)), key=logs.__getitem__)
