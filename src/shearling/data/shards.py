"""Token shards: a corpus tokenised once, read window by window without holding it in memory.

A folder holds ``index.json`` and files of raw little-endian tokens, two bytes each where the vocabulary allows, else
four. The index is written last, so a folder without it is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shearling.data.text import token_documents
from shearling.errors import ShearlingError, unwritable
from shearling.files import write_whole

INDEX = "index.json"
SHARD_TOKENS = 1 << 24


def pack(
    source: str | Path, tokenizer: Any, folder: Path, *, shard_tokens: int = SHARD_TOKENS, max_tokens: int | None = None
) -> PackedTokens:
    """Tokenise a source (as ``read_texts`` takes it) into a new folder; documents end in the end-of-sequence token.

    Raises ShearlingError for a folder that holds something, a source without text, and a place that cannot be written.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ShearlingError(f"{folder}: is not empty; pack into a new folder")
    vocab = len(tokenizer)
    dtype = np.dtype("<u2" if vocab <= 1 << 16 else "<u4")
    shards = []
    low, high = vocab, -1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, tokens in enumerate(_parts(token_documents(source, tokenizer), shard_tokens, max_tokens)):
            low, high = min(low, int(tokens.min())), max(high, int(tokens.max()))
            content = tokens.astype(dtype).tobytes()
            name = f"shard-{number:05d}.bin"
            (folder / name).write_bytes(content)
            shards.append({"file": name, "tokens": len(tokens), "sha256": hashlib.sha256(content).hexdigest()})
    except OSError as error:
        raise unwritable(folder, error) from error
    if not shards:
        raise ShearlingError(f"text {str(source)!r}: is empty")
    index = {"format": 1, "dtype": dtype.str, "vocab": vocab, "lowest": low, "highest": high, "shards": shards}
    write_whole(folder / INDEX, json.dumps(index, indent=1))
    return PackedTokens(folder)


def is_packed(folder: Path) -> bool:
    """Whether a folder holds finished token shards."""
    return (folder / INDEX).is_file()


class PackedTokens:
    """A folder of token shards; ShearlingError where it has no index, or a shard is missing or too short."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            index = json.loads((folder / INDEX).read_text())
        except (OSError, ValueError) as error:
            raise ShearlingError(f"{folder / INDEX}: cannot be read; the folder was not finished, pack anew") from error
        self.dtype = np.dtype(index["dtype"])
        self.lowest, self.highest = index["lowest"], index["highest"]
        self.files = [folder / shard["file"] for shard in index["shards"]]
        self.counts = [shard["tokens"] for shard in index["shards"]]
        self.sums = [shard["sha256"] for shard in index["shards"]]
        for file, count in zip(self.files, self.counts, strict=True):
            size = file.stat().st_size if file.exists() else -1
            if size != count * self.dtype.itemsize:
                what = "is missing" if size < 0 else f"has {size} bytes instead of {count * self.dtype.itemsize}"
                raise ShearlingError(f"{file}: {what}; pack the corpus anew")

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    def windows(self, length: int) -> PackedWindows:
        """Windows of ``length`` tokens that do not overlap; none reaches over the end of a shard."""
        return PackedWindows(self, length)


class PackedWindows:
    """Windows [num, length] of token shards, each read from disk when it is asked for."""

    def __init__(self, packed: PackedTokens, length: int) -> None:
        if max(packed.counts) < length:
            raise ShearlingError(f"{packed.folder}: no shard fills one window of {length} tokens; use a shorter length")
        self.packed, self.length = packed, length
        self._ends = np.cumsum([count // length for count in packed.counts])

    @property
    def shape(self) -> tuple[int, int]:
        return int(self._ends[-1]), self.length

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Windows [len(indices), length], int64; ShearlingError where a shard cannot be read."""
        return torch.stack([self._read(int(index)) for index in indices])

    def token_range(self) -> tuple[int, int]:
        """Lowest and highest token id."""
        return self.packed.lowest, self.packed.highest

    def digest(self) -> str:
        """What tells these windows from others."""
        return hashlib.sha256(repr((self.packed.sums, self.length)).encode()).hexdigest()

    def _read(self, index: int) -> Tensor:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = 0 if shard == 0 else int(self._ends[shard - 1])
        size = self.length * self.packed.dtype.itemsize
        file = self.packed.files[shard]
        try:
            # not memory-mapped: a file that shrinks while it is mapped kills the process
            with file.open("rb") as stream:
                content = os.pread(stream.fileno(), size, (index - first) * size)
        except OSError as error:
            raise ShearlingError(f"{file}: cannot be read ({error.strerror}); put it back and resume") from error
        if len(content) != size:
            raise ShearlingError(f"{file}: ends early; it was changed after packing, pack the corpus anew")
        return torch.from_numpy(np.frombuffer(content, self.packed.dtype).astype(np.int64))


def _parts(documents: Iterator[list[int]], size: int, limit: int | None) -> Iterator[np.ndarray]:
    """Tokens of all documents in parts of ``size``, the last one shorter; at most ``limit`` in all."""
    held, total = array("I"), 0
    for ids in documents:
        ids = ids if limit is None else ids[: limit - total]
        total += len(ids)
        held.extend(ids)
        while len(held) >= size:
            yield np.array(held[:size], np.int64)
            held = held[size:]
        if total == limit:
            break
    if held:
        yield np.array(held, np.int64)
