"""A teacher's likeliest next tokens on disk: it runs once over all windows, and training reads what it said.

A folder holds ``header.json`` (what it is a cache of), shards, and ``index.json``, written last: a folder without it is
unfinished. A shard of n windows is float16 log-probabilities [n, length, k], then token ids [n, length, k], two bytes
each where the vocabulary allows, else four; all little-endian.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shearling.data import MemoryWindows, Windows
from shearling.errors import ShearlingError
from shearling.files import write_bytes, write_whole
from shearling.train.documents import document_positions
from shearling.train.head import Head, output_head
from shearling.train.loss import through_head
from shearling.train.teachers import Teacher

HEADER, INDEX = "header.json", "index.json"
SHARD_TOKENS = 1 << 18
_LOG_PROB = np.dtype("<f2")


def cache_teacher(
    teacher: Any,
    windows: Tensor | Windows,
    folder: Path,
    *,
    k: int = 64,
    batch: int = 8,
    vocab: int | None = None,
    separator: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    chunk: int = 512,
    on_progress: Callable[[int, int], None] | None = None,
) -> CachedTeacher:
    """Keep a teacher's k likeliest next tokens at every position of all windows [n, T], at temperature 1.

    ``teacher`` is a model or a ``Teacher``; ``vocab`` (all of its own by default) says how many of its first tokens
    make up the distribution; ``separator`` keeps documents apart as in ``TrainSettings``. ``batch`` windows pass at a
    time, and ``chunk`` tokens through the head. A folder that was begun with the same arguments goes on after its last
    finished shard, and a finished one is returned as it is.

    Raises ShearlingError for a folder of something else, tokens or a vocabulary that the teacher has not, and a place
    that cannot be written.
    """
    teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
    text: Windows = MemoryWindows(windows) if isinstance(windows, Tensor) else windows
    known = output_head(teacher.model).weight.shape[0]
    vocab = known if vocab is None else vocab
    if not (0 < vocab <= known and k > 0 and batch > 0):
        raise ShearlingError(
            f"k={k}, batch={batch}, vocab={vocab}: must be above 0, vocab at most the teacher's {known}"
        )
    low, high = text.token_range()
    if low < 0 or high >= known:
        raise ShearlingError(f"windows: token ids {low} to {high}; the teacher's vocabulary is 0 to {known - 1}")
    count, length = len(text), text.shape[1]
    per_shard = max(1, shard_tokens // length)
    header = {
        "format": 1,
        "teacher": str(getattr(teacher.model.config, "_name_or_path", "")),
        "teacher_digest": _digest(teacher.model),
        "windows": text.digest(),
        "count": count,
        "length": length,
        "vocab": vocab,
        "k": min(k, vocab),
        "temperature": 1,
        "separator": separator,
        "dtype": np.dtype("<u2" if vocab <= 1 << 16 else "<u4").str,
        "per_shard": per_shard,
    }
    _begin(folder, header)
    if (folder / INDEX).exists():
        return CachedTeacher(folder, text)
    shards = []
    for number, start in enumerate(range(0, count, per_shard)):
        rows = torch.arange(start, min(start + per_shard, count))
        file = folder / f"shard-{number:05d}.bin"
        content = _finished(file, len(rows) * _window_bytes(header))
        if content is None:
            content = _shard(teacher, text, rows, header, batch, chunk, on_progress)
            write_bytes(file, content)
        elif on_progress is not None:
            on_progress(int(rows[-1]) + 1, count)
        shards.append({"file": file.name, "windows": len(rows), "sha256": hashlib.sha256(content).hexdigest()})
    write_whole(folder / INDEX, json.dumps({**header, "shards": shards}, indent=1))
    return CachedTeacher(folder, text)


class CachedTeacher:
    """A finished cache of a teacher; with ``windows``, checked to be of these.

    Raises ShearlingError where the folder is not finished, a shard is missing or has another size, or the windows are
    others.
    """

    def __init__(self, folder: Path, windows: Tensor | Windows | None = None) -> None:
        self.folder = folder
        try:
            index = json.loads((folder / INDEX).read_text())
        except (OSError, ValueError) as error:
            raise ShearlingError(f"{folder / INDEX}: cannot be read; finish the cache of the teacher first") from error
        #: where the teacher was loaded from
        self.teacher: str = index["teacher"]
        self.count, self.length, self.k = index["count"], index["length"], index["k"]
        self.vocab: int = index["vocab"]
        # caches from before documents could be apart do not say
        self.separator: int | None = index.get("separator")
        self._digest = index["windows"]
        self._ids = np.dtype(index["dtype"])
        self._per_shard, self._window_bytes = index["per_shard"], _window_bytes(index)
        self._files = [folder / shard["file"] for shard in index["shards"]]
        self._counts = [shard["windows"] for shard in index["shards"]]
        for file, held in zip(self._files, self._counts, strict=True):
            size, wanted = file.stat().st_size if file.exists() else -1, held * self._window_bytes
            if size != wanted:
                what = "is missing" if size < 0 else f"has {size} bytes instead of {wanted}"
                raise ShearlingError(f"{file}: {what}; delete {INDEX} beside it and finish the cache again")
        if windows is not None:
            self.check_windows(windows)

    def check_windows(self, windows: Tensor | Windows) -> None:
        """Raise ShearlingError where the cache is of other windows."""
        text = MemoryWindows(windows) if isinstance(windows, Tensor) else windows
        if text.digest() != self._digest:
            raise ShearlingError(
                f"{self.folder}: a cache of other windows ({self.count} of {self.length} tokens); give another folder"
            )

    def check_vocabulary(self, vocab: int) -> None:
        """Raise ShearlingError where the cache is of another vocabulary."""
        if vocab != self.vocab:
            raise ShearlingError(
                f"{self.folder}: a cache of a vocabulary of {self.vocab}, the model's is {vocab}; give another folder"
            )

    def check_separator(self, separator: int | None) -> None:
        """Raise ShearlingError where the cache was made with documents apart and these are together, or otherwise."""
        if separator != self.separator:
            raise ShearlingError(
                f"{self.folder}: a cache with separator={self.separator}, not {separator}; give another folder"
            )

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (float32) and token ids (int64) [len(indices), length, k] of windows.

        Raises ShearlingError where a shard cannot be read.
        """
        read = [self._read(int(index)) for index in indices]
        return torch.stack([probs for probs, _ in read]), torch.stack([ids for _, ids in read])

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.count:
            raise ShearlingError(f"{self.folder}: holds {self.count} windows, none has the index {index}")
        shard, row = divmod(index, self._per_shard)
        file, cells = self._files[shard], self.length * self.k
        wide, narrow = cells * self._ids.itemsize, cells * _LOG_PROB.itemsize
        try:
            with file.open("rb") as stream:
                probs = os.pread(stream.fileno(), narrow, row * narrow)
                ids = os.pread(stream.fileno(), wide, self._counts[shard] * narrow + row * wide)
        except OSError as error:
            raise ShearlingError(f"{file}: cannot be read ({error.strerror}); put it back and resume") from error
        if len(probs) != narrow or len(ids) != wide:
            raise ShearlingError(f"{file}: ends early; it was changed after caching, cache the teacher anew")
        shape = (self.length, self.k)
        return (
            torch.from_numpy(np.frombuffer(probs, _LOG_PROB).astype(np.float32)).view(shape),
            torch.from_numpy(np.frombuffer(ids, self._ids).astype(np.int64)).view(shape),
        )


