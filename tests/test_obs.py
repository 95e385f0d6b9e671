"""Least-squares refit and elimination against brute force in float64."""

from __future__ import annotations

import pytest
import torch

from shearling.errors import ShearlingError
from shearling.methods.obs import eliminate, refit, ridge


def problem(width: int = 8, outputs: int = 5, tokens: int = 200) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    c = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(outputs, width, generator=generator, dtype=torch.float64)
    target = c @ weight.T + 0.3 * torch.randn(tokens, outputs, generator=generator, dtype=torch.float64)
    return c, weight, target


def objective(c: torch.Tensor, t: torch.Tensor, w0: torch.Tensor, w: torch.Tensor, lam: torch.Tensor) -> float:
    return ((c @ w.T - t).square().sum() + lam * (w - w0).square().sum()).item()


def test_refit_is_the_ridge_minimum() -> None:
    c, w0, t = problem()
    kept = torch.tensor([0, 2, 3, 7])
    gram = c.T @ c
    lam = ridge(gram, 0.05)
    found = refit(gram, t.T @ c, w0, kept, 0.05)
    stacked = torch.cat([c[:, kept], lam.sqrt() * torch.eye(4, dtype=torch.float64)])
    wish = torch.cat([t, lam.sqrt() * w0[:, kept].T])
    torch.testing.assert_close(found, torch.linalg.lstsq(stacked, wish).solution.T)


@pytest.mark.parametrize(("unit", "batch"), [(1, 1), (2, 1), (1, 2), (4, 1)])
def test_elimination_costs_what_refitting_without_the_units_costs(unit: int, batch: int) -> None:
    c, w0, t = problem()
    gram, cross = c.T @ c, t.T @ c
    lam = ridge(gram, 0.02)
    num = 8 // unit
    found = eliminate(gram, cross, w0, remove=num - 1, unit=unit, damping=0.02, batch=batch)
    everything = refit(gram, cross, w0, torch.arange(8), 0.02)
    start = objective(c, t, w0, everything, lam)
    assert sorted(set(found.order)) == sorted(found.order)
    for count in range(batch, num, batch):
        gone = set(found.order[:count])
        kept = torch.tensor([i for i in range(8) if i // unit not in gone])
        w = refit(gram, cross, w0, kept, 0.02)
        # a removed column leaves the penalty too: (1) speaks of kept columns only
        full = (c[:, kept] @ w.T - t).square().sum() + lam * (w - w0[:, kept]).square().sum()
        dropped = [i for i in range(8) if i // unit in gone]
        linear = start - found.cost[0]
        rise = full.item() + lam.item() * w0[:, dropped].square().sum().item() - linear
        assert found.cost[count] == pytest.approx(rise, rel=1e-6)


def test_first_unit_is_the_best_single_removal() -> None:
    c, w0, t = problem()
    gram, cross = c.T @ c, t.T @ c
    first = eliminate(gram, cross, w0, remove=1, damping=1e-9).order[0]

    def error(gone: int) -> float:
        kept = torch.tensor([i for i in range(8) if i != gone])
        w = refit(gram, cross, w0, kept, 1e-9)
        return (c[:, kept] @ w.T - t).square().sum().item()

    assert first == min(range(8), key=error)


def test_singular_gram_is_reported() -> None:
    with pytest.raises(ShearlingError, match="positive definite"):
        refit(torch.zeros(3, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.arange(3), 0.0)
