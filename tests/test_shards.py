"""Token shards: what goes in comes out, and what is broken is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.data import PackedTokens, corpus_tokens, is_packed, pack
from shearling.errors import ShearlingError
from shearling.train import TrainSettings, train
from tests.test_data import Letters
from tests.tiny import VOCAB, tiny_model, tiny_tokenizer


class Wide(Letters):
    """Code points, more of them than two bytes can tell apart."""

    def __len__(self) -> int:
        return 0x110000


class Narrow(Letters):
    def __len__(self) -> int:
        return 0x10000


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(min_codepoint=1, max_codepoint=0xD7FF), max_size=30), min_size=1, max_size=8),
    size=st.integers(1, 40),
    length=st.integers(1, 12),
    limit=st.none() | st.integers(1, 60),
    wide=st.booleans(),
)
def test_windows_are_those_of_each_shard(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int, length: int, limit: int | None, wide: bool
) -> None:
    folder = tmp_path_factory.mktemp("packed")
    tokenizer = Wide() if wide else Narrow()
    source = jsonl(folder / "text.jsonl", texts)
    if not any(texts):
        with pytest.raises(ShearlingError, match="is empty"):
            pack(source, tokenizer, folder / "shards", shard_tokens=size, max_tokens=limit)
        assert not is_packed(folder / "shards")
        return
    expected = corpus_tokens(source, tokenizer, max_tokens=limit)
    packed = pack(source, tokenizer, folder / "shards", shard_tokens=size, max_tokens=limit)
    assert packed.tokens == len(expected)
    assert packed.dtype.itemsize == (4 if wide else 2)
    assert (packed.lowest, packed.highest) == (int(expected.min()), int(expected.max()))
    parts = [part[: len(part) // length * length].view(-1, length) for part in expected.split(size)]
    wanted = torch.cat(parts)
    if not len(wanted):
        with pytest.raises(ShearlingError, match="no shard fills one window"):
            packed.windows(length)
        return
    windows = PackedTokens(folder / "shards").windows(length)
    assert windows.shape == tuple(wanted.shape)
    order = torch.randperm(len(wanted))
    assert torch.equal(windows[order], wanted[order])


def make(tmp_path: Path) -> PackedTokens:
    (tmp_path / "text.txt").write_text("the sheep stood on the hill and the wind went over the grass. " * 20)
    return pack(tmp_path / "text.txt", tiny_tokenizer(), tmp_path / "shards", shard_tokens=500)


SETTINGS = TrainSettings(tokens=6 * 4 * 16, length=16, batch=4, micro_batch=2, learning_rate=1e-2, checkpoint_every=1)


def test_training_from_shards_is_training_from_memory(tmp_path: Path) -> None:
    windows = make(tmp_path).windows(16)
    held = windows[torch.arange(len(windows))]
    results = []
    for text in (windows, held):
        model = tiny_model("llama")
        result = train(model, text, [], SETTINGS)
        results.append((result.losses, model.state_dict()))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(tensor, results[1][1][name]) for name, tensor in results[0][1].items())


def test_a_shard_that_goes_missing_costs_nothing_but_the_step(tmp_path: Path) -> None:
    packed = make(tmp_path)
    whole = tiny_model("llama")
    expected = train(whole, packed.windows(16), [], SETTINGS)
    away = tmp_path / "away"

    def take_away(event: dict[str, object]) -> None:
        if event.get("step") == 3:
            for file in packed.files:
                file.rename(away / file.name)

    away.mkdir()
    model = tiny_model("llama")
    settings = TrainSettings(**{**vars(SETTINGS), "log_every": 1})
    with pytest.raises(ShearlingError, match=r"shard-0000\d\.bin: cannot be read .*resume"):
        train(model, packed.windows(16), [], settings, state_dir=tmp_path / "state", on_event=take_away)
    with pytest.raises(ShearlingError, match=r"shard-00000\.bin: is missing"):
        PackedTokens(packed.folder)
    for file in packed.files:
        (away / file.name).rename(file)
    model = tiny_model("llama")
    result = train(model, packed.windows(16), [], settings, state_dir=tmp_path / "state")
    assert result.losses == expected.losses
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    packed = make(tmp_path)
    with pytest.raises(ShearlingError, match="is not empty"):
        pack(tmp_path / "text.txt", tiny_tokenizer(), tmp_path / "shards")
    windows = packed.windows(16)
    last = packed.files[-1]
    last.write_bytes(last.read_bytes()[:10])
    with pytest.raises(ShearlingError, match="ends early"):
        windows[torch.tensor([len(windows) - 1])]
    with pytest.raises(ShearlingError, match=r"has 10 bytes instead of"):
        PackedTokens(packed.folder)
    (packed.folder / "index.json").unlink()
    with pytest.raises(ShearlingError, match="was not finished"):
        PackedTokens(packed.folder)


def test_tokens_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    source = jsonl(tmp_path / "text.jsonl", ["é" * 40])
    with pytest.raises(ShearlingError, match=f"token ids 0 to 233; the model's vocabulary is 0 to {VOCAB - 1}"):
        train(tiny_model("llama"), pack(source, Narrow(), folder).windows(16), [], SETTINGS)


def test_shards_say_what_they_are(tmp_path: Path) -> None:
    packed = make(tmp_path)
    content = np.concatenate([np.fromfile(file, packed.dtype) for file in packed.files])
    assert content.tolist() == corpus_tokens(tmp_path / "text.txt", tiny_tokenizer()).tolist()
    assert packed.windows(16).digest() == PackedTokens(packed.folder).windows(16).digest()
    assert packed.windows(16).digest() != packed.windows(8).digest()
