"""Measuring on a GPU with the weights in host memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shearling.methods.structured import plan_structured
from shearling.plan import Delta, Structure
from shearling.recipe import CFSP, Baseline, Reconstruct, Shearling
from shearling.sweep import add_product_
from tests.tiny import FAMILIES, tiny_model, tiny_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SETTINGS: list[Any] = [
    CFSP(sparsity=0.4),
    CFSP(sparsity=0.4, score="obs"),
    Baseline(method="flap", sparsity=0.4),
    Shearling(sparsity=0.4, heads=True, reconstruct=Reconstruct(steps=6)),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["cfsp", "obs", "flap", "shearling"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_is_resident(family: str, settings: Any) -> None:
    model, tokens = tiny_model(family), tiny_tokens(6, 24)
    before = {name: p.clone() for name, p in model.named_parameters()}
    streamed = plan_structured(model, tokens, settings, batch=2, device="cuda")
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu" and torch.equal(parameter, before[name])
    resident = plan_structured(model.cuda(), tokens, settings, batch=2)
    for ours, theirs in zip(streamed.edits, resident.edits, strict=True):
        if isinstance(ours, Structure) and isinstance(theirs, Structure):
            assert ours == theirs
        if isinstance(ours, Delta) and isinstance(theirs, Delta):
            for name, value in ours.values.items():
                assert value.device.type == "cpu"
                torch.testing.assert_close(value, theirs.values[name].cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_inputs(dtype: torch.dtype) -> None:
    x = torch.randn(4096, 256, device="cuda").to(dtype)
    total = torch.zeros(256, 256, device="cuda")
    for part in x.split(1024):
        add_product_(total, part, part)
    exact = x.double().T @ x.double()
    assert (total - exact).norm() / exact.norm() < 1e-6
