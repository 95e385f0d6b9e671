"""Gates along the residual stream: what norms compute, and that the stock model comes back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from shearling.nn import GatedLayerNorm, GatedRMSNorm, HiddenGates, LoRABranch, OutputGates, wrap_
from shearling.train import compiled
from tests.tiny import FAMILIES, tiny_model, tiny_tokens

DIM = 12
SOFT = torch.tensor([1.0, 0.0, 0.3, 0.0, 1.0, 0.7, 0.0, 1.0, 0.01, 1.0, 0.0, 0.5])


def norms(kind: str, dim: int = DIM) -> tuple[Any, Any]:
    """A stock norm with random parameters, and the class that gates it."""
    torch.manual_seed(0)
    if kind == "layer":
        stock, gated = nn.LayerNorm(dim, eps=1e-3), GatedLayerNorm
    elif kind == "one_plus":
        stock, gated = Gemma2RMSNorm(dim, eps=1e-3), lambda base, z: GatedRMSNorm(base, z, True)
    else:
        stock, gated = LlamaRMSNorm(dim, eps=1e-3), lambda base, z: GatedRMSNorm(base, z, False)
    for parameter in stock.parameters():
        nn.init.normal_(parameter)
    return stock, gated


KINDS = ("rms", "one_plus", "layer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_open_gates_give_the_stock_norm(kind: str, dtype: torch.dtype) -> None:
    stock, gated = norms(kind)
    stock, x = stock.to(dtype), torch.randn(3, 5, DIM, dtype=dtype)
    result = gated(stock, torch.ones(DIM))(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result, stock(x))


@pytest.mark.parametrize("kind", KINDS)
def test_norm_follows_the_formula_with_soft_gates(kind: str) -> None:
    stock, gated = norms(kind)
    x = torch.randn(3, 5, DIM)
    # the oracle, in float64, over the kept dimensions gathered
    kept = SOFT.nonzero().flatten()
    y = x.double()[..., kept]
    if kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    y = y * (stock.weight.double()[kept] + (kind == "one_plus"))
    if kind == "layer":
        y = y + stock.bias.double()[kept]
    expected = torch.zeros(3, 5, DIM, dtype=torch.float64)
    expected[..., kept] = y * SOFT.double()[kept]
    torch.testing.assert_close(gated(stock, SOFT)(x).double(), expected.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_dimensions_do_not_matter_and_get_no_gradient(kind: str) -> None:
    stock, gated = norms(kind)
    norm, z = gated(stock, SOFT), SOFT != 0
    x = torch.randn(4, DIM, requires_grad=True)
    y = norm(x)
    assert not y[:, ~z].any()
    assert torch.equal(norm(torch.where(z, x, 7.0)), y)
    y.square().sum().backward()
    assert x.grad is not None and not x.grad[:, ~z].any() and x.grad[:, z].any()
    assert not stock.weight.grad[~z].any()


def test_layer_norm_without_weights() -> None:
    x = torch.randn(4, DIM)
    stock = nn.LayerNorm(DIM, elementwise_affine=False)
    torch.testing.assert_close(GatedLayerNorm(stock, torch.ones(DIM))(x), stock(x))


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_output_gates_multiply_all_that_a_linear_writes(family: str, branches: bool) -> None:
    model = tiny_model(family)
    path = {"llama": "model.layers.0.mlp.down_proj", "opt": "model.decoder.layers.0.fc2"}.get(
        family, "transformer.h.0.mlp.c_proj"
    )
    stock = model.get_submodule(path)
    if branches:
        wrapped = wrap_(model, [path])[path]
        branch = LoRABranch(48, 32, 2, 1.0)
        nn.init.normal_(branch.up)
        wrapped.branches.append(branch)
        stock = wrapped
    if stock.bias is not None:
        nn.init.normal_(stock.bias)
    torch.manual_seed(0)
    x, z, scalar, above = torch.randn(2, 3, 48), torch.randn(32), torch.tensor(0.3), torch.randn(2, 3, 32)
    z.requires_grad_(), scalar.requires_grad_()
    plain = stock(x)
    expected = plain * z * scalar
    wanted = torch.autograd.grad(expected, [z, scalar, stock.weight], above)
    first, second = OutputGates(model, {path: z}), OutputGates(model, {path: scalar})
    for training in (False, True):
        # in training branches are folded into the weight of so many rows
        y = model.get_submodule(path).train(training)(x.repeat(20, 1, 1))[:2]
        torch.testing.assert_close(y, expected)
    for found, true in zip(torch.autograd.grad(y, [z, scalar, stock.weight], above), wanted, strict=True):
        torch.testing.assert_close(found, true, atol=1e-4, rtol=1e-4)
    first.remove()
    torch.testing.assert_close(model.get_submodule(path)(x), plain * scalar)
    first.remove(), second.remove()
    assert torch.equal(model.get_submodule(path)(x), plain)
    assert model.get_submodule(path).weight is stock.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_give_the_stock_model_and_removing_them_restores_it(family: str) -> None:
    model, tokens = tiny_model(family), tiny_tokens()
    names, parameters = list(model.state_dict()), dict(model.named_parameters())
    modules, expected = dict(model.named_modules()), model(tokens).logits
    with HiddenGates(model, torch.ones(32, requires_grad=True)):
        assert list(model.state_dict()) == names
        assert all(p is parameters[name] for name, p in model.named_parameters())
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert torch.equal(model(tokens).logits, expected)


def test_parameters_that_were_replaced_meanwhile_stay() -> None:
    model = tiny_model("llama")
    gates = HiddenGates(model, torch.ones(32))
    new = nn.Parameter(torch.full((32,), 3.0))
    model.model.norm.weight = new
    gates.remove()
    gates.remove()
    assert model.model.norm.weight is new and type(model.model.norm) is LlamaRMSNorm


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_is_zero_where_a_gate_is_closed(family: str) -> None:
    model = tiny_model(family)
    z = torch.ones(32)
    z[[0, 3, 31]] = 0
    with HiddenGates(model, z):
        states = model(tiny_tokens(), output_hidden_states=True).hidden_states
    for state in states:
        assert not state[..., z == 0].any() and state[..., z != 0].any()


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_gradients_of_gates_are_true(family: str) -> None:
    model, tokens = tiny_model(family).double(), tiny_tokens(1, 6)
    torch.manual_seed(1)
    z = (0.2 + 0.8 * torch.rand(32, dtype=torch.float64)).requires_grad_()
    with HiddenGates(model, z):
        model(tokens).logits.log_softmax(-1)[..., 0].sum().backward()
        assert z.grad is not None
        step, index = 1e-3, 5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                z[index] += sign * step
                values.append(model(tokens).logits.log_softmax(-1)[..., 0].sum())
                z[index] -= sign * step
        slope = float(values[0] - values[1]) / (2 * step)
    assert z.grad[index].item() == pytest.approx(slope, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compiled_blocks_see_gates_that_change_in_place(family: str) -> None:
    model, tokens = tiny_model(family), tiny_tokens()
    z = torch.ones(32, requires_grad=True)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        z.grad = None
        logits = model(tokens, use_cache=False).logits
        logits.log_softmax(-1)[..., 0].sum().backward()
        assert z.grad is not None
        return logits.detach(), z.grad.clone()

    settings = ([], [1, 2], [7, 30, 31])

    def steps() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for closed in settings:
            with torch.no_grad():
                z.fill_(0.9)
                z[closed] = 0
            yield step()

    with HiddenGates(model, z):
        expected = list(steps())
        with compiled(model, backend="aot_eager"):
            found = list(steps())
    for (logits, gradient), (true_logits, true_gradient) in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, true_logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(gradient, true_gradient, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found[0][0], found[1][0], atol=1e-2)
