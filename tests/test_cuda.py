"""On a GPU: measuring with the weights in host memory, products of half precision, captured decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shearling.captured import WARMUP
from shearling.evaluate.speed import captured_step
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
    # more tokens than channels, so that the least-squares problems are well posed
    model, tokens = tiny_model(family), tiny_tokens(12, 48)
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
                # training steps carry rounding on
                loose = 1e-2 if isinstance(settings, Shearling) else 1e-4
                torch.testing.assert_close(value, theirs.values[name].cpu(), rtol=loose, atol=loose)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_inputs(dtype: torch.dtype) -> None:
    x = torch.randn(4096, 256, device="cuda").to(dtype)
    total = torch.zeros(256, 256, device="cuda")
    for part in x.split(1024):
        add_product_(total, part, part)
    exact = x.double().T @ x.double()
    # each product is exact, their sum is rounded as tensor cores do
    assert (total - exact).norm() / exact.norm() < 1e-5


@torch.no_grad()
def test_captured_steps_write_the_same_tokens() -> None:
    model = tiny_model("llama", tie_word_embeddings=False).cuda()
    ids = tiny_tokens(2, 12).cuda()
    calls = WARMUP + 9
    step, token = captured_step(model, ids, calls)
    for _ in range(calls):
        step()
    expected = ids
    for _ in range(1 + calls):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(token, expected[:, -1:])
