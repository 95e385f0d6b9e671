"""CFSP against a few-line transcription of the released formulas, and its scores against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shearling.errors import ShearlingError
from shearling.methods import scores
from shearling.methods.cfsp import block_importance, keep_ratios, reference_widths
from shearling.plan import cap_shares, round_to_total
from shearling.sweep import InputStatistics

angles = st.lists(st.floats(0.01, 0.99), min_size=2, max_size=40)
sparsities = st.floats(0.05, 0.9)


def released(sums: list[float], p: float) -> list[float]:
    """Keep ratios as the released code computes them from summed angles."""
    mean = sum(sums) / len(sums)
    g = [1 / (1 + math.exp(-(s - mean) / 1e4)) for s in sums]
    average = sum(g) / len(g)
    if max(g) / average * (1 - p) >= 1:
        s = average * (1 / (1 - p) - 1) / (max(g) - average) / 1.05
        g = [average + s * (x - average) for x in g]
    return [(1 - p) * x / average for x in g]


@given(angles, sparsities)
def test_keep_ratios_as_released_at_its_token_count(a: list[float], p: float) -> None:
    ours = keep_ratios(block_importance(a), p)
    theirs = released([131072 * x for x in a], p)
    if max(a) - min(a) > 1e-6:
        assert ours == pytest.approx(theirs, rel=1e-9)
    assert sum(ours) / len(ours) == pytest.approx(1 - p, rel=1e-12)
    assert max(ours) <= 1 + 1e-12


@given(angles, sparsities, st.integers(64, 4000))
def test_widths_sum_to_the_target(a: list[float], p: float, channels: int) -> None:
    keep = keep_ratios(block_importance(a), p)
    total = round((1 - p) * channels * len(a))
    bounds = {"low": [1] * len(a), "high": [channels] * len(a)}
    widths = round_to_total([k * channels for k in keep], total, **bounds)
    assert sum(widths) == total
    assert all(abs(w - k * channels) < 2 or w == 1 for w, k in zip(widths, keep, strict=True))


@pytest.mark.parametrize("p", [0.2, 0.35, 0.5])
@pytest.mark.parametrize("channels", [820, 1536, 11008])
def test_reference_keeps_the_released_channels(p: float, channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    a = (torch.rand(12, generator=generator) * 0.4 + 0.05).tolist()
    keep = released([131072 * x for x in a], p)
    squares = torch.rand(12, channels, generator=generator, dtype=torch.float64)
    for layer, width in enumerate(reference_widths(keep_ratios(block_importance(a), p), channels)):
        # the released rule: sort ascending, everything at or above the threshold element stays
        metric = 3 / 576 * squares[layer].sqrt()
        ordered = metric.sort(descending=True).values
        threshold = ordered[min(int(channels * keep[layer]), channels - 1)]
        theirs = tuple((metric >= threshold).nonzero().flatten().tolist())
        inputs = InputStatistics(1, squares[layer], squares[layer])
        assert scores.top(scores.activation(inputs), width) == theirs


def test_reference_rounds_to_128() -> None:
    assert reference_widths([0.5, 0.3], 1536, 128) == [768, 512]
    with pytest.raises(ShearlingError, match="would keep nothing"):
        reference_widths([0.01], 1536, 128)


def test_cap_gives_the_rest_away() -> None:
    assert cap_shares([1, 1, 8], 0.5) == pytest.approx([0.25, 0.25, 1.0])
    with pytest.raises(ShearlingError, match="must be above 0"):
        cap_shares([1.0], 0.0)


def test_rounding_refuses_what_cannot_be_met() -> None:
    with pytest.raises(ShearlingError, match="must be between"):
        round_to_total([1.0, 1.0], 50, low=[1, 1], high=[10, 10])


def test_scores_by_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64) + 0.5
    w = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    gate = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    inputs = InputStatistics(50, x.sum(0), x.square().sum(0))
    n = x.square().mean(0).sqrt()
    assert scores.wanda(w, inputs).tolist() == pytest.approx(
        [sum(abs(w[i, j]) for i in range(4)).item() / 4 * n[j].item() for j in range(6)]
    )
    assert scores.flap(w, inputs).tolist() == pytest.approx((x.var(0, unbiased=False) * w.square().sum(0)).tolist())
    eq8 = [
        sum((abs(w[i, j]) / w[i].abs().sum() * n[j] / n.sum()).item() for i in range(4))
        + sum((abs(gate[j, i]) / gate[:, i].abs().sum()).item() for i in range(4))
        for j in range(6)
    ]
    assert scores.eq8(w, inputs, [gate]).tolist() == pytest.approx(eq8)
    assert scores.top(torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0]), 2) == (1, 2)
