"""Text in: files, folders, hub data sets, and the text that every Python carries."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.data.stdlib import PARTS, stdlib_texts
from shearling.errors import ShearlingError

_TYPES = (".txt", ".raw", ".md", ".jsonl", ".jsonl.zst", ".parquet")


def read_texts(source: str | Path) -> Iterator[str]:
    """Documents of a source, in order.

    A ``.txt``, ``.raw`` or ``.md`` file is one document; ``.jsonl`` and ``.jsonl.zst`` have one a line under ``text``;
    a folder is all of its files by name; ``stdlib:calibration``, ``stdlib:recovery`` and ``stdlib:evaluation`` are
    parts of the running Python's own text; anything else is a hub data set (``name`` or ``name:split``), which like
    ``.parquet`` needs the extra ``hub``. Raises ShearlingError for what does not exist or cannot be read.
    """
    name = str(source)
    if name.startswith("stdlib:"):
        part = name.removeprefix("stdlib:")
        if part not in PARTS:
            raise ShearlingError(f"text {name!r}: valid parts are {', '.join(f'stdlib:{p}' for p in PARTS)}")
        yield from stdlib_texts(part)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if _type(file))
        if not found:
            raise ShearlingError(f"{path}: holds no text; valid are files ending in {', '.join(_TYPES)}")
        for file in found:
            yield from _read_file(file)
    elif path.exists():
        yield from _read_file(path)
    elif path.suffix or name.startswith((".", "/", "~")):
        raise ShearlingError(f"text {name!r}: no such file or folder")
    else:
        yield from _hub_texts(name)


def corpus_tokens(source: str | Path, tokenizer: Any, *, whole: bool = False, max_tokens: int | None = None) -> Tensor:
    """Token ids [N] (int64) of a source.

    Documents end in the end-of-sequence token; with ``whole`` they are one text instead, joined by two newlines and
    without special tokens (the usual WikiText-2 protocol). At most ``max_tokens`` are returned.
    Raises ShearlingError for a source without text.
    """
    if whole:
        texts = list(read_texts(source))
        if max_tokens is not None:
            texts = _prefix(texts, 12 * max_tokens)
        pieces = [_encode(tokenizer, ["\n\n".join(texts)])[0]]
    else:
        pieces, count = [], 0
        for ids in token_documents(source, tokenizer):
            pieces.append(ids)
            count += len(ids)
            if max_tokens is not None and count >= max_tokens:
                break
    flat = [token for piece in pieces for token in piece][:max_tokens]
    if not flat:
        raise ShearlingError(f"text {str(source)!r}: is empty")
    return torch.tensor(flat, dtype=torch.int64)


def token_documents(source: str | Path, tokenizer: Any) -> Iterator[list[int]]:
    """Tokens of each document of a source that has some, the end-of-sequence token after them."""
    for group in _groups(read_texts(source)):
        for ids in _encode(tokenizer, group):
            if ids:
                yield [*ids, tokenizer.eos_token_id]


def _prefix(texts: list[str], characters: int) -> list[str]:
    """The first texts that together have at least so many characters; no token is longer on average."""
    total = 0
    for count, text in enumerate(texts):
        total += len(text) + 2
        if total >= characters:
            return texts[: count + 1]
    return texts


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _groups(texts: Iterator[str], most: int = 64, characters: int = 1 << 20) -> Iterator[list[str]]:
    """Texts that are tokenised together: few, or long ones, so that whoever needs only the first waits for no more."""
    group: list[str] = []
    total = 0
    for text in texts:
        group.append(text)
        total += len(text)
        if len(group) == most or total >= characters:
            yield group
            group, total = [], 0
    if group:
        yield group


def _type(path: Path) -> str | None:
    return next((ending for ending in _TYPES if path.name.endswith(ending)), None)


def _read_file(path: Path) -> Iterator[str]:
    match _type(path):
        case ".txt" | ".raw" | ".md":
            yield path.read_text(encoding="utf-8")
        case ".jsonl":
            with path.open(encoding="utf-8") as lines:
                yield from _jsonl(path, lines)
        case ".jsonl.zst":
            import zstandard

            with path.open("rb") as stream, zstandard.ZstdDecompressor().stream_reader(stream) as reader:
                yield from _jsonl(path, io.TextIOWrapper(reader, encoding="utf-8"))
        case ".parquet":
            yield from _dataset_texts(str(path), "parquet", data_files=str(path), split="train")
        case _:
            raise ShearlingError(f"{path}: cannot be read as text; valid are files ending in {', '.join(_TYPES)}")


def _jsonl(path: Path, lines: Any) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ShearlingError(f'{path}:{number}: is no JSON object with a field "text"') from error
        if not isinstance(text, str):
            raise ShearlingError(f'{path}:{number}: "text" is no string')
        yield text


def _hub_texts(name: str) -> Iterator[str]:
    repository, _, split = name.partition(":")
    yield from _dataset_texts(name, repository, split=split or "train", streaming=True)


def _dataset_texts(name: str, *args: Any, **kwargs: Any) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ShearlingError(f"text {name!r}: parquet and hub data sets need pip install 'shearling[hub]'") from error
    try:
        for row in load_dataset(*args, **kwargs):
            yield row["text"]
    except (OSError, ValueError, KeyError) as error:
        raise ShearlingError(f"text {name!r}: cannot be read ({' '.join(str(error).split())[:200]})") from error
