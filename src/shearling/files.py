"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from shearling.errors import ShearlingError, unwritable


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
    """Write a text file, and its folder, so that a reader sees the old content or the new, never a part.

    Raises ShearlingError where it cannot be written.
    """
    # a generated sample may hold half a surrogate pair, which UTF-8 cannot carry
    write_bytes(file, text.encode("utf-8", errors="replace"))


def write_bytes(file: Path, content: bytes) -> None:
    """Write a binary file as ``write_whole`` writes text."""
    with replacing(file) as unfinished:
        unfinished.write_bytes(content)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
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
