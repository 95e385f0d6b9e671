"""Edits as a JSON file that orders them and a file of their values; tensors written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from shearling.errors import ShearlingError
from shearling.files import replacing, write_whole
from shearling.plan.edits import KINDS, Edit


def save_edits(edits: Sequence[Edit], folder: Path) -> None:
    """Write edits into a folder; the JSON file comes last, so a folder without it is unfinished."""
    tensors = {
        f"{position}/{name}": tensor for position, edit in enumerate(edits) for name, tensor in edit.tensors().items()
    }
    write_tensors(tensors, folder / "edits.safetensors")
    index = [{"kind": edit.kind, **edit.meta()} for edit in edits]
    write_whole(folder / "edits.json", json.dumps(index))


def load_edits(folder: Path) -> tuple[Edit, ...]:
    """Read edits back; ShearlingError when the folder holds none."""
    if not (folder / "edits.json").exists():
        raise ShearlingError(f"{folder}: no edits.json; it was not finished, or is no folder of edits")
    index = json.loads((folder / "edits.json").read_text())
    tensors = load_file(folder / "edits.safetensors")
    edits = []
    for position, meta in enumerate(index):
        prefix = f"{position}/"
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        edits.append(KINDS[meta["kind"]].restore(meta, own))
    return tuple(edits)


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, and its folder, so that a reader finds it whole or not at all.

    Raises ShearlingError where it cannot be written.
    """
    with replacing(file) as unfinished:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, unfinished, metadata=metadata)
