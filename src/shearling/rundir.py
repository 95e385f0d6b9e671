"""A run's directory: what is in it, what is finished, and writing into it without leaving halves."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from shearling.errors import ShearlingError, unwritable
from shearling.files import write_whole
from shearling.recipe import Budget, Recipe, Target

#: keys of a recipe that a resumed run may change, since they leave the result alone
_FREE = ("device", "track")
_SHAPE = "state/shape.json"


class RunDir:
    """The files of one run under ``path``.

    Raises ShearlingError where the folder holds something else, holds a run and ``resume`` is off, holds the run of
    another recipe, or cannot be written.
    """

    def __init__(self, path: Path, recipe: Recipe, *, resume: bool) -> None:
        self.path = path
        self.state = path / "state"
        recorded = path / "recipe.yaml"
        if path.exists() and not path.is_dir():
            raise ShearlingError(f"{path}: is a file; give a folder")
        if path.exists() and any(path.iterdir()):
            if not recorded.exists():
                raise ShearlingError(f"{path}: holds files but no run; give a new or an empty folder")
            if not resume:
                raise ShearlingError(f"{path}: already holds a run; go on with --resume or give another folder")
            _check_same(recorded, recipe)
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            if not recorded.exists():
                write_whole(recorded, recipe.dump())
            self._drop_unfinished_line()
        except OSError as error:
            raise unwritable(path, error) from error

    def done(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage recorded, or None."""
        file = self.state / f"{stage}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def finish(self, stage: str, content: dict[str, Any]) -> None:
        """Record a finished stage; from now on ``done`` returns ``content``."""
        self.write_json(f"state/{stage}.json", content)

    def record_shape(self, budget: Budget, recipe: Recipe) -> None:
        """Keep which shape a budget came to: that which ``recipe`` names."""
        assert recipe.first is not None
        shape = {"budget": budget.model_dump(), "target": recipe.first.model_dump()["target"]}
        self.write_json(_SHAPE, shape)

    def write_json(self, name: str, content: Any) -> None:
        write_whole(self.path / name, json.dumps(content, indent=2) + "\n")

    def event(self, event: dict[str, Any]) -> None:
        """Append an event to ``metrics.jsonl``."""
        self._append("metrics.jsonl", json.dumps(event) + "\n")

    def log(self, text: str) -> None:
        """Append a line, with the time, to ``log.txt``."""
        self._append("log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def tidy(self) -> None:
        """Drop what only resuming needs; the records of finished stages stay."""
        for entry in self.state.iterdir():
            if entry.is_dir() and entry.name != "edits":
                shutil.rmtree(entry, ignore_errors=True)

    def _append(self, name: str, text: str) -> None:
        try:
            with (self.path / name).open("a", encoding="utf-8") as stream:
                stream.write(text)
        except OSError as error:
            raise unwritable(self.path / name, error) from error

    def _drop_unfinished_line(self) -> None:
        """A killed run may have left half an event behind."""
        file = self.path / "metrics.jsonl"
        if file.exists():
            content = file.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                file.write_bytes(whole)


def recorded_shape(path: Path, budget: Budget) -> Target | None:
    """The shape that a budget came to in the run under ``path``; None where there is none of that budget."""
    file = path / _SHAPE
    content = json.loads(file.read_text()) if file.exists() else {}
    return Target(**content["target"]) if content.get("budget") == budget.model_dump() else None


def _check_same(recorded: Path, recipe: Recipe) -> None:
    try:
        before = yaml.safe_load(recorded.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ShearlingError(f"{recorded}: cannot be read; give another folder") from error
    now = yaml.safe_load(recipe.dump())
    old, new = _flat(before), _flat(now)
    for field in sorted({*old, *new}):
        if old.get(field) != new.get(field) and field.split(".")[0] not in _FREE:
            raise ShearlingError(
                f"{recorded.parent}: holds a run with {field}={old.get(field)!r}, this recipe says {new.get(field)!r}; "
                "give another folder"
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat
