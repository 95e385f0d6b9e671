"""TRAWL: weights of low rank come back as they are, and what is left out is what the formulas say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shearling.anatomy import anatomy_of, family_names
from shearling.errors import RecipeError, ShearlingError
from shearling.methods.trawl import denoised, plan_trawl, stacks
from shearling.recipe import Denoise, parse_recipe
from shearling.run import run
from shearling.surgery import cut_
from tests.tiny import tiny_folder, tiny_model, tiny_tokens


def low_rank(n: int, outputs: int, inputs: int, rank: int) -> torch.Tensor:
    torch.manual_seed(0)
    a, b, c = torch.randn(outputs, rank), torch.randn(inputs, rank), torch.randn(n, rank)
    return torch.stack([(a * weights) @ b.T for weights in c])


@pytest.mark.parametrize("method", ["cp", "tucker", "svd"])
def test_a_tensor_of_that_rank_comes_back(method: str) -> None:
    tensor = low_rank(3, 12, 9, 4)
    assert (denoised(tensor, 4 / 9, method) - tensor).norm() < 0.02 * tensor.norm()


def test_svd_leaves_out_the_last_singular_values() -> None:
    torch.manual_seed(0)
    tensor = torch.randn(2, 8, 6)
    left = (tensor - denoised(tensor, 4 / 6, "svd")).square().sum((1, 2))
    expected = torch.linalg.svdvals(tensor.double())[:, 4:].square().sum(1)
    torch.testing.assert_close(left.double(), expected, rtol=1e-4, atol=1e-5)


def test_tucker_of_one_matrix_is_its_svd_and_more_rank_leaves_less() -> None:
    torch.manual_seed(0)
    tensor = torch.randn(1, 8, 8)
    torch.testing.assert_close(denoised(tensor, 3 / 8, "tucker"), denoised(tensor, 3 / 8, "svd"), rtol=1e-3, atol=1e-3)
    several = torch.randn(3, 10, 7)
    for method in ("cp", "tucker"):
        left = [float((several - denoised(several, rank / 7, method)).norm()) for rank in (1, 3, 5, 7)]
        assert left == sorted(left, reverse=True) and left[0] < float(several.norm())


def test_a_cp_step_cannot_leave_more_than_its_start() -> None:
    torch.manual_seed(0)
    tensor = torch.randn(3, 16, 12)
    u, _, v = torch.linalg.svd(tensor.sum(0))
    a, b = u[:, :5], v[:5].T
    start = torch.stack([(torch.einsum("oi,or,ir->r", matrix, a, b) * a) @ b.T for matrix in tensor])
    assert (tensor - denoised(tensor, 5 / 12, "cp")).norm() < (tensor - start).norm()


def test_weights_of_one_shape_either_way_become_one_tensor() -> None:
    shapes = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8), "up": (16, 8), "down": (8, 16)}
    found = {frozenset(paths): turned for paths, turned in stacks(shapes)}
    assert found == {frozenset("kv"): set(), frozenset("qo"): set(), frozenset({"up", "down"}): {"down"}}


@pytest.mark.parametrize("family", family_names())
@pytest.mark.parametrize("part", ["ffn", "attention"])
def test_a_denoised_model_differs_in_the_chosen_weights_alone(family: str, part: str) -> None:
    model, tokens = tiny_model(family), tiny_tokens()
    outcome = plan_trawl(model, Denoise(layers=(-1,), part=part, rank=0.5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        stock = model(tokens).logits
        cut_(model, outcome.edits)
        assert not torch.allclose(model(tokens).logits, stock, atol=1e-4)
    last = anatomy_of(model.config).num_layers - 1
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name in outcome.edits[0].values for name in moved)
    assert all(anatomy_of(model.config).layer_of(name) == last for name in moved)


def test_full_rank_changes_nothing() -> None:
    model = tiny_model("gpt2")
    (delta,) = plan_trawl(model, Denoise(method="tucker", layers=(0, 1), rank=1)).edits
    for name, value in delta.values.items():
        torch.testing.assert_close(value, model.get_parameter(name), rtol=1e-4, atol=1e-4)


def test_a_recipe_denoises(tmp_path: Path) -> None:
    content = {
        "model": str(tiny_folder(tmp_path / "model")),
        "device": "cpu",
        "stages": [{"stage": "denoise", "method": "svd", "layers": [-1], "rank": 0.25}],
        "calibration": {"sequences": 2, "length": 16},
        "evaluate": {"context": 16, "stride": 16, "max_tokens": 64},
    }
    metrics = run(parse_recipe(content), tmp_path / "run")
    assert metrics["pruned"]["parameters"] == metrics["dense"]["parameters"]
    assert metrics["pruned"]["perplexity"] != metrics["dense"]["perplexity"]


def test_unusable_settings_are_one_line() -> None:
    with pytest.raises(ShearlingError, match=r"layers: 7 is no block; the model has 0 to 2, or -3 to -1"):
        plan_trawl(tiny_model("llama"), Denoise(layers=(7,)))
    with pytest.raises(RecipeError, match="unknown key; did you mean layers"):
        parse_recipe({"model": "m", "stages": [{"stage": "denoise", "layers": [1], "layer": [1]}]})
