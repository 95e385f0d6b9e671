"""Quantising: what is pruned stays zero, GPTQ is its formula, and what is saved is read by others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from shearling.anatomy import anatomy_of
from shearling.errors import RecipeError, ShearlingError
from shearling.export import load_codes, save_model
from shearling.methods.ast import ASTPolicy
from shearling.methods.gptq import gptq
from shearling.methods.quantise import plan_quantised
from shearling.methods.rounding import rounded
from shearling.methods.slim import clipping, compensated, slim_rounded
from shearling.models import load_model
from shearling.plan import Grid, Masks, dequantise, inventory_of, load_edits, quantised_size, save_edits
from shearling.plan.patterns import Pattern
from shearling.recipe import AST, Quantise, parse_recipe
from shearling.run import run
from shearling.surgery import attach_adapters_, cut_
from shearling.train import TrainSettings, train
from tests.tiny import FAMILIES, tiny_folder, tiny_model, tiny_tokens

FORMATS = ["int4", "int8", "uint4", "uint8", "float8_e4m3"]
TWO_OF_FOUR = Pattern(2, 4)
#: families that compressed-tensors has formats for
STORABLE = [family for family in FAMILIES if family != "gpt2"]


def case(seed: int, outputs: int, inputs: int, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, Gram matrix of correlated inputs, and what is kept of it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    x = torch.randn(4 * inputs, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    kept = TWO_OF_FOUR.mask(torch.rand(outputs, inputs, generator=generator)) if masked else weight != 0
    return torch.where(kept, weight, 0.0), x.T @ x, kept


def loss(weight: Tensor, value: Tensor, gram: Tensor) -> float:
    gap = (weight - value).double()
    return float(((gap @ gram.double()) * gap).sum())


def plain_gptq(weight: Tensor, gram: Tensor, kept: Tensor, step: Tensor, damping: float) -> Tensor:
    """The formula with the inverse of what is left, column after column, in float64; int4, a scale a row."""
    work, inputs = weight.double().clone(), weight.shape[1]
    hessian = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    value = torch.zeros_like(work)
    for column in range(inputs):
        inverse = torch.linalg.inv(hessian[column:, column:])
        value[:, column] = (work[:, column] / step).round().clamp(-8, 7) * step * kept[:, column]
        error = (work[:, column] - value[:, column]) / inverse[0, 0]
        work[:, column:] -= error[:, None] * inverse[0]
    return value


# --- the weight


@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from(FORMATS),
    shape=st.sampled_from([(3, 8), (5, 12), (7, 40), (2, 132)]),
    group=st.sampled_from([None, 4]),
    order=st.booleans(),
    scales=st.sampled_from(["covering", "mse"]),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_pruned_weights_are_exactly_zero_and_groups_stay_2_of_4(
    seed: int, name: str, shape: tuple[int, int], group: int | None, order: bool, scales: Any
) -> None:
    weight, gram, kept = case(seed, *shape, masked=True)
    grid = Grid(name, group)
    for codes in (
        rounded(weight, grid, scales),
        gptq(weight, gram, grid, kept, order=order, scales=scales).codes,
    ):
        value = dequantise(*codes)
        assert value.isfinite().all() and not value[~kept].any()
        assert not torch.signbit(value[value == 0]).any()
        assert ((value.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
        # codes name values of the grid
        again = grid.round(value, codes.scales_OG, codes.zeros_OG)
        assert torch.equal(dequantise(again, *codes[1:]), value)


@pytest.mark.parametrize("masked", [False, True])
def test_gptq_is_its_formula(masked: bool) -> None:
    weight, gram, kept = case(0, 6, 20, masked)
    found = gptq(weight, gram, Grid("int4"), kept, order=False).codes
    expected = plain_gptq(weight, gram, kept, found.scales_OG[:, 0].double(), 0.01)
    torch.testing.assert_close(dequantise(*found).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_order_is_that_of_the_inputs_energy() -> None:
    weight, gram, kept = case(1, 6, 16, False)
    order = gram.diagonal().argsort(descending=True)
    found = gptq(weight, gram, Grid("int4"), kept, order=True).codes
    step = found.scales_OG[:, 0].double()
    expected = plain_gptq(weight[:, order], gram[order][:, order], kept[:, order], step, 0.01)
    torch.testing.assert_close(dequantise(*found).double()[:, order], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", [False, True])
def test_gptq_leaves_less_error_than_rounding(masked: bool, order: bool) -> None:
    better = []
    for seed in range(5):
        weight, gram, kept = case(seed, 16, 256, masked)
        grid = Grid("int4", 32)
        nearest = loss(weight, dequantise(*rounded(weight, grid)), gram)
        better.append(loss(weight, dequantise(*gptq(weight, gram, grid, kept, order=order).codes), gram) / nearest)
    assert max(better) < 0.9, better


def test_a_searched_scale_never_leaves_more_squared_error() -> None:
    weight, _, _ = case(3, 32, 128, False)
    weight[:, ::17] *= 6
    for name in FORMATS:
        grid = Grid(name, 32)
        errors = [
            (dequantise(*rounded(weight, grid, scales)) - weight).square().unflatten(1, (-1, 32)).sum(-1)
            for scales in ("covering", "mse")
        ]
        assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() <= errors[0].sum()


def test_one_weight_a_group_is_exact() -> None:
    # the least magnitude and its two neighbours are all the grid has to hold
    weight = torch.tensor([[1.0, -7.0, 3.5, 0.0]])
    torch.testing.assert_close(dequantise(*rounded(weight, Grid("int8", 1))), weight)


# --- the model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_cut_model_has_the_codes_values_and_other_weights_are_left_alone(family: str, method: Any) -> None:
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (quant,) = plan_quantised(model, tiny_tokens(4, 32), Quantise(method=method, format="uint4", group=8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    cut_(model, [quant])
    linears = {name for layer in range(3) for name in anatomy_of(model.config).weights(layer)}
    assert quant.codes.keys() == linears
    for name, tensor in model.state_dict().items():
        if name in linears:
            value = dequantise(quant.codes[name], quant.scales[name], quant.zeros[name])
            assert torch.equal(tensor, value.T if family == "gpt2" else value)
        else:
            assert torch.equal(tensor, before[name])


def test_gptq_follows_the_rounded_model() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(16, 48)
    with torch.no_grad():
        wanted = model(tokens).logits
    gaps = {}
    for method in ("rtn", "gptq"):
        own = tiny_model("llama")
        cut_(own, plan_quantised(own, tokens, Quantise(method=method, format="int4", scales="covering")))
        with torch.no_grad():
            gaps[method] = float((own(tokens).logits - wanted).norm() / wanted.norm())
    assert gaps["gptq"] < 0.9 * gaps["rtn"]


def test_finished_blocks_are_not_measured_again(tmp_path: Path) -> None:
    model, tokens, settings = tiny_model("llama"), tiny_tokens(4, 32), Quantise(format="int4", group=8)
    (whole,) = plan_quantised(model, tokens, settings)

    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event.get("block") == 1:
            raise Stop

    with pytest.raises(Stop):
        plan_quantised(model, tokens, settings, state_dir=tmp_path, on_event=stop)
    kept = sorted(file.name for file in tmp_path.rglob("*.safetensors"))
    assert kept == ["quant-0000.safetensors", "quant-0001.safetensors"]
    (again,) = plan_quantised(model, tokens, settings, state_dir=tmp_path)
    for name, tensor in whole.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


def test_what_quantisation_aware_ast_trained_is_on_the_grid_already() -> None:
    model = tiny_model("llama")
    settings = AST(quantise="int4", group=8, score="magnitude")
    policy = ASTPolicy(anatomy_of(model.config), TWO_OF_FOUR, settings)
    (masks,) = train(model, tiny_tokens(8, 16), [policy], TrainSettings(tokens=256, length=16, batch=8)).edits
    assert isinstance(masks, Masks)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = Quantise(method="rtn", format="int4", group=8, scales="covering")
    cut_(model, plan_quantised(model, tiny_tokens(), plain, pattern="2:4"))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=3e-7, atol=0)


# --- SLiM


def test_the_clipping_has_the_least_error_of_all_scales() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    weight[0, :3] = 30.0

    def error(alpha: float) -> float:
        step = alpha / 7
        return float(((weight / step).round().clamp(-7, 7) * step - weight).square().sum())

    best = min(error(alpha) for alpha in torch.linspace(0.5, 30, 600).tolist())
    assert error(float(clipping(weight, 7))) < 1.03 * best < 0.2 * error(30.0)
    assert float(clipping(torch.zeros(4, 4), 7)) == 0


@pytest.mark.parametrize("grid", [Grid("int4"), Grid("int4", 16)])
def test_a_branch_makes_up_for_what_was_lost(grid: Grid) -> None:
    goal, gram, _ = case(2, 48, 64, False)
    kept = TWO_OF_FOUR.mask(goal.abs())
    weight = torch.where(kept, goal, 0.0)
    found = compensated(goal, weight, gram, 8, lambda of: slim_rounded(of, grid))
    value = dequantise(*found.codes)
    assert not value[~kept].any() and found.down.shape == (8, 64) and found.up.shape == (48, 8)
    alone = loss(goal, dequantise(*slim_rounded(weight, grid)), gram)
    with_branch = loss(goal, value + found.up @ found.down, gram)
    assert with_branch < 0.7 * alone
    # of all branches of that rank, this one leaves the least of these codes' error on these inputs
    root = torch.linalg.cholesky(gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(64))
    rest = torch.linalg.svdvals((goal - value).double() @ root)[8:].square().sum()
    left = (goal - value - found.up @ found.down).double() @ root
    torch.testing.assert_close(left.square().sum(), rest, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["slim", "gptq"])
@pytest.mark.parametrize("branches", [None, "int8"])
def test_a_compensated_model_is_nearer_the_dense_one(method: Any, branches: Any) -> None:
    tokens, dense, gaps = tiny_tokens(16, 48), tiny_model("llama"), []
    with torch.no_grad():
        wanted = dense(tokens).logits
    for compensate in (None, 0.25):
        model = tiny_model("llama")
        masks = {
            name: TWO_OF_FOUR.mask(model.get_parameter(name).abs())
            for layer in range(3)
            for name in anatomy_of(model.config).weights(layer)
        }
        cut_(model, [Masks(masks, "2:4")])
        wish = Quantise(method=method, format="int4", group=16, compensate=compensate)
        wish = wish.model_copy(update={"branches": branches if compensate else None})
        quant, *adapters = plan_quantised(model, tokens, wish, goal=dense, pattern="2:4")
        cut_(model, [quant])
        assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())
        for edit in adapters:
            attach_adapters_(model, edit)
        with torch.no_grad():
            gaps.append(float((model(tokens).logits - wanted).norm() / wanted.norm()))
    assert gaps[1] < 0.8 * gaps[0]


def test_a_recipe_saves_codes_and_branches(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    slim = {**QUANTISE, "method": "slim", "compensate": 0.2, "branches": "int8"}
    metrics = run(recipe(tiny_folder(tmp_path / "source"), MASK, slim), tmp_path / "run")
    folder = tmp_path / "run" / "model"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    again = run(
        recipe(folder, {**QUANTISE, "method": "rtn", "scales": "covering", "format": "int8"}), tmp_path / "again"
    )
    assert again["dense"]["perplexity"] == pytest.approx(metrics["quantised"]["perplexity"], rel=1e-4)
    with pytest.raises(RecipeError, match="branches needs compensate"):
        recipe(folder, {**QUANTISE, "branches": "int8"})
    with pytest.raises(RecipeError, match="method = slim is symmetric; format must be int4 or int8, not uint4"):
        recipe(folder, {**slim, "format": "uint4"})


# --- the checkpoint


@pytest.mark.parametrize("family", STORABLE)
@pytest.mark.parametrize(
    ("name", "group"),
    [("int4", 8), ("int4", None), ("uint4", 16), ("int8", None), ("int8", 16), ("uint8", None), ("float8_e4m3", None)],
)
def test_compressed_tensors_reads_what_is_saved(family: str, name: Any, group: int | None, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model, tokens = tiny_model(family), tiny_tokens()
    masks = {
        path: TWO_OF_FOUR.mask(model.get_parameter(path).abs())
        for layer in range(3)
        for path in anatomy_of(model.config).weights(layer)
    }
    cut_(model, [Masks(masks, "2:4")])
    (quant,) = plan_quantised(model, tokens, Quantise(method="rtn", format=name, group=group), pattern="2:4")
    cut_(model, [quant])
    save_model(model, None, tmp_path / "model", provenance={}, quant=quant)
    content = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert "sparsity_config" not in content and content["ignore"] == ["lm_head"]
    again = load_model(str(tmp_path / "model"), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    for path, mask in masks.items():
        assert not again.get_parameter(path)[~mask].any()
    codes = load_codes(tmp_path / "model")
    assert (codes.bits, codes.group) == (quant.bits, quant.group)
    found, wanted = codes.tensors(), quant.tensors()
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key].float(), tensor.float()), key


def test_codes_are_read_only_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match="holds no codes that save_model wrote"):
        load_codes(tiny_folder(tmp_path / "m"))


def test_plain_transformers_reads_it_too(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model, tokens = tiny_model("llama"), tiny_tokens()
    (quant,) = plan_quantised(model, tokens, Quantise(method="rtn", format="int4", group=8))
    cut_(model, [quant])
    save_model(model, None, tmp_path / "model", provenance={}, quant=quant)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_bits_are_counted_with_scales_and_zero_points(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    anatomy, inventory = anatomy_of(model.config), inventory_of(model)
    # 4 bits, and for every 8 weights a float32 scale and, where there is one, a 4-bit zero point
    assert quantised_size(inventory, anatomy, Grid("int4", 8)).bits == 4 + 32 / 8
    assert quantised_size(inventory, anatomy, Grid("uint4", 8)).bits == 4 + 36 / 8
    found = quantised_size(inventory, anatomy, Grid("int4", 8))
    (quant,) = plan_quantised(model, tiny_tokens(), Quantise(method="rtn", format="int4", group=8))
    covered = sum(codes.numel() for codes in quant.codes.values())
    others = sum(p.numel() * 4 for name, p in model.named_parameters() if name not in quant.codes)
    assert found.bytes == others + covered // 2 + covered // 8 * 4
    save_edits([quant], tmp_path / "edits")
    (again,) = load_edits(tmp_path / "edits")
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in quant.tensors().items())


# --- the recipe


def recipe(folder: Path, *stages: dict[str, Any]) -> Any:
    return parse_recipe(
        {
            "model": str(folder),
            "device": "cpu",
            "calibration": {"sequences": 4, "length": 16},
            "evaluate": {"context": 16, "stride": 16, "max_tokens": 64},
            "stages": list(stages),
        }
    )


MASK = {"stage": "sparsify", "method": "wanda"}
QUANTISE = {"stage": "quantise", "format": "int4", "group": 8}


def test_a_recipe_prunes_and_quantises_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    wish = recipe(tiny_folder(tmp_path / "source"), MASK, QUANTISE)

    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["stage"] == "quantise" and event.get("block") == 1:
            raise Stop

    with pytest.raises(Stop):
        run(wish, tmp_path / "run", on_event=stop)
    metrics = run(wish, tmp_path / "run", resume=True)
    assert metrics["quantised"]["bytes"] < metrics["pruned"]["bytes"] / 2
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["quantised"]["bits"] == 8 and plan["masks"]["pattern"] == "2:4"
    model = load_model(str(tmp_path / "run" / "model"))
    for layer in range(3):
        for name in anatomy_of(model.config).weights(layer):
            assert ((model.get_parameter(name).unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
    assert "quantised" in (tmp_path / "run" / "report.html").read_text()
    undisturbed = run(wish, tmp_path / "again")
    assert undisturbed["quantised"]["perplexity"] == metrics["quantised"]["perplexity"]


def test_a_saved_masked_model_is_quantised_alone_and_its_pattern_is_checked(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    run(recipe(tiny_folder(tmp_path / "source"), MASK), tmp_path / "masked")
    folder = tmp_path / "masked" / "model"
    metrics = run(recipe(folder, QUANTISE), tmp_path / "run")
    assert metrics["quantised"]["perplexity"] != metrics["dense"]["perplexity"]
    model = load_model(str(folder))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, :4] = 1.0
    model.save_pretrained(folder)
    with pytest.raises(ShearlingError, match=r"layers.1.mlp.up_proj.weight: is said to be 2:4, but 1 of its"):
        run(recipe(folder, QUANTISE), tmp_path / "other")


def test_a_trained_model_is_quantised_as_trained(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    aware = {"quantise": "int4", "group": 8, "score": "magnitude"}
    train_stage = {
        "stage": "recover",
        "method": "ast",
        "text": "stdlib:calibration",
        "tokens": 64,
        "length": 16,
        "batch": 2,
    }
    plain = {**QUANTISE, "method": "rtn", "scales": "covering"}
    wish = recipe(tiny_folder(tmp_path / "source"), MASK, {**train_stage, **aware}, plain)
    metrics = run(wish, tmp_path / "run")
    assert metrics["quantised"]["perplexity"] == pytest.approx(metrics["recovered"]["perplexity"], rel=1e-5)


@pytest.mark.parametrize(
    ("family", "stages", "said"),
    [
        ("llama", [{**QUANTISE, "group": 7}], r"inputs are no multiple of its group of 7"),
        ("gpt2", [QUANTISE], r"compressed-tensors stores \[out, in\] and gpt2 \[in, out\]"),
        ("llama", [{**QUANTISE, "format": "float8_e4m3"}], r"float8 has one scale a row"),
        (
            "llama",
            [{"stage": "prune", "method": "cfsp", "sparsity": 0.5}, {**QUANTISE, "group": None}],
            r"blocks that differ in width",
        ),
    ],
)
def test_what_cannot_be_saved_is_refused_before_any_work(family: str, stages: Any, said: str, tmp_path: Path) -> None:
    wish = recipe(tiny_folder(tmp_path / "source", family), *stages)
    with pytest.raises(ShearlingError, match=said):
        run(wish, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_codes_are_of_the_grid_that_was_trained_on() -> None:
    masked = {"stage": "sparsify", "method": "magnitude", "pattern": "2:4"}
    trained = {"stage": "recover", "method": "ast", "quantise": "int4", "group": 8}
    stages = [masked, trained, {"stage": "quantise", "method": "rtn", "format": "int4", "group": 8}]
    parse_recipe({"model": "m", "stages": stages})
    for other in ({"group": 16}, {"group": None}, {"format": "uint4"}):
        with pytest.raises(
            RecipeError, match=r"int4, groups of 8; quantise.format and quantise.group must be the same"
        ):
            parse_recipe({"model": "m", "stages": [*stages[:2], {**stages[2], **other}]})


def test_quantise_comes_last() -> None:
    with pytest.raises(RecipeError, match="then recover, then quantise"):
        recipe(Path("m"), QUANTISE, MASK)
    with pytest.raises(RecipeError, match=r"quantise.format = 'int3'"):
        recipe(Path("m"), {**QUANTISE, "format": "int3"})
