"""Channels and KV groups in one budget, against trying every number of groups."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from shearling.methods.heads import energies, groups_to_remove
from shearling.sweep import InputStatistics

ENERGIES = st.lists(st.integers(1, 10_000), min_size=2, max_size=12, unique=True)


@given(
    ENERGIES, st.lists(st.integers(1, 10_000), min_size=1, max_size=4, unique=True), st.floats(0, 1), st.floats(1, 5)
)
def test_groups_go_where_they_cost_least(channels: list[int], groups: list[int], share: float, cost: float) -> None:
    # what can be taken while one channel and one group stay
    remove = share * (len(channels) - 1 + (len(groups) - 1) * cost)
    found = groups_to_remove(torch.tensor(channels).double(), torch.tensor(groups).double(), remove, cost)
    assert 0 <= found <= len(groups) - 1
    assert remove - found * cost <= len(channels) - 1 + 1e-9
    units = sorted([(e, 1.0, False) for e in channels] + [(e / cost, cost, True) for e in groups], key=lambda u: u[0])
    taken, gone = 0.0, 0
    for _, size, group in units:
        taken += size
        if taken > remove:
            break
        gone += group
    enough = next(n for n in range(len(groups)) if remove - n * cost <= len(channels) - 1 + 1e-9)
    assert found == min(max(gone, enough), len(groups) - 1)


def test_energy_is_what_independent_inputs_write() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 6, generator=generator, dtype=torch.float64)
    x = torch.linalg.qr(x).Q * torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.float64)
    weight = torch.randn(5, 6, generator=generator)
    inputs = InputStatistics(len(x), x.sum(0), x.square().sum(0))
    found = energies(weight, inputs, 2)
    for unit in range(3):
        columns = slice(2 * unit, 2 * unit + 2)
        written = x[:, columns] @ weight[:, columns].double().T
        torch.testing.assert_close(found[unit], written.square().sum() / len(x))
