"""Checkpoints of training: a folder each, never half-written, written by all processes and readable by any number.

A folder holds what torch.distributed.checkpoint writes (tensors, sharded as they lie) and ``state.json``: the tree of
everything else, where each tensor stands in it, and the sizes of the other files.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from shearling.errors import ShearlingError
from shearling.train.world import World

_PREFIX = "step-"
_TREE = "state.json"
#: a newer checkpoint may turn out unreadable (a full disk, a failing one), so one more is kept
_KEPT = 2


class Checkpoints:
    """The checkpoints of a folder; with ``background`` they are written while training goes on."""

    def __init__(self, folder: Path, world: World | None = None, *, background: bool = False) -> None:
        self.folder = folder
        self._world = world or World()
        self._background = background
        self._pending: Future[Any] | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write ``state`` (tensors, numbers, strings, None, in dicts, lists and tuples) as the one after ``step``.

        It appears under its name only when whole and on disk; then all but the newest two are deleted. The tree must
        be the same in every process, up to the shards of its tensors. Raises ShearlingError when the disk refuses,
        now or, in the background, at the next ``save`` or ``wait``; earlier checkpoints are untouched then.
        """
        self.wait()
        tensors: dict[str, Tensor] = {}
        tree = _flatten(state, tensors, ())
        target = self.folder / f"{_PREFIX}{step:09d}"
        temporary = self.folder / f".{target.name}.tmp"
        try:
            if self._world.first:
                self.folder.mkdir(parents=True, exist_ok=True)
                for left in self.folder.glob(f".{_PREFIX}*.tmp"):  # of a process that was killed while writing
                    shutil.rmtree(left)
                temporary.mkdir()
        except OSError as error:
            raise _refused(target, error) from error
        self._world.wait()
        writer = FileSystemWriter(temporary)
        if not self._background:
            try:
                _write(tensors, writer, self._world)
                self._publish(temporary, target, tree)
            except (Exception, CheckpointException) as error:
                shutil.rmtree(temporary, ignore_errors=True)
                raise _refused(target, error) from error
            self._world.wait()
            return
        done: Future[Any] = Future()
        with _quiet():
            written = dcp.async_save(tensors, storage_writer=writer, **_group(self._world))

        def publish(future: Future[Any]) -> None:
            try:
                future.result()
                self._publish(temporary, target, tree)
                done.set_result(None)
            except (Exception, CheckpointException) as error:
                shutil.rmtree(temporary, ignore_errors=True)
                done.set_exception(_refused(target, error))

        assert isinstance(written, Future)
        written.add_done_callback(publish)
        self._pending = done

    def wait(self) -> None:
        """Until the checkpoint that is being written is there; ShearlingError where it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
            self._world.wait()

    def newest(self) -> tuple[Stored | None, list[Path]]:
        """The newest readable checkpoint, None where there is none, and the newer ones that are not readable."""
        found: Stored | None = None
        broken: list[Path] = []
        for path in reversed(checkpoints(self.folder)) if self._world.first else ():
            try:
                found = _opened(path)
                break
            except (OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError):
                broken.append(path)
        return self._world.agree((found, broken))

    def _publish(self, temporary: Path, target: Path, tree: Any) -> None:
        """Make a written folder the checkpoint ``target``, and delete the ones that are no longer kept."""
        if not self._world.first:
            return
        files = {path.name: path.stat().st_size for path in temporary.iterdir()}
        (temporary / _TREE).write_text(json.dumps({"files": files, "tree": tree}))
        for part in (*temporary.iterdir(), temporary):
            _sync(part)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        _sync(self.folder)
        for old in checkpoints(self.folder)[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class Stored:
    """A whole checkpoint on disk: its tree, in which ``Place`` stands for a tensor."""

    path: Path
    tree: Any

    def load(self, world: World, like: Callable[[Place], Tensor | None] = lambda place: None) -> Any:
        """The state that was saved; tensors go into what ``like`` gives for their place, else into new ones on the CPU.

        ``like`` may give DTensors, sharded over any number of processes.
        """
        targets: dict[str, Any] = {}
        for place in tree_leaves(self.tree):
            if isinstance(place, Place):
                target = like(place)
                targets[place.name] = torch.empty(place.shape, dtype=place.dtype) if target is None else target
        with _quiet():
            dcp.load(targets, storage_reader=_Reader(self.path), **_group(world))
        return tree_map_only(Place, lambda place: targets[place.name], self.tree)


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in a tree, and what it is."""

    keys: tuple[Any, ...]
    shape: torch.Size
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return "/".join(map(str, self.keys))


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a folder, oldest first."""
    return sorted(folder.glob(_PREFIX + "*")) if folder.is_dir() else []


class _Reader(FileSystemReader):
    """Reads what torch writes, but trusts its pickled index no further than the classes that belong there."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        type_name = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module in known or type_name or (module, name) in _PLAIN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


_PLAIN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}


def _write(tensors: dict[str, Tensor], writer: FileSystemWriter, world: World) -> None:
    with _quiet():
        dcp.save(tensors, storage_writer=writer, **_group(world))


def _group(world: World) -> dict[str, Any]:
    return {"no_dist": True} if world.size == 1 else {"process_group": world.files}


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns where it is asked to work in one process, which is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _opened(path: Path) -> Stored:
    """A checkpoint whose files are all there; an error says that they are not."""
    content = json.loads((path / _TREE).read_text())
    for name, size in content["files"].items():
        if (path / name).stat().st_size != size:
            raise ValueError(f"{path / name}: has another size")
    index = _Reader(path).read_metadata().state_dict_metadata
    return Stored(path, _placed(content["tree"], (), index))


def _flatten(value: Any, tensors: dict[str, Tensor], keys: tuple[Any, ...]) -> Any:
    if isinstance(value, Tensor):
        name = "/".join(map(str, keys))
        assert name not in tensors, f"two tensors stand at {name}"
        tensors[name] = _own(value.detach())
        return {"tensor": None}
    if isinstance(value, Mapping):
        # pairs, because JSON would turn integer keys into strings
        return {"dict": [[key, _flatten(item, tensors, (*keys, key))] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_flatten(item, tensors, (*keys, n)) for n, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be kept in a checkpoint; give tensors, numbers or strings")


def _own(tensor: Tensor) -> Tensor:
    """The tensor without the rest of the storage that it is a view of, which would be written too."""
    if isinstance(tensor, DTensor) or tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor
    return tensor.clone()


def _placed(tree: Any, keys: tuple[Any, ...], index: Mapping[str, Any]) -> Any:
    """The tree with a Place for each tensor."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        found = index["/".join(map(str, keys))]
        assert isinstance(found, TensorStorageMetadata)
        return Place(keys, found.size, found.properties.dtype)
    if kind == "dict":
        return {key: _placed(item, (*keys, key), index) for key, item in content}
    items = [_placed(item, (*keys, number), index) for number, item in enumerate(content)]
    return tuple(items) if kind == "tuple" else items


def _refused(target: Path, error: BaseException) -> ShearlingError:
    if isinstance(error, CheckpointException):
        # the first process' reason, without its traceback
        error = next(iter(error.failures.values()))[0]
    return ShearlingError(f"{target}: cannot be written ({error}); earlier checkpoints are untouched")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
