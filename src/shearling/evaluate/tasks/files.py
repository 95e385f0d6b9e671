"""Which file holds which task, and how its lines are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.evaluate.tasks import prompts
from shearling.evaluate.tasks.items import Item


@dataclass(frozen=True)
class Task:
    """A task's files below the data folder (the first that exists is read), and what is scored.

    ``labels`` is the suffix of a file beside it with one label a line. ``normalised``: accuracy_norm is defined;
    ``cloze``: right means that greedy decoding writes the continuation.
    """

    files: tuple[str, ...]
    item: Callable[[dict[str, Any]], Item]
    normalised: bool = False
    cloze: bool = False
    labels: str | None = None


#: the tasks that can be read from raw files
TASKS: dict[str, Task] = {
    "arc_easy": Task(("arc_easy/ARC-Easy-Test.jsonl",), prompts.arc, normalised=True),
    "arc_challenge": Task(("arc_challenge/ARC-Challenge-Test.jsonl",), prompts.arc, normalised=True),
    "piqa": Task(("piqa/valid.jsonl",), prompts.piqa, normalised=True, labels="-labels.lst"),
    "hellaswag": Task(
        ("hellaswag/hellaswag_val.jsonl", "hellaswag/hellaswag_val_1000.jsonl"), prompts.hellaswag, normalised=True
    ),
    "winogrande": Task(("winogrande/dev.jsonl",), prompts.winogrande),
    "boolq": Task(("boolq/dev.jsonl",), prompts.boolq),
    "openbookqa": Task(("openbookqa/test.jsonl",), prompts.openbookqa, normalised=True),
    "lambada_openai": Task(("lambada_openai/lambada_test.jsonl",), prompts.lambada, cloze=True),
    "copa": Task(("copa/dev.jsonl",), prompts.copa),
    "sciq": Task(("sciq/test.jsonl", "sciq/valid.jsonl"), prompts.sciq, normalised=True),
}


def find_file(name: str, data: Path) -> Path:
    """The file of a task below ``data``; ShearlingError naming the path when there is none."""
    paths = [data / file for file in TASKS[name].files]
    for path in paths:
        if path.is_file():
            return path
    raise ShearlingError(f"task {name}: no file {' or '.join(str(path) for path in paths)}")


def read_items(name: str, data: Path, limit: int | None = None) -> list[Item]:
    """The first ``limit`` items of a task (all by default) from its raw file below ``data``.

    Raises ShearlingError for a missing or empty file and for a line that cannot be read, with file and line.
    """
    task, path = TASKS[name], find_file(name, data)
    items = []
    for number, text, label in islice(_lines(path, task.labels), limit):
        try:
            line = json.loads(text)
            item = task.item(line if label is None else {**line, "label": label})
            if not 0 <= item.gold < len(item.pairs):
                raise ValueError(f"label {item.gold} with {len(item.pairs)} choices")
            if 0 in item.lengths:
                raise ValueError("a choice is empty")
        except KeyError as error:
            raise ShearlingError(f"{path}:{number}: task {name} needs the field {error}") from error
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise ShearlingError(f"{path}:{number}: not a line of task {name}: {error}") from error
        items.append(item)
    if not items:
        raise ShearlingError(f"{path}: holds no items of task {name}")
    return items


def _lines(path: Path, labels: str | None) -> Iterator[tuple[int, str, str | None]]:
    """Number, text and label (if kept beside) of every line; blank lines are passed over."""
    numbered = [(number, text) for number, text in enumerate(_read(path).split("\n"), start=1) if text.strip()]
    if labels is None:
        yield from ((number, text, None) for number, text in numbered)
        return
    beside = path.with_name(path.stem + labels)
    if not beside.is_file():
        raise ShearlingError(f"{path}: its labels are missing; no file {beside}")
    answers = _read(beside).split()
    if len(answers) != len(numbered):
        raise ShearlingError(f"{beside}: {len(answers)} labels for the {len(numbered)} lines of {path.name}")
    yield from ((number, text, answer) for (number, text), answer in zip(numbered, answers, strict=True))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ShearlingError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
