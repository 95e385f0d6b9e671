"""Checkpoints of training: a folder each, one JSON file and one safetensors file, never half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shearling.errors import ShearlingError

_PREFIX = "step-"
#: a newer checkpoint may turn out unreadable (a full disk, a failing one), so one more is kept
_KEPT = 2


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, None, in dicts, lists and tuples) as the checkpoint after ``step``.

    It appears under its name only when whole and on disk; then all but the newest two are deleted.
    Raises ShearlingError when the disk refuses; earlier checkpoints are untouched then.
    """
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, tensors)
    target = folder / f"{_PREFIX}{step:09d}"
    temporary = folder / f".{target.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".{_PREFIX}*.tmp"):  # of a process that was killed while writing
            shutil.rmtree(left)
        temporary.mkdir()
        save_file(_separate(tensors), temporary / "tensors.safetensors")
        (temporary / "state.json").write_text(json.dumps(tree))
        for part in (*temporary.iterdir(), temporary):
            _sync(part)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ShearlingError(f"{target}: cannot be written ({error}); earlier checkpoints are untouched") from error
    for old in checkpoints(folder)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any] | None, list[Path]]:
    """State of the newest readable checkpoint, None where there is none, and the newer ones that are not readable."""
    broken: list[Path] = []
    for path in reversed(checkpoints(folder)):
        try:
            tree = json.loads((path / "state.json").read_text())
            tensors = load_file(path / "tensors.safetensors")
            return _unflatten(tree, tensors), broken
        except (OSError, ValueError, KeyError, SafetensorError):
            broken.append(path)
    return None, broken


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a folder, oldest first."""
    return sorted(folder.glob(_PREFIX + "*")) if folder.is_dir() else []


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, Mapping):
        # pairs, because JSON would turn integer keys into strings
        return {"dict": [[key, _flatten(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_flatten(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be kept in a checkpoint; give tensors, numbers or strings")


def _unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in content}
    items = [_unflatten(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, none sharing its memory with another, as safetensors needs them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        alone = storage.data_ptr() not in seen and storage.nbytes() == tensor.numel() * tensor.element_size()
        seen.add(storage.data_ptr())
        result[name] = tensor.cpu().contiguous() if alone else tensor.cpu().contiguous().clone()
    return result


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
