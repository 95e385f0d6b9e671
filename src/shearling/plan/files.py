"""Edits on disk: one JSON file that orders them, one safetensors file that holds their values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from shearling.errors import ShearlingError
from shearling.plan.edits import KINDS, Edit


def save_edits(edits: Sequence[Edit], folder: Path) -> None:
    """Write edits into a folder; the JSON file comes last, so a folder without it is unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{position}/{name}": tensor.detach().cpu().contiguous()
        for position, edit in enumerate(edits)
        for name, tensor in edit.tensors().items()
    }
    save_file(tensors, folder / "edits.safetensors.tmp")
    (folder / "edits.safetensors.tmp").replace(folder / "edits.safetensors")
    index = [{"kind": edit.kind, **edit.meta()} for edit in edits]
    (folder / "edits.json.tmp").write_text(json.dumps(index))
    (folder / "edits.json.tmp").replace(folder / "edits.json")


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
