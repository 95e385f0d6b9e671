"""Files and folders written whole or not at all; edits as a JSON file that orders them and a file of their values."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shearling.errors import ShearlingError, unwritable
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
    with _replacing(file) as unfinished:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, unfinished, metadata=metadata)


def check_new(place: Path) -> None:
    """Raise ShearlingError where something is already at the place of what is to be written."""
    if place.exists():
        raise ShearlingError(f"{place}: already exists; choose another name or remove it")


@contextmanager
def beside(place: Path) -> Iterator[Path]:
    """Where to make a file or a folder, which is moved to ``place`` after the block and is gone when that raised.

    The folder it is made in goes too, so there is room for what only the work needs. Raises ShearlingError where
    something is at ``place``, before the block or after it, and, before the block, where nothing can be written there.
    Errors of the block stay what they are: ``writing`` is for those.
    """
    check_new(place)
    room = place.with_name(f".{place.name}.unfinished")
    # another process at the same place empties the room; by its own name neither moves what the other has half written
    unfinished = room / str(os.getpid())
    try:
        with writing(place):
            # of a process that was killed
            shutil.rmtree(room, ignore_errors=True)
            room.mkdir(parents=True)
        yield unfinished
        check_new(place)
        with writing(place):
            unfinished.replace(place)
    finally:
        shutil.rmtree(room, ignore_errors=True)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Within, what the disk or safetensors refuses is a ShearlingError that names ``place``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise unwritable(place, error) from error


def write_whole(file: Path, text: str) -> None:
    """Write a text file as ``write_tensors`` writes its own: a reader sees the old content or the new."""
    with _replacing(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_bytes(file: Path, content: bytes) -> None:
    """Write a binary file as ``write_tensors`` writes its own."""
    with _replacing(file) as unfinished:
        unfinished.write_bytes(content)


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """A file to write, which takes the place of ``file`` when it is whole and is gone when it is not."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            yield unfinished
            unfinished.replace(file)
    finally:
        # where the folder itself could not be made there is nothing to remove
        with suppress(OSError):
            unfinished.unlink()
