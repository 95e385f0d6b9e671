from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from shearling.errors import ShearlingError
from shearling.nn import (
    EffectiveLinear,
    LoRABranch,
    LowRankBranch,
    MaskTransform,
    plain_state,
    unwrap_,
    wrap_,
)
from shearling.train import compiled
from tests.tiny import tiny_model, tiny_tokens


class Double(nn.Module):
    """A second transform, to see that order counts."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class Lift(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 1


def linears(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and name != "lm_head"]


def decorate(model: nn.Module, seed: int = 0) -> dict[str, EffectiveLinear]:
    """Wrap every block linear with a random mask and a random LoRA branch."""
    torch.manual_seed(seed)
    wrapped = wrap_(model, linears(model))
    for linear in wrapped.values():
        linear.transforms.append(MaskTransform(torch.rand(linear.weight.shape) > 0.5))
        branch = LoRABranch(linear.in_features, linear.out_features, 3, 6.0)
        nn.init.normal_(branch.up, std=0.1)
        linear.branches.append(branch)
    return wrapped


def stock_matrix(linear: nn.Module) -> torch.Tensor:
    """[out, in] in float64."""
    weight = linear.weight.detach().double()
    return weight.T if isinstance(linear, Conv1D) else weight


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_wrapping_alone_changes_no_bit_and_no_name(family):
    model, tokens = tiny_model(family), tiny_tokens()
    names, expected = list(model.state_dict()), model(tokens).logits
    parameters = dict(model.named_parameters())
    wrap_(model, linears(model))
    assert list(model.state_dict()) == names
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert torch.equal(model(tokens).logits, expected)
    unwrap_(model)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_single_linear_is_bit_equal(dtype, bias):
    stock = nn.Linear(24, 40, bias=bias, dtype=dtype)
    x = torch.randn(3, 5, 24, dtype=dtype)
    assert torch.equal(EffectiveLinear(stock)(x), stock(x))


def test_conv1d_is_bit_equal_and_takes_strided_input():
    stock = Conv1D(40, 24)
    x = torch.randn(3, 24, 5).transpose(1, 2)
    wrapped = EffectiveLinear(stock)
    assert torch.equal(wrapped(x), stock(x.contiguous()))
    assert (wrapped.in_features, wrapped.out_features, wrapped.input_dim) == (24, 40, 0)


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    conv=st.booleans(),
    sizes=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    ranks=st.lists(st.integers(1, 5), max_size=3),
    masked=st.booleans(),
)
def test_merged_equals_unmerged(seed, conv, sizes, ranks, masked):
    torch.manual_seed(seed)
    inputs, outputs = sizes
    parent = nn.Sequential(Conv1D(outputs, inputs) if conv else nn.Linear(inputs, outputs))
    linear = wrap_(parent, ["0"])["0"]
    x = torch.randn(4, inputs)
    # the oracle, in float64 and from the formula
    matrix, bias = stock_matrix(parent[0].stock()).clone(), parent[0].bias.detach().double()
    if masked:
        mask = torch.rand(linear.weight.shape) > 0.5
        linear.transforms.append(MaskTransform(mask))
        matrix = matrix * (mask.T if conv else mask)
    for rank in ranks:
        branch = LoRABranch(inputs, outputs, rank, 2.0)
        nn.init.normal_(branch.up)
        linear.branches.append(branch)
        matrix = matrix + 2.0 / rank * branch.up.detach().double() @ branch.down.detach().double()
    expected = x.double() @ matrix.T + bias
    torch.testing.assert_close(parent(x).double(), expected, rtol=1e-5, atol=1e-5)
    unwrap_(parent)
    assert type(parent[0]) is (Conv1D if conv else nn.Linear)
    torch.testing.assert_close(parent(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_unwrapped_model_is_stock_and_computes_the_same(family):
    stock, model, tokens = tiny_model(family), tiny_model(family), tiny_tokens()
    decorate(model)
    unmerged = model(tokens).logits
    assert not torch.allclose(unmerged, stock(tokens).logits, atol=1e-2)
    unwrap_(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in stock.named_modules()]
    assert repr(model) == repr(stock)
    assert list(model.state_dict()) == list(stock.state_dict())
    torch.testing.assert_close(model(tokens).logits, unmerged, rtol=1e-4, atol=1e-4)


def test_transforms_apply_in_order():
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    before = model[0].weight.detach().clone()
    wrap_(model, ["0"])["0"].transforms.extend([Double(), Lift()])
    unwrap_(model)
    assert torch.equal(model[0].weight, 2 * before + 1)


def test_masked_weights_are_positive_zero_and_get_no_gradient():
    weight = torch.tensor([[-1.0, float("nan"), -3.0, 4.0]], requires_grad=True)
    masked = MaskTransform(torch.tensor([[False, False, True, True]]))(weight)
    assert masked.tolist() == [[0.0, 0.0, -3.0, 4.0]]
    assert not torch.signbit(masked[0, :2]).any()
    masked.sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_masks_and_branches_reload_from_the_state_dict():
    one, two, tokens = tiny_model("llama"), tiny_model("llama", seed=1), tiny_tokens()
    decorate(one, seed=0)
    decorate(two, seed=1)
    state = one.state_dict()
    assert state["model.layers.0.mlp.up_proj.transforms.0.mask"].dtype == torch.bool
    two.load_state_dict(state, strict=True)
    assert torch.equal(one(tokens).logits, two(tokens).logits)


def test_wrapping_twice_returns_the_same_module():
    model = tiny_model("llama")
    first = wrap_(model, ["model.layers.0.mlp.up_proj"])
    assert wrap_(model, ["model.layers.0.mlp.up_proj"]) == first


def test_tied_weights_stay_tied():
    model = tiny_model("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    head = wrap_(model, ["lm_head"])["lm_head"]
    assert head.weight is model.model.embed_tokens.weight
    unwrap_(model)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight


def test_merging_a_tied_weight_is_refused_before_anything_changes():
    model = tiny_model("llama")
    wrapped = wrap_(model, ["model.layers.0.mlp.up_proj", "lm_head"])
    for linear in wrapped.values():
        linear.transforms.append(Double())
    before = wrapped["model.layers.0.mlp.up_proj"].weight.detach().clone()
    with pytest.raises(ShearlingError, match="lm_head.*tied"):
        unwrap_(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_a_module_under_two_names_is_wrapped_once():
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    wrap_(model, ["b"])
    assert isinstance(model["a"], EffectiveLinear) and model["a"] is model["b"]
    unwrap_(model)
    assert type(model["a"]) is nn.Linear and model["a"] is model["b"]


@pytest.mark.parametrize("name", ["model.layers.9.mlp.up_proj", "model.norm"])
def test_what_is_no_linear_is_refused_before_anything_changes(name):
    model = tiny_model("llama")
    with pytest.raises(ShearlingError, match=name):
        wrap_(model, ["model.layers.0.mlp.up_proj", name])
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_lora_starts_at_zero_in_float32_and_mixes_with_bfloat16():
    linear = nn.Linear(16, 8, dtype=torch.bfloat16)
    x = torch.randn(2, 16, dtype=torch.bfloat16)
    wrapped = EffectiveLinear(linear)
    branch = LoRABranch(16, 8, 4, 8.0)
    wrapped.branches.append(branch)
    assert branch.scale == 2.0 and branch.down.dtype == branch.up.dtype == torch.float32
    y = wrapped(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, linear(x))
    # Kaiming-uniform with a = sqrt(5): the bound is 1 / sqrt(fan in)
    assert 0 < branch.down.abs().max() <= 16**-0.5


def test_lora_draws_down_from_the_global_generator_and_is_a_low_rank_branch():
    torch.manual_seed(3)
    branch = LoRABranch(16, 8, 4, 8.0)
    torch.manual_seed(3)
    # Kaiming-uniform with a = sqrt(5) is uniform within 1 / sqrt(fan in)
    torch.testing.assert_close(branch.down, nn.Parameter(torch.empty(4, 16).uniform_(-0.25, 0.25)))
    assert isinstance(branch, LowRankBranch) and list(branch.state_dict()) == ["down", "up"]
    assert branch.rank == 4 and not branch.up.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_low_rank_branch_multiplies_copies_of_its_factors(dtype):
    down, up = torch.randn(3, 16).to(dtype), torch.randn(3, 8).to(dtype).T
    branch, x = LowRankBranch(down, up, 0.5), torch.randn(2, 5, 16)
    assert branch.down.dtype == branch.up.dtype == torch.float32 and branch.up.is_contiguous()
    expected = 0.5 * up.double() @ down.double()
    torch.testing.assert_close(branch.matrix(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(branch(x).double(), x.double() @ expected.T, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        branch.down.zero_()
        branch.up.zero_()
    assert down.all() and up.all()
    assert torch.equal(LowRankBranch(down, up).matrix(), up.float().double() @ down.float().double())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_plain_state_is_the_stock_model_s_with_transforms_applied(family):
    stock, model, tokens = tiny_model(family), tiny_model(family), tiny_tokens()
    wrapped = decorate(model)
    state = plain_state(model)
    assert list(state) == list(stock.state_dict()) and len(wrapped) == len(linears(stock))
    stock.load_state_dict(state)
    for linear in wrapped.values():
        linear.branches = nn.ModuleList()
    assert torch.equal(stock(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradients(family):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = tiny_model(family, **({"attn_pdrop": 0.0, "resid_pdrop": 0.0} if family == "gpt2" else {}))
        decorate(model)
        model.train()
        if family == "gpt2":
            model.transformer.drop.p = 0.0
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(tiny_tokens(), use_cache=False).logits.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() and any("branches" in name for name in plain)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-7)


def test_one_graph_under_compile_and_new_masks_need_no_new_one():
    linear = EffectiveLinear(nn.Linear(8, 8))
    mask = MaskTransform(torch.rand(8, 8) > 0.5)
    linear.transforms.append(mask)
    linear.branches.append(LoRABranch(8, 8, 2, 4.0))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(linear, backend=backend, fullgraph=True)
    x = torch.randn(3, 8)
    assert torch.equal(compiled(x), linear(x))
    before = compiled(x)
    mask.mask.copy_(~mask.mask)
    assert torch.equal(compiled(x), linear(x)) and not torch.equal(compiled(x), before)
    assert len(graphs) == 1


def test_blocks_of_one_shape_compile_to_one_graph():
    model, tokens = tiny_model("qwen2", num_hidden_layers=4), tiny_tokens(2, 12)
    decorate(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with compiled(model):
        model(tokens, use_cache=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("conv", [False, True])
def test_branches_of_a_trained_linear_are_folded_into_its_weight_over_many_rows(conv):
    torch.manual_seed(0)
    inputs, outputs, rank = 12, 8, 3
    linear = EffectiveLinear(Conv1D(outputs, inputs) if conv else nn.Linear(inputs, outputs))
    branch = LoRABranch(inputs, outputs, rank, 2.0)
    nn.init.normal_(branch.up)
    linear.branches.append(branch)
    passes = []
    branch.register_forward_hook(lambda *_: passes.append(1))
    x, pull = torch.randn(40, inputs, requires_grad=True), torch.randn(40, outputs)
    wanted = [x, linear.weight, linear.bias, branch.down, branch.up]

    y = linear(x)
    folded = torch.autograd.grad(y, wanted, pull)
    assert not passes
    # the oracle, in float64 and from the formula
    copies = [tensor.detach().double().requires_grad_() for tensor in wanted]
    at, weight, bias, down, up = copies
    expected = at @ (weight if conv else weight.T) + bias + 2.0 / rank * at @ down.T @ up.T
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for found, exact in zip(folded, torch.autograd.grad(expected, copies, pull.double()), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)

    # few rows, a frozen weight, evaluation: beside it
    linear(x[:2])
    linear.weight.requires_grad_(False)
    linear(x)
    linear.weight.requires_grad_(True)
    linear.eval()(x)
    assert len(passes) == 3


def test_a_compiled_block_with_a_hook_inside_is_not_taken_for_one_without():
    plain, hooked, tokens = tiny_model("llama"), tiny_model("llama"), tiny_tokens(2, 12)
    stock = plain(tokens, use_cache=False).logits
    for layer in hooked.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: 0.5 * output)
    expected = hooked(tokens, use_cache=False).logits
    assert not torch.allclose(stock, expected, atol=1e-3)
    with compiled(plain, "eager"), compiled(hooked, "eager"):
        torch.testing.assert_close(plain(tokens, use_cache=False).logits, stock)
        torch.testing.assert_close(hooked(tokens, use_cache=False).logits, expected)
