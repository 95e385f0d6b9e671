"""Text sources, token streams and windows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shearling.data import corpus_tokens, read_texts, sampled_windows, spread, tokens_digest, windows
from shearling.data.sampled import SAMPLE
from shearling.data.stdlib import PARTS
from shearling.errors import ShearlingError
from tests.tiny import tiny_model


class Letters:
    """A tokenizer whose tokens are code points."""

    eos_token_id = 0

    def __call__(self, texts: list[str], **options: bool) -> dict[str, list[list[int]]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


ROWS = ["one", "", "three"]


def test_every_file_type_gives_the_same_documents(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": row}) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (tmp_path / "c.txt").write_text("one")
    assert list(read_texts(tmp_path / "a.jsonl")) == ROWS
    assert list(read_texts(tmp_path / "b.jsonl.zst")) == ROWS
    assert list(read_texts(tmp_path / "c.txt")) == ["one"]
    assert list(read_texts(tmp_path)) == [*ROWS, *ROWS, "one"]


def test_streams(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    whole = corpus_tokens(path, Letters(), whole=True)
    assert "".join(map(chr, whole)) == "one\n\n\n\nthree"
    assert "".join(map(chr, corpus_tokens(path, Letters()))) == "one\0three\0"
    assert len(corpus_tokens(path, Letters(), max_tokens=5)) == 5
    assert len(corpus_tokens(path, Letters(), whole=True, max_tokens=5)) == 5


def test_stdlib_parts_share_nothing() -> None:
    parts = {part: list(read_texts(f"stdlib:{part}")) for part in PARTS}
    for part, texts in parts.items():
        others = {text for other, found in parts.items() if other != part for text in found}
        assert not others.intersection(texts)
        assert texts == list(read_texts(f"stdlib:{part}"))
    sizes = {part: sum(map(len, texts)) for part, texts in parts.items()}
    assert sizes["calibration"] > 600_000
    assert sizes["evaluation"] > 400_000
    assert sizes["recovery"] > 3_000_000


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "no such file"),
        ("a.jsonl", '{"text": 1}\n', 'a.jsonl:1: "text" is no string'),
        ("a.jsonl", '{"text": "x"}\n{"test": "x"}\n', "a.jsonl:2: is no JSON object"),
        ("a.csv", "x", "cannot be read as text"),
        ("a.txt", "", "is empty"),
    ],
)
def test_bad_sources(tmp_path: Path, name: str, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ShearlingError, match=says):
        corpus_tokens(tmp_path / name, Letters())


def test_unknown_stdlib_part() -> None:
    with pytest.raises(ShearlingError, match="stdlib:recovery"):
        list(read_texts("stdlib:training"))


@given(st.integers(0, 200), st.integers(1, 20), st.integers(1, 6), st.none() | st.integers(0, 9))
def test_windows_never_overlap(total: int, length: int, num: int, seed: int | None) -> None:
    tokens = torch.arange(total)
    if total < num * length:
        with pytest.raises(ShearlingError, match=f"{num * length} needed"):
            windows(tokens, num, length, seed=seed)
        return
    found = windows(tokens, num, length, seed=seed)
    assert found.shape == (num, length)
    assert len(set(found.flatten().tolist())) == num * length
    if seed is None:
        assert torch.equal(found.flatten(), tokens[: num * length])


@pytest.mark.parametrize(
    ("count", "num", "expected"),
    [
        (10, 1, [0]),
        (10, 2, [0, 9]),
        (10, 4, [0, 3, 6, 9]),
        # 0, 11/3, 22/3, 11
        (12, 4, [0, 4, 7, 11]),
        (5, 5, [0, 1, 2, 3, 4]),
        (3, 7, [0, 1, 2]),
    ],
)
def test_spread_windows_by_hand(count: int, num: int, expected: list[int]) -> None:
    assert spread(torch.arange(count)[:, None], num).flatten().tolist() == expected


@given(st.integers(1, 300), st.integers(1, 300))
def test_spread_windows_are_in_order_and_at_distances_that_differ_by_one(count: int, num: int) -> None:
    found = spread(torch.arange(count)[:, None], num).flatten()
    assert len(found) == min(count, num) and found[0] == 0 and (num == 1 or found[-1] == count - 1)
    steps = found.diff()
    assert len(steps) == 0 or (steps.min() > 0 and steps.max() - steps.min() <= 1)


def test_digest_sees_shape_and_content() -> None:
    tokens = torch.arange(6)
    assert tokens_digest(tokens) == tokens_digest(tokens.clone())
    assert tokens_digest(tokens) != tokens_digest(tokens.view(2, 3))
    assert tokens_digest(tokens) != tokens_digest(tokens.flip(0))


@torch.no_grad()
def test_sampled_windows_are_what_the_model_says() -> None:
    model, starts = tiny_model("llama", tie_word_embeddings=False), torch.tensor([[5, 6], [7, 8]])
    # so sure of itself that sampling is greedy
    model.lm_head.weight.mul_(1e4)
    found = sampled_windows(model, starts, 3, 10, start_token=2, seed=4)
    assert found.shape == (3, 10)
    assert found.dtype == torch.int64
    for row in found:
        assert row[0] == 2
        assert row[1] in starts
        ids = row[None, :2]
        while ids.shape[1] < 10:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(ids[0], row)


def test_sampled_windows_follow_the_seed_and_the_distribution() -> None:
    model, starts = tiny_model("llama"), torch.arange(3, 9)
    first = sampled_windows(model, starts, 40, 16, start_token=2, seed=1)
    assert torch.equal(first, sampled_windows(model, starts, 40, 16, start_token=2, seed=1))
    assert not torch.equal(first, sampled_windows(model, starts, 40, 16, start_token=2, seed=2))
    # tokens drawn from a distribution cost, on average, its entropy
    with torch.no_grad():
        logs = model(first).logits[:, 1:-1].double().log_softmax(-1)
    cost = -logs.gather(-1, first[:, 2:, None]).squeeze(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    spread = ((logs.exp() * logs.square()).sum(-1) - entropy.square()).sum().sqrt()
    assert abs(float((cost - entropy).sum())) < 4 * float(spread)


def test_long_windows_hold_several_samples() -> None:
    found = sampled_windows(tiny_model("gpt2"), torch.tensor([3, 4]), 2, 2 * SAMPLE, start_token=2)
    assert found.shape == (2, 2 * SAMPLE)
    assert (found.view(-1, SAMPLE)[:, 0] == 2).all()
