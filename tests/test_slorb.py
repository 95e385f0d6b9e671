"""SLoRB: where its factors start, what they cost, and branches that stay beside the model in memory and on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from shearling.anatomy import anatomy_of
from shearling.errors import ShearlingError
from shearling.export import load_adapters, save_adapters, save_model
from shearling.methods.slorb import activation_svd, block_mean, overhead, truncated_svd
from shearling.models import load_model
from shearling.nn import LowRankBranch, MaskTransform, wrapped_linears
from shearling.plan import Adapters, Structure, inventory_of, sizes
from shearling.plan.patterns import Pattern
from shearling.surgery import adapters_of, attach_adapters_, cut_
from shearling.train import TrainSettings, train
from shearling.train.policy import Policy
from tests.tiny import FAMILIES, tiny_model, tiny_tokens


def pruned_part(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """What magnitude 2:4 takes from independent normal weights."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    return weight * ~Pattern.parse("2:4").mask(weight.abs())


def inputs_with_outliers(inputs: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs [tokens, inputs] whose scales differ by more than an order of magnitude, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-1, 1, inputs, dtype=torch.float64)
    return torch.randn(4 * inputs, inputs, generator=generator, dtype=torch.float64) @ mixing * scales


def product(factors: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    down, up = factors
    return up.double() @ down.double()


def initial(name: str, missing: torch.Tensor, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    if name == "mean":
        return block_mean(missing, missing.shape[1] // rank)
    if name == "truncated":
        return truncated_svd(missing, rank)
    x = inputs_with_outliers(missing.shape[1], seed)
    return activation_svd(missing, x.T @ x, rank)


# --- where the factors start


@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_block_mean_is_the_least_squares_solution(size: int) -> None:
    missing = pruned_part(24, 64)
    down, up = block_mean(missing, size)
    assert torch.equal(down, torch.kron(torch.eye(64 // size), torch.ones(1, size)))
    best = torch.linalg.lstsq(down.double().T, missing.double().T).solution.T
    torch.testing.assert_close(up.double(), best, rtol=1e-6, atol=1e-7)


def test_block_mean_divides_by_the_block_and_not_by_what_was_pruned() -> None:
    down, up = block_mean(torch.tensor([[0.0, 8.0, -2.0, 0.0, 0.0, 0.0, 0.0, 4.0]]), 4)
    assert up.tolist() == [[1.5, 1.0]] and down.tolist() == [[1.0] * 4 + [0.0] * 4, [0.0] * 4 + [1.0] * 4]


@pytest.mark.parametrize("name", ["mean", "truncated", "activation"])
def test_where_nothing_is_missing_the_branch_is_zero_and_can_still_learn(name: str) -> None:
    down, up = initial(name, torch.zeros(12, 16), 4)
    assert not product((down, up)).any()
    branch = LowRankBranch(down, up)
    (branch(torch.randn(5, 16)) - 1).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in branch.parameters())


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (48, 48)])
def test_truncated_svd_leaves_the_tail_of_the_singular_values(shape: tuple[int, int]) -> None:
    missing = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(missing.double())
    for rank in (1, 7, 40):
        down, up = truncated_svd(missing, rank)
        error = (missing.double() - product((down, up))).square().sum()
        torch.testing.assert_close(error, values[rank:].square().sum(), rtol=1e-6, atol=1e-9)
        for norms in (down.norm(dim=1), up.norm(dim=0)):
            torch.testing.assert_close(norms.double(), values[:rank].sqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_activation_svd_is_optimal_in_the_norm_of_the_inputs(shape: tuple[int, int], damping: float) -> None:
    missing, rank = pruned_part(*shape), 8
    x = inputs_with_outliers(shape[1])
    gram = x.T @ x
    kept = gram.clone()
    down, up = activation_svd(missing, gram, rank, damping)
    assert torch.equal(gram, kept)
    damped = gram + damping * gram.diagonal().mean() * torch.eye(shape[1], dtype=torch.float64)

    def error(factors: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        rest = missing.double() - product(factors)
        return (rest @ damped * rest).sum()

    values = torch.linalg.svdvals(missing.double() @ torch.linalg.cholesky(damped))
    torch.testing.assert_close(error((down, up)), values[rank:].square().sum(), rtol=1e-5, atol=0)
    assert error((down, up)) < 0.9 * error(truncated_svd(missing, rank))
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0), rtol=1e-5, atol=1e-6)


def test_activation_svd_on_white_inputs_is_the_truncated_svd_and_ignores_the_scale_of_the_gram_matrix() -> None:
    missing, x = pruned_part(20, 32), inputs_with_outliers(32)
    white = activation_svd(missing, 3 * torch.eye(32), 5)
    torch.testing.assert_close(product(white), product(truncated_svd(missing, 5)), rtol=1e-4, atol=1e-6)
    once, more = (activation_svd(missing, factor * x.T @ x, 5) for factor in (1.0, 1e4))
    torch.testing.assert_close(product(once), product(more), rtol=1e-4, atol=1e-6)


def test_recovered_energy_of_the_paper_s_start_and_of_the_truncated_svd() -> None:
    missing = pruned_part(1024, 1024)
    energy = missing.double().square().sum()

    def recovered(factors: tuple[torch.Tensor, torch.Tensor]) -> float:
        return 1 - ((missing.double() - product(factors)).square().sum() / energy).item()

    assert recovered(block_mean(missing, 16)) == pytest.approx(0.062, abs=0.005)
    assert recovered(truncated_svd(missing, 64)) == pytest.approx(0.21, abs=0.005)


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["mean", "truncated", "activation"]),
    outputs=st.integers(1, 20),
    size=st.integers(1, 5),
    rank=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_shapes_and_that_a_start_never_makes_things_worse(
    name: str, outputs: int, size: int, rank: int, dtype: torch.dtype, seed: int
) -> None:
    inputs = rank * size
    missing = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if name != "mean":
        rank = min(rank, outputs)
    down, up = initial(name, missing, rank, seed)
    assert down.shape == (rank, inputs) and up.shape == (outputs, rank)
    assert down.dtype == up.dtype == torch.float32 and down.is_contiguous() and up.is_contiguous()
    metric = torch.eye(inputs, dtype=torch.float64)
    if name == "activation":
        x = inputs_with_outliers(inputs, seed)
        metric = x.T @ x
        metric += 0.01 * metric.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    rest, whole = missing.double() - product((down, up)), missing.double()
    assert (rest @ metric * rest).sum() <= (whole @ metric * whole).sum() * (1 + 1e-6)
    full = min(outputs, inputs)
    if name != "mean" and rank == full:
        scale = whole.abs().max()
        torch.testing.assert_close(product((down, up)) / scale, whole / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_impossible_ranks_are_refused_with_the_limit(rank: int) -> None:
    for shape in ((8, 12), (12, 8)):
        missing = torch.randn(shape)
        with pytest.raises(ShearlingError, match=rf"rank {rank}.*from 1 to 8"):
            truncated_svd(missing, rank)
        with pytest.raises(ShearlingError, match=rf"rank {rank}.*from 1 to 8"):
            activation_svd(missing, torch.eye(shape[1]), rank)


@pytest.mark.parametrize("size", [0, -4, 5, 24])
def test_blocks_that_do_not_fill_the_inputs_are_refused(size: int) -> None:
    with pytest.raises(ShearlingError, match=rf"block size {size}.*12 inputs"):
        block_mean(torch.randn(8, 12), size)


def test_a_gram_matrix_without_any_input_is_refused() -> None:
    with pytest.raises(ShearlingError, match=r"not positive definite at damping 0\.01"):
        activation_svd(torch.randn(4, 6), torch.zeros(6, 6), 2)


@pytest.mark.parametrize(
    ("outputs", "inputs", "trained", "fixed"),
    # (1 + inputs / outputs) / 16, and 1 / 16; the last two are LLaMA-2-7B's gate and down projections
    [(64, 64, 0.125, 0.0625), (11008, 4096, 0.0857, 0.0625), (4096, 11008, 0.2305, 0.0625)],
)
def test_overhead_of_blocks_of_sixteen(outputs: int, inputs: int, trained: float, fixed: float) -> None:
    down, up = torch.empty(inputs // 16, inputs, device="meta"), torch.empty(outputs, inputs // 16, device="meta")
    adapters = Adapters({"a": down, "b": down}, {"a": up, "b": up}, {"a": 1.0, "b": 1.0})
    assert overhead(adapters, down_trained=True) == pytest.approx(trained, abs=1e-4)
    assert overhead(adapters, down_trained=False) == pytest.approx(fixed)


# --- beside the model


def random_adapters(model: Any, seed: int = 0) -> Adapters:
    """Branches beside every other linear of the blocks, each with a rank and a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    anatomy = anatomy_of(model.config)
    down, up, scale = {}, {}, {}
    for layer in range(anatomy.num_layers):
        for place, linear in enumerate(anatomy.family.linears):
            if (layer + place) % 2:
                continue
            path, rank = anatomy.path(layer, linear), 1 + (layer + 2 * place) % 5
            outputs, inputs = model.get_submodule(path).weight.shape
            if anatomy.family.input_first:
                outputs, inputs = inputs, outputs
            down[path] = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            up[path] = torch.randn(outputs, rank, generator=generator)
            scale[path] = 0.25 * (1 + place)
    return Adapters(down, up, scale)


def cut_llama() -> Any:
    model = tiny_model("llama")
    cut_(model, [Structure({"ffn.1": tuple(range(20)), "kv_group.0": (1,)})])
    return model


def make(family: str) -> Any:
    return cut_llama() if family == "cut" else tiny_model(family)


def assert_same(first: Adapters, second: Adapters) -> None:
    assert first.scale == pytest.approx(second.scale) and first.down.keys() == second.down.keys() == first.up.keys()
    for path in first.down:
        assert torch.equal(first.down[path], second.down[path]) and torch.equal(first.up[path], second.up[path])


@pytest.mark.parametrize("family", [*FAMILIES, "cut"])
def test_attached_adapters_do_what_merged_ones_do(family: str) -> None:
    beside, merged, tokens = make(family), make(family), tiny_tokens()
    adapters = random_adapters(beside)
    weights = {name: parameter.clone() for name, parameter in beside.named_parameters()}
    plain = beside(tokens).logits
    wrapped = attach_adapters_(beside, adapters)
    cut_(merged, [adapters])
    assert wrapped == wrapped_linears(beside) and list(wrapped) == list(adapters.down)
    assert all(torch.equal(beside.get_parameter(name), weight) for name, weight in weights.items())
    with torch.no_grad():
        assert not torch.allclose(beside(tokens).logits, plain, atol=1e-2)
        torch.testing.assert_close(beside(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-4)
    assert_same(adapters_of(beside), adapters)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_branches_count_in_sizes_and_are_in_the_way_of_a_cut(family: str) -> None:
    model = tiny_model(family).bfloat16()
    anatomy = anatomy_of(model.config)
    before = sizes(inventory_of(model), anatomy)
    adapters = random_adapters(model)
    added = sum(tensor.numel() for tensor in adapters.tensors().values())
    attach_adapters_(model, adapters)
    after = sizes(inventory_of(model), anatomy)
    assert after == replace(
        before,
        parameters=before.parameters + added,
        bytes=before.bytes + 4 * added,
        flops_per_token=before.flops_per_token + 2 * added,
    )
    with pytest.raises(ShearlingError, match=r"branches\.0\.down: is a branch"):
        cut_(model, [Structure({"ffn.1": (0, 1)})])


def test_training_an_attached_branch_leaves_the_edit_alone() -> None:
    model = tiny_model("llama")
    adapters = random_adapters(model)
    before = {name: tensor.clone() for name, tensor in adapters.tensors().items()}
    for linear in attach_adapters_(model, adapters).values():
        nn.init.normal_(linear.branches[0].down)
        nn.init.normal_(linear.branches[0].up)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapters.tensors().items())


def test_several_branches_beside_a_linear_count_as_one() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens()
    attach_adapters_(model, random_adapters(model, seed=0))
    attach_adapters_(model, random_adapters(model, seed=1))
    again = tiny_model("llama")
    attach_adapters_(again, adapters_of(model))
    assert {len(linear.branches) for linear in wrapped_linears(again).values()} == {1}
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_model_without_branches_has_empty_adapters() -> None:
    adapters = adapters_of(tiny_model("llama"))
    assert not adapters.down and not adapters.up and not adapters.scale


@pytest.mark.parametrize("change", ["down", "up", "rank"])
def test_factors_that_do_not_fit_are_refused_before_any_branch_is_there(change: str) -> None:
    model, path = tiny_model("llama"), "model.layers.1.mlp.up_proj"
    fit = Adapters({path: torch.ones(2, 32)}, {path: torch.ones(48, 2)}, {path: 1.0})
    shapes = {"down": (2, 31), "up": (47, 2), "rank": (48, 3)}
    wrong = {"down": fit.down[path], "up": fit.up[path]}
    wrong["down" if change == "down" else "up"] = torch.ones(shapes[change])
    first = "model.layers.0.mlp.up_proj"
    adapters = Adapters(
        {first: fit.down[path], path: wrong["down"]}, {first: fit.up[path], path: wrong["up"]}, {first: 1.0, path: 1.0}
    )
    with pytest.raises(ShearlingError, match=rf"{path}: factors .* takes \[48, rank\] and \[rank, 32\]"):
        attach_adapters_(model, adapters)
    assert not adapters_of(model).down
    with pytest.raises(ShearlingError, match="no such module"):
        attach_adapters_(model, Adapters({"nowhere": fit.down[path]}, {"nowhere": fit.up[path]}, {"nowhere": 1.0}))


class UpOnly(Policy):
    """Trains S and nothing else, as with the paper's fixed projection."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def param_groups(self) -> list[dict[str, Any]]:
        branches = (branch for linear in wrapped_linears(self.model).values() for branch in linear.branches)
        return [{"params": [branch.up for branch in branches]}]


def test_a_factor_that_no_policy_names_stays_as_it_is() -> None:
    model, windows = tiny_model("llama"), tiny_tokens(8, 12)
    adapters = random_adapters(model)
    attach_adapters_(model, adapters)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters() if "branches" not in name}
    train(model, windows, [UpOnly(model)], TrainSettings(tokens=96, length=12, batch=4, learning_rate=1e-2, warmup=0))
    after = adapters_of(model)
    for path in adapters.down:
        assert torch.equal(after.down[path], adapters.down[path])
        assert not torch.equal(after.up[path], adapters.up[path])
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())


# --- on disk


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2", "phi3", "cut"])
def test_peft_loads_the_folder_and_computes_the_same(family: str, tmp_path: Path) -> None:
    model, tokens = make(family), tiny_tokens()
    adapters = random_adapters(model)
    save_adapters(adapters, tmp_path / "adapter", anatomy_of(model.config))
    attach_adapters_(model, adapters)
    theirs = peft.PeftModel.from_pretrained(make(family), str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    wrapped = {name for name, _ in theirs.named_modules() if name.endswith(".lora_A.default")}
    assert wrapped == {f"base_model.model.{path}.lora_A.default" for path in adapters.down}
    assert_same(load_adapters(tmp_path / "adapter"), adapters)


def test_layers_whose_numbers_share_digits_keep_their_own_scales(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=12)
    paths = {layer: f"model.layers.{layer}.mlp.up_proj" for layer in (1, 10, 11)}
    adapters = Adapters(
        {path: torch.randn(layer, 32) for layer, path in paths.items()},
        {path: torch.randn(48, layer) for layer, path in paths.items()},
        {path: float(layer) for layer, path in paths.items()},
    )
    save_adapters(adapters, tmp_path, anatomy_of(model.config))
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path))
    for layer, path in paths.items():
        module = theirs.base_model.model.get_submodule(path)
        assert module.scaling["default"] == pytest.approx(layer) and module.r["default"] == layer
    assert load_adapters(tmp_path).scale == pytest.approx(adapters.scale)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_that_peft_wrote_is_read(rslora: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, use_rslora=rslora, init_lora_weights=False,
        target_modules=["q_proj", "down_proj", "up_proj"],
        rank_pattern={"down_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
        alpha_pattern={"down_proj": 5, r"layers\.1\.mlp\.up_proj": 7},
    )  # fmt: skip
    theirs, tokens = peft.get_peft_model(tiny_model("llama"), config), tiny_tokens()
    theirs.save_pretrained(str(tmp_path))
    ours = tiny_model("llama")
    attach_adapters_(ours, load_adapters(tmp_path))
    with torch.no_grad():
        assert not torch.allclose(ours(tokens).logits, tiny_model("llama")(tokens).logits, atol=1e-2)
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"use_dora": True}, "use_dora=True"), ({"bias": "all"}, "no factor"), ({"modules_to_save": ["norm"]}, "no fac")],
)
def test_what_low_rank_branches_cannot_do_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **options)
    peft.get_peft_model(tiny_model("qwen2"), config).save_pretrained(str(tmp_path))
    with pytest.raises(ShearlingError, match=message):
        load_adapters(tmp_path)


