"""Domains: named windows as one, and the proportions in which they are read."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.data import Domains, PackedWindows, pack
from shearling.errors import ShearlingError
from shearling.train.sampler import MixtureSampler
from tests.tiny import tiny_tokenizer, tiny_tokens

LENGTH = 12
#: the paper's proportions for pruning (RedPajama)
REDPAJAMA = {
    "cc": 0.67, "github": 0.045, "book": 0.045, "stackexchange": 0.02, "wiki": 0.045, "arxiv": 0.025, "c4": 0.15
}  # fmt: skip


def some_domains(*counts: int, weights: list[float] | None = None) -> Domains:
    parts = {f"d{n}": tiny_tokens(count, LENGTH, seed=n) for n, count in enumerate(counts)}
    return Domains(parts, None if weights is None else dict(zip(parts, weights, strict=True)))


def packed(folder: Path, length: int = LENGTH) -> PackedWindows:
    (folder / "text.txt").write_text("the sheep stood on the hill and the wind went over the grass. " * 4)
    return pack(folder / "text.txt", tiny_tokenizer(), folder / "shards", shard_tokens=100).windows(length)


# --- windows


def test_memory_and_shards_are_read_as_one(tmp_path: Path) -> None:
    shards, memory = packed(tmp_path), tiny_tokens(7, LENGTH).to(torch.int32)
    memory[0, 0] = 0
    domains = Domains({"web": memory, "code": shards})
    assert domains.names == ("web", "code") and domains.counts == (7, len(shards)) and domains.starts == (0, 7)
    assert domains.shape == (7 + len(shards), LENGTH) and len(domains) == domains.shape[0]
    everything = torch.cat([memory.long(), shards[torch.arange(len(shards))]])
    order = torch.randperm(len(domains), generator=torch.Generator().manual_seed(0))
    assert torch.equal(domains[order], everything[order])
    assert domains.token_range() == (int(everything.min()), int(everything.max()))
    roots = math.sqrt(7), math.sqrt(len(shards))
    assert domains.weights == pytest.approx({"web": roots[0] / sum(roots), "code": roots[1] / sum(roots)})


def test_a_digest_is_of_the_windows_alone() -> None:
    one, two = tiny_tokens(3, LENGTH, seed=1), tiny_tokens(4, LENGTH, seed=2)
    digest = Domains({"a": one, "b": two}).digest()
    assert Domains({"c": one, "d": two}, {"c": 1, "d": 3}).digest() == digest
    others = ({"a": two, "b": one}, {"a": one}, {"a": one, "b": two.flip(0)})
    assert all(Domains(parts).digest() != digest for parts in others)


@pytest.mark.parametrize(
    ("shapes", "weights", "message"),
    [
        ({}, None, "domains: there are none"),
        (
            {"a": (3, 4), "b": (0, 4)},
            None,
            r"domain 'b': shape \(0, 4\); must be \[windows, tokens\] with at least one",
        ),
        ({"a": (), "b": (3, 4)}, None, r"domain 'a': shape \(\)"),
        ({"a": (3, 4), "b": (3, 5)}, None, "domain 'b': 5 tokens a window, others have 4"),
        ({"a": (3, 4), "b": (3, 4)}, {"a": 1}, "weights: misses the domain 'b'"),
        ({"a": (3, 4)}, {"a": 1, "z": 1}, "weights: unknown domain 'z'; must be one of a"),
        ({"a": (3, 4), "b": (3, 4)}, {"a": 1, "b": -0.5}, "weights: domain 'b' has -0.5; must be a finite number"),
        ({"a": (3, 4), "b": (3, 4)}, {"a": math.nan, "b": 1}, "weights: domain 'a' has nan"),
        ({"a": (3, 4), "b": (3, 4)}, {"a": 0, "b": 0}, "weights: all are 0"),
    ],
)
def test_unusable_domains_are_named(shapes: dict, weights: dict | None, message: str) -> None:
    with pytest.raises(ShearlingError, match=f"^{message}[^\n]*$"):
        Domains({name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}, weights)


# --- how they are drawn


def drawn(sampler: MixtureSampler, batch: int, domains: Domains) -> list[int]:
    """Windows of each domain in the next batch."""
    found = torch.bucketize(sampler.take(batch), torch.tensor(domains.starts), right=True) - 1
    return torch.bincount(found, minlength=len(domains.names)).tolist()


positive = st.floats(0.01, 1)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(positive, min_size=1, max_size=6),
    seed=st.integers(0, 100),
    skipped=st.integers(0, 10**6),
    batches=st.lists(st.integers(1, 300), min_size=1, max_size=6),
)
def test_proportions_stay_within_the_bound_of_the_golden_rotation(
    weights: list[float], seed: int, skipped: int, batches: list[int]
) -> None:
    """n times the discrepancy of n points is at most 3 + (1/ln g + 1/ln 2) ln n (Kuipers and Niederreiter, 2, 3.4)."""
    domains = some_domains(*[5] * len(weights), weights=weights)
    sampler = MixtureSampler(domains, seed)
    sampler.drawn = skipped
    found = [sum(counts) for counts in zip(*(drawn(sampler, batch, domains) for batch in batches), strict=True)]
    n, golden = sum(batches), (1 + math.sqrt(5)) / 2
    bound = 3 + (1 / math.log(golden) + 1 / math.log(2)) * math.log(n)
    for count, weight in zip(found, domains.weights.values(), strict=True):
        assert abs(count - n * weight) <= bound


@pytest.mark.parametrize("batch", [8, 32, 256])
def test_batches_are_closer_to_the_weights_than_independent_draws(batch: int) -> None:
    """Over the paper's seven domains: each batch, and all of them, beside the standard deviations of a multinomial."""
    domains = Domains({name: tiny_tokens(4, LENGTH) for name in REDPAJAMA}, REDPAJAMA)
    sampler, batches = MixtureSampler(domains, 0), 500
    weights = torch.tensor(list(REDPAJAMA.values()), dtype=torch.float64)
    found = torch.tensor([drawn(sampler, batch, domains) for _ in range(batches)], dtype=torch.float64)
    variance = weights * (1 - weights)
    squares = (found - batch * weights).square().mean()
    assert squares < 0.6 * batch * variance.mean()
    assert ((found - batch * weights).abs() < 3).all()
    missed = (found.sum(0) - batches * batch * weights).abs()
    assert (missed < 4).all() and missed.square().mean() < 0.05 * batches * batch * variance.mean()


