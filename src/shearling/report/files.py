"""The files of a run, read for a report; any of them may be missing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError

Record = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """What a run directory holds; empty where a file is missing."""

    directory: Path
    plan: Record
    metrics: Record
    events: list[Record]
    recipe: str


def read_run(directory: Path) -> RunFiles:
    """Read plan.json, metrics.json, metrics.jsonl and recipe.yaml.

    Raises ShearlingError where there is neither a plan nor metrics, or a file cannot be read.
    """
    if not directory.is_dir():
        raise ShearlingError(f"{directory}: no such run directory")
    if not any((directory / name).is_file() for name in ("plan.json", "metrics.json")):
        raise ShearlingError(f"{directory}: not a run (it holds no plan.json and no metrics.json)")
    return RunFiles(
        directory=directory,
        plan=_record(directory / "plan.json"),
        metrics=_record(directory / "metrics.json"),
        events=_events(directory / "metrics.jsonl"),
        recipe=_text(directory / "recipe.yaml"),
    )


def record(value: Any) -> Record:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def records(value: Any) -> list[Record]:
    """The objects in the value if it is a list, else none."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ShearlingError(f"{path}: cannot be read ({error})") from error


def _parse(text: str, where: str) -> Record:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShearlingError(f"{where}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ShearlingError(f"{where}: must hold a JSON object, not {type(value).__name__}")
    return value


def _record(path: Path) -> Record:
    text = _text(path)
    return _parse(text, str(path)) if text.strip() else {}


def _events(path: Path) -> list[Record]:
    text = _text(path)
    lines = text.split("\n")
    # A killed run leaves its last line unfinished; every finished one ends in a newline.
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines[:-1], start=1) if line.strip()]