def test_unfinished_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_adapters(random_adapters(model), tmp_path, anatomy_of(model.config))
    config, tensors = (tmp_path / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    text, content = config.read_text(), tensors.read_bytes()
    config.write_text(json.dumps({**json.loads(text), "peft_type": "LOHA"}))
    with pytest.raises(ShearlingError, match="peft_type='LOHA'.*must be LORA"):
        load_adapters(tmp_path)
    config.write_text(text[:-20])
    with pytest.raises(ShearlingError, match="cannot be read"):
        load_adapters(tmp_path)
    config.write_text(text)
    tensors.write_bytes(content[:-20])
    with pytest.raises(ShearlingError, match="cannot be read"):
        load_adapters(tmp_path)
    factors = safetensors.torch.load(content)
    safetensors.torch.save_file(
        {name: t for name, t in factors.items() if "0.self_attn.q_proj.lora_A" not in name}, tensors
    )
    with pytest.raises(ShearlingError, match=r"layers\.0\.self_attn\.q_proj has one factor"):
        load_adapters(tmp_path)
    tensors.unlink()
    with pytest.raises(ShearlingError, match="no adapter_model.safetensors"):
        load_adapters(tmp_path)
    with pytest.raises(ShearlingError, match="no adapter_config.json"):
        load_adapters(tmp_path / "nowhere")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "cut"])