@pytest.mark.parametrize("window", [0, 1, 7, 1000])
def test_draws_are_unbiased_over_seeds(window: int) -> None:
    domains, seeds = some_domains(3, 3, 3, weights=[0.05, 0.25, 0.7]), 2000
    found: Counter[int] = Counter()
    for seed in range(seeds):
        sampler = MixtureSampler(domains, seed)
        sampler.drawn = window
        found[drawn(sampler, 1, domains).index(1)] += 1
    for number, weight in enumerate(domains.weights.values()):
        assert abs(found[number] - seeds * weight) < 4 * math.sqrt(seeds * weight * (1 - weight))


def test_a_domain_without_weight_is_never_drawn() -> None:
    domains = some_domains(3, 3, 3, weights=[0, 1, 0])
    assert drawn(MixtureSampler(domains, 0), 2000, domains) == [0, 2000, 0]


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    batch=st.integers(1, 20),
    takes=st.integers(1, 12),
    stop=st.integers(0, 11),
    change=st.integers(0, 11),
)
def test_a_sampler_reads_each_window_once_an_epoch_says_so_and_resumes(
    counts: list[int], batch: int, takes: int, stop: int, change: int
) -> None:
    domains = some_domains(*counts)
    other = {name: number + 1.0 for number, name in enumerate(domains.names)}

    def take(sampler: MixtureSampler, numbers: range) -> list[torch.Tensor]:
        batches = []
        for number in numbers:
            if number == change:
                sampler.weights = other
            batches.append(sampler.take(batch))
            notices.extend(sampler.notices)
        return batches

    notices: list[str] = []
    sampler, stop = MixtureSampler(domains, 7), min(stop, takes)
    batches = take(sampler, range(takes))
    read = torch.cat(batches)
    metrics, expected = sampler.metrics(), []
    for name, start, count in zip(domains.names, domains.starts, counts, strict=True):
        own = read[(read >= start) & (read < start + count)] - start
        for epoch in range(len(own) // count):
            assert sorted(own[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))
        ended = max(0, len(own) - 1) // count
        expected += [f"domain {name!r}: all {count} windows were read, epoch {n + 2} begins" for n in range(ended)]
        assert metrics[f"tokens/{name}"] == len(own) * LENGTH
        assert metrics[f"weight/{name}"] == sampler.weights[name]
    assert sorted(notices) == sorted(expected)
    interrupted, resumed = MixtureSampler(domains, 7), MixtureSampler(domains, 7)
    take(interrupted, range(stop))
    # as a checkpoint writes it
    resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
    assert all(torch.equal(a, b) for a, b in zip(take(resumed, range(stop, takes)), batches[stop:], strict=True))


def test_batches_are_drawn_alike_however_they_are_cut() -> None:
    domains = some_domains(5, 9, weights=[0.3, 0.7])
    one, other = MixtureSampler(domains, 1), MixtureSampler(domains, 1)
    assert torch.equal(one.take(24), torch.cat([other.take(5), other.take(19)]))
    assert not torch.equal(one.take(24), MixtureSampler(domains, 2).take(24))
