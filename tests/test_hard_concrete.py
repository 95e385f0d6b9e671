"""Hard-concrete gates against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shearling.methods.hard_concrete import LIMIT, closed, most_open, sample, settled, sparsity


@pytest.mark.parametrize(
    ("log_alpha", "zero", "soft"), [(LIMIT, 0.0020, 0.996), (0.0, 0.168, 0.5), (-LIMIT, 0.953, 0.004)]
)
def test_closed_and_settled_at_the_extremes_and_the_middle(log_alpha, zero, soft):
    value = torch.tensor(log_alpha, dtype=torch.float64)
    assert closed(value).item() == pytest.approx(zero, abs=5e-4)
    assert settled(value).item() == pytest.approx(soft, abs=5e-4)


def distribution(z, log_alpha):
    """P(gate <= z) for 0 <= z < 1: the closed form of the stretched binary concrete."""
    s = (z + 0.1) / 1.2
    return 1 / (1 + math.exp(log_alpha - 2 / 3 * math.log(s / (1 - s))))


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_samples_have_the_closed_form_s_distribution(log_alpha):
    count = 200_000
    noise = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = sample(torch.full((count,), log_alpha, dtype=torch.float64), noise).sort().values
    assert z[0] == 0 and z[-1] == 1
    grid = torch.linspace(0, 0.999, 400, dtype=torch.float64)
    found = torch.searchsorted(z, grid, right=True) / count
    expected = torch.tensor([distribution(float(x), log_alpha) for x in grid], dtype=torch.float64)
    # Kolmogorov and Smirnov's distance at a level of one in a million
    assert (found - expected).abs().max() < 2.7 / math.sqrt(count)
    assert (z == 0).double().mean().item() == pytest.approx(closed(torch.tensor(log_alpha)).item(), abs=4e-3)


def test_gradients_are_those_of_the_formulas():
    log_alpha = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    q = closed(log_alpha)
    (slope,) = torch.autograd.grad(q.sum(), log_alpha)
    torch.testing.assert_close(slope, -(q * (1 - q)).detach())
    noise = torch.full((9,), 0.4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: sample(a, noise), log_alpha)


@given(st.integers(1, 64), st.data())
def test_corrected_sparsity_is_the_share_of_saturated_gates(count, data):
    keep = data.draw(st.integers(0, count))
    row = torch.cat([torch.full((keep,), LIMIT), torch.full((count - keep,), -LIMIT)]).double()
    assert sparsity(row).item() == pytest.approx(1 - keep / count, abs=1e-7)
    # as the authors' code counts, half of 4096 gates at their extremes are not half
    assert abs(sparsity(row, corrected=False).item() - (1 - keep / count)) <= 0.048


def test_of_equals_the_first_stay_open():
    assert most_open(torch.tensor([[1.0, 2.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0]]), 2).tolist() == [
        [False, True, True, False],
        [True, True, False, False],
    ]