def test_a_saved_model_keeps_its_branches_beside_a_plain_checkpoint(family: str, tmp_path: Path) -> None:
    model, tokens = make(family), tiny_tokens()
    wrapped = attach_adapters_(model, random_adapters(model))
    generator = torch.Generator().manual_seed(1)
    for linear in wrapped.values():
        linear.transforms.append(MaskTransform(torch.rand(linear.weight.shape, generator=generator) > 0.5))
    with torch.no_grad():
        expected = model(tokens).logits
    save_model(model, None, tmp_path / "model", provenance={})
    assert len(wrapped_linears(model)) == len(wrapped) and torch.equal(model(tokens).logits, expected)

    again = load_model(str(tmp_path / "model"))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, expected, rtol=0, atol=0)
    assert_same(adapters_of(again), adapters_of(model))

    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for path, linear in wrapped.items():
        assert torch.equal(plain.get_parameter(f"{path}.weight") != 0, linear.transforms[0].mask)
    theirs = peft.PeftModel.from_pretrained(plain.eval(), str(tmp_path / "model" / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_branches_is_saved_without_an_adapter(tmp_path: Path) -> None:
    save_model(tiny_model("llama"), None, tmp_path / "model", provenance={})
    assert not (tmp_path / "model" / "adapter").exists()
    assert not wrapped_linears(load_model(str(tmp_path / "model")))


def test_branches_stay_in_float32_beside_a_coarser_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    attach_adapters_(model, random_adapters(model))
    save_model(model, None, tmp_path / "model", provenance={})
    again = load_model(str(tmp_path / "model"), dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert_same(adapters_of(again), adapters_of(model))


def test_a_transformed_tied_weight_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = tiny_model("llama")
    weight = model.lm_head.weight
    adapters = Adapters({"lm_head": torch.ones(1, 32)}, {"lm_head": torch.ones(len(weight), 1)}, {"lm_head": 1.0})
    head = attach_adapters_(model, adapters)["lm_head"]
    save_model(model, None, tmp_path / "beside", provenance={})
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path / "beside"))(tiny_tokens()).logits, model(tiny_tokens()).logits)
    head.transforms.append(MaskTransform(torch.ones_like(weight)))
    with pytest.raises(ShearlingError, match="lm_head: its weight is tied"):
        save_model(model, None, tmp_path / "model", provenance={})
    assert [folder.name for folder in tmp_path.iterdir()] == ["beside"]