def _begin(folder: Path, header: dict[str, Any]) -> None:
    """Write the header, or find the same one there."""
    if folder.exists() and not folder.is_dir():
        raise ShearlingError(f"{folder}: is a file; give a folder")
    if not (folder / HEADER).exists():
        if folder.exists() and any(not entry.name.endswith(".unfinished") for entry in folder.iterdir()):
            raise ShearlingError(f"{folder}: holds files but no cache of a teacher; give a new or an empty folder")
        write_whole(folder / HEADER, json.dumps(header, indent=1))
        return
    try:
        found = json.loads((folder / HEADER).read_text())
    except (OSError, ValueError) as error:
        raise ShearlingError(f"{folder / HEADER}: cannot be read; give another folder") from error
    for name, value in header.items():
        # where a teacher was loaded from is told, but what it is counts
        if name != "teacher" and found.get(name) != value:
            raise ShearlingError(
                f"{folder}: a cache with {name}={found.get(name)}, this one has {value}; give another folder"
            )


def _finished(file: Path, size: int) -> bytes | None:
    content = file.read_bytes() if file.is_file() else b""
    return content if len(content) == size else None


def _shard(
    teacher: Teacher,
    text: Windows,
    rows: Tensor,
    header: dict[str, Any],
    batch: int,
    chunk: int,
    on_progress: Callable[[int, int], None] | None,
) -> bytes:
    probs: list[bytes] = []
    ids: list[bytes] = []
    for part in rows.split(batch):
        found = _top(teacher, text[part], header, chunk)
        probs.append(found[0].numpy().astype(_LOG_PROB).tobytes())
        ids.append(found[1].numpy().astype(header["dtype"]).tobytes())
        if on_progress is not None:
            on_progress(int(part[-1]) + 1, header["count"])
    return b"".join((*probs, *ids))


@torch.no_grad()
def _top(teacher: Teacher, windows: Tensor, header: dict[str, Any], chunk: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids [B, T, k] of the likeliest tokens, on the CPU."""
    k, vocab = header["k"], header["vocab"]
    ids = windows.to(teacher.device).long()
    hidden = teacher.states(ids, document_positions(ids, header["separator"])).hidden
    weight, bias, softcap = teacher.head()
    head = Head(weight[:vocab], None if bias is None else bias[:vocab], softcap)
    found: list[tuple[Tensor, Tensor]] = []

    def take(logits: Tensor, rows: slice, with_slope: bool) -> tuple[Tensor, None]:
        values, ids = logits.topk(k, dim=1)
        found.append(((values - logits.logsumexp(1, keepdim=True)).cpu(), ids.cpu()))
        return logits.new_zeros(()), None

    # no loss is wanted, only the logits of a chunk in the precision that training has
    through_head(hidden, head, take, chunk)
    shape = (*windows.shape, k)
    # float16 ends at -65504, and a probability of 0 has no finite logarithm
    lowest = torch.finfo(torch.float16).min
    return (
        torch.cat([probs for probs, _ in found]).clamp(min=lowest).view(shape),
        torch.cat([ids for _, ids in found]).view(shape),
    )


def _window_bytes(header: dict[str, Any]) -> int:
    return header["length"] * header["k"] * (_LOG_PROB.itemsize + np.dtype(header["dtype"]).itemsize)


def _digest(model: nn.Module) -> str:
    """What tells a teacher from others: some values of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(repr((name, tuple(parameter.shape), parameter.dtype)).encode())
        digest.update(parameter.detach().flatten()[:256].double().cpu().numpy().tobytes())
    return digest.hexdigest()
