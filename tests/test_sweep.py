"""The block walk against a plain forward pass, and its statistics against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from shearling.errors import ShearlingError
from shearling.sweep import Angles, Moments, Walk, fingerprint, measure
from tests.tiny import FAMILIES, tiny_model, tiny_tokens


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_walk_is_the_forward_pass(family: str) -> None:
    model = tiny_model(family)
    tokens = tiny_tokens(batch=5)
    expected = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    walk = Walk(model, tokens, batch=2)
    states = walk.enter()
    for layer in range(len(walk.blocks)):
        with walk.on_device(layer):
            walk.advance(layer, states)
    norm = walk.anatomy.family.final_norm
    torch.testing.assert_close(model.get_submodule(norm)(states), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@torch.no_grad()
def test_statistics_against_float64(family: str) -> None:
    model = tiny_model(family)
    tokens = tiny_tokens(batch=5)
    seen: dict[str, list[torch.Tensor]] = {"x": [], "in": [], "out": []}
    walk = Walk(model, tokens, batch=2)
    block = walk.blocks[1]
    linear = block.get_submodule(walk.anatomy.family.ffn_output)

    def see(module: Any, args: Any, y: torch.Tensor) -> None:
        seen["in"].append(args[0].double())
        seen["out"].append(y.double())

    handles = [
        linear.register_forward_pre_hook(lambda m, args: seen["x"].append(args[0].flatten(0, -2).double())),
        block.register_forward_hook(see),
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    x, before, after = (torch.cat(seen[key]) for key in ("x", "in", "out"))
    found = measure(walk, ffn_gram=True)[1]
    plain = measure(walk)[1]
    for statistics in (found, plain):
        torch.testing.assert_close(statistics.ffn.norm, x.square().mean(0).sqrt(), rtol=1e-5, atol=0)
        torch.testing.assert_close(statistics.ffn.mean, x.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.ffn.variance, x.var(0, unbiased=False), rtol=1e-4, atol=1e-6)
        angle = torch.nn.functional.cosine_similarity(before, after, dim=-1).arccos().mean() / math.pi
        assert statistics.angle == pytest.approx(angle.item(), rel=1e-5)
    torch.testing.assert_close(found.ffn.gram.double(), x.T @ x, rtol=1e-4, atol=1e-4)
    assert found.ffn.count == tokens.numel()


def test_angles_of_equal_opposite_and_zero_states() -> None:
    x = torch.tensor([[[3.0, 4.0], [1e-3, 7.0], [0.0, 0.0], [1.0, 0.0]]])
    y = torch.tensor([[[3.0, 4.0], [-1e-3, -7.0], [0.0, 0.0], [0.0, 2.0]]])
    angles = Angles()
    angles(x, y)
    assert angles.mean == pytest.approx((0 + 1 + 0.5 + 0.5) / 4, abs=1e-4)


def test_repeated_text_changes_no_mean() -> None:
    x = torch.randn(64, 7)
    once, thrice = Moments(gram=True), Moments(gram=True)
    once(x)
    for _ in range(3):
        thrice(x)
    torch.testing.assert_close(once.result().norm, thrice.result().norm, rtol=1e-6, atol=0)


def test_measuring_resumes_where_it_stopped(tmp_path: Any) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(batch=4)
    walk = Walk(model, tokens, batch=2)
    undisturbed = measure(walk, ffn_gram=True)

    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["block"] == 1:
            raise Stop

    with pytest.raises(Stop):
        measure(walk, ffn_gram=True, cache=tmp_path, on_event=stop)
    assert len(list(tmp_path.iterdir())) == 2
    events: list[dict[str, Any]] = []
    resumed = measure(walk, ffn_gram=True, cache=tmp_path, on_event=events.append)
    assert [event["block"] for event in events] == [2]
    for a, b in zip(undisturbed, resumed, strict=True):
        assert a.angle == b.angle and torch.equal(a.ffn.gram, b.ffn.gram) and torch.equal(a.ffn.sum, b.ffn.sum)


def test_streamed_block_comes_back_unchanged() -> None:
    model = tiny_model("llama").to("meta")
    walk = Walk.__new__(Walk)
    walk.blocks, walk.device = list(model.model.layers), torch.device("cpu")
    before = [p.data_ptr() for p in walk.blocks[0].parameters()]
    with pytest.raises(NotImplementedError), walk.on_device(0):
        pass
    assert [p.data_ptr() for p in walk.blocks[0].parameters()] == before


def test_overflow_names_the_block() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ShearlingError, match=r"model\.layers\.1: its output is not finite"):
        measure(Walk(model, tiny_tokens(), batch=2))


def test_fingerprint_sees_weights_text_and_choices() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens()
    same = fingerprint(tiny_model("llama"), tokens, "gram")
    assert fingerprint(model, tokens, "gram") == same
    assert fingerprint(model, tokens, "norm") != same
    assert fingerprint(model, tiny_tokens(seed=1), "gram") != same
    assert fingerprint(tiny_model("llama", seed=1), tokens, "gram") != same
