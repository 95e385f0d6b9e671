"""SPP: the adapters, the zeros that they keep, and what training with them leaves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from shearling.anatomy import anatomy_of
from shearling.errors import RecipeError, ShearlingError
from shearling.methods.spp import SPPPolicy
from shearling.nn import EffectiveLinear, MultiplicativeAdapter
from shearling.plan.patterns import Pattern
from shearling.recipe import SPP, parse_recipe
from shearling.run import run
from shearling.surgery import cut_
from shearling.train import Distillation, TrainSettings, train
from tests.test_run import make_recipe
from tests.tiny import FAMILIES, tiny_model, tiny_tokens

LENGTH = 12
SETTINGS = TrainSettings(
    tokens=12 * 4 * LENGTH, length=LENGTH, batch=4, micro_batch=2, learning_rate=1e-2, log_every=1, checkpoint_every=1
)


def block_linears(model: Any) -> dict[str, nn.Module]:
    anatomy = anatomy_of(model.config)
    paths = [anatomy.path(layer, linear) for layer in range(3) for linear in anatomy.family.linears]
    return {path: model.get_submodule(path) for path in paths}


def make_masks(model: Any) -> dict[str, Tensor]:
    """2:4 along the input, as stored."""
    masks = {}
    for path, linear in block_linears(model).items():
        weight, stored = linear.weight.detach().abs(), isinstance(linear, Conv1D)
        mask = Pattern(2, 4).mask(weight.T if stored else weight)
        masks[f"{path}.weight"] = mask.T.contiguous() if stored else mask
    return masks


def sparse_model(family: str = "llama") -> Any:
    model = tiny_model(family)
    for name, mask in make_masks(model).items():
        weight = model.get_parameter(name).data
        weight.copy_(torch.where(mask, weight, 0.0))
    return model


def watched(policy: SPPPolicy, seen: dict[str, Any]) -> SPPPolicy:
    """The policy, which notes what the training model says just before the end."""

    class Watch(SPPPolicy):
        def finalize(self):
            with torch.no_grad():
                seen["logits"] = self._model.eval()(tiny_tokens(2, LENGTH)).logits
            seen["trained"] = {name for name, p in self._model.named_parameters() if p.requires_grad}
            return super().finalize()

    policy.__class__ = Watch
    return policy


def is_positive_zero(values: Tensor) -> bool:
    return not values.any() and not torch.signbit(values).any()


# --- the adapter


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    rank=st.sampled_from([1, 2, 3, 5]),
    repeat=st.integers(1, 4),
    inputs=st.integers(1, 6),
    scale=st.sampled_from([0.5, 2.0, 3.0]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_weight_and_gradients_equal_the_closed_form(rank, repeat, inputs, scale, transposed, seed):
    """W'_nj = W_nj (1 + s A_kj b_n) with k = n // (N / r), term by term in float64."""
    generator = torch.Generator().manual_seed(seed)
    outputs = rank * repeat
    base = Conv1D(outputs, inputs) if transposed else nn.Linear(inputs, outputs)
    rows = torch.randn(outputs, inputs, generator=generator) * (torch.rand(outputs, inputs, generator=generator) < 0.6)
    rows += 0.0
    base.weight.data = (rows.T if transposed else rows).contiguous()
    adapter = MultiplicativeAdapter(EffectiveLinear(base), rank, scale)
    assert adapter.A.shape == (rank, inputs) and adapter.b.shape == (outputs, 1)
    adapter.b.data.normal_(generator=generator)
    upstream = torch.randn(outputs, inputs, generator=generator)
    weight = adapter(base.weight.detach())
    assert weight.shape == base.weight.shape
    found = weight.T if transposed else weight
    (found * upstream).sum().backward()
    a, b = adapter.A.detach().double().tolist(), adapter.b.detach().double().flatten().tolist()
    expected = torch.zeros(outputs, inputs, dtype=torch.float64)
    grad_a, grad_b = torch.zeros(rank, inputs, dtype=torch.float64), torch.zeros(outputs, 1, dtype=torch.float64)
    for n in range(outputs):
        for j in range(inputs):
            k, w, g = n // repeat, rows[n, j].item(), upstream[n, j].item()
            expected[n, j] = w + scale * w * a[k][j] * b[n]
            grad_a[k, j] += scale * g * w * b[n]
            grad_b[n] += scale * g * w * a[k][j]
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.A.grad.double(), grad_a, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.b.grad.double(), grad_b, rtol=1e-5, atol=1e-5)
    assert is_positive_zero(found.detach()[rows == 0])


def test_a_factor_starts_uniform_and_in_half_precision_the_sum_is_rounded_once():
    linear = EffectiveLinear(nn.Linear(64, 48, dtype=torch.bfloat16))
    adapter = MultiplicativeAdapter(linear, 16, 2.0)
    # Kaiming-uniform, as a linear of 64 inputs starts
    assert adapter.A.abs().max() <= 1 / 8 and adapter.A.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)
    assert torch.equal(adapter(linear.weight), linear.weight)
    nn.init.normal_(adapter.b)
    exact = linear.weight.double() * (1 + 2 * adapter.A.double().repeat_interleave(3, 0) * adapter.b.double())
    weight = adapter(linear.weight)
    assert weight.dtype == torch.bfloat16 and adapter.A.dtype == adapter.b.dtype == torch.float32
    # half of the last of eight bits
    torch.testing.assert_close(weight.double(), exact, rtol=2**-8, atol=1e-6)


# --- training


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_the_sparse_model_to_the_bit(family):
    model, ids = sparse_model(family), tiny_tokens(2, LENGTH)
    with torch.no_grad():
        expected = model(ids).logits
    policy = SPPPolicy(anatomy_of(model.config), 4)
    policy.attach(model, SETTINGS)
    (group,) = policy.param_groups()
    assert len(group["params"]) == 2 * len(block_linears(model))
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_training_ends_in_a_stock_model_with_the_zeros_it_had(family, tmp_path):
    model, windows, seen = sparse_model(family), tiny_tokens(8, LENGTH), {}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [(name, type(m)) for name, m in model.named_modules()]
    paths = list(block_linears(model))
    policy = watched(SPPPolicy(anatomy_of(model.config), 8), seen)
    settings = dataclasses.replace(SETTINGS, learning_rate=0.1)
    (edit,) = train(model, windows, [policy], settings).edits
    assert [(name, type(m)) for name, m in model.named_modules()] == modules
    assert seen["trained"] == {f"{path}.transforms.0.{factor}" for path in paths for factor in "Ab"}
    assert all(p.requires_grad for p in model.parameters())
    after = model.state_dict()
    assert set(edit.values) == {f"{path}.weight" for path in paths}
    for name in edit.values:
        gone = before[name] == 0
        assert 0.49 < gone.float().mean() < 0.51 and is_positive_zero(after[name][gone])
        assert (after[name] != before[name]).any()
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - edit.values.keys())
    with torch.no_grad():
        assert torch.equal(model.eval()(tiny_tokens(2, LENGTH)).logits, seen["logits"])
        assert model(windows, labels=windows).loss < sparse_model(family)(windows, labels=windows).loss
    # the edit says it all, and no longer depends on the model
    twin = sparse_model(family)
    cut_(twin, [edit])
    assert all(torch.equal(tensor, after[name]) for name, tensor in twin.state_dict().items())
    assert not {t.data_ptr() for t in edit.values.values()} & {p.data_ptr() for p in model.parameters()}
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], after[name]) for name in edit.values)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masks_say_what_goes_whatever_is_stored_there(family):
    model = tiny_model(family)
    masks = make_masks(model)
    one, *others = masks
    # dense but for one weight that stays, though it is zero, and one that goes
    model.get_parameter(one).data[tuple(masks[one].nonzero()[0])] = 0.0
    model.get_parameter(one).data[tuple((~masks[one]).nonzero()[0])] = -0.0
    policy = SPPPolicy(anatomy_of(model.config), 4, masks=masks)
    train(model, tiny_tokens(8, LENGTH), [policy], SETTINGS)
    for name in (one, *others):
        weight = model.get_parameter(name).detach()
        assert is_positive_zero(weight[~masks[name]])
        assert (weight[masks[name]] == 0).sum() == (1 if name == one else 0)


def test_without_masks_negative_zeros_become_positive():
    model = sparse_model()
    name = next(iter(block_linears(model))) + ".weight"
    weight = model.get_parameter(name)
    zero = weight == 0
    weight.data[zero] = -0.0
    train(model, tiny_tokens(8, LENGTH), [SPPPolicy(anatomy_of(model.config), 4)], SETTINGS)
    assert is_positive_zero(weight.detach()[zero])


def test_resumes_to_the_bit(tmp_path):
    class Stop(Exception):
        pass

    def start(folder, on_event=None):
        model = sparse_model()
        policies = [Distillation(tiny_model("llama", seed=1)), SPPPolicy(anatomy_of(model.config), 4)]
        return model, train(model, tiny_tokens(10, LENGTH), policies, SETTINGS, state_dir=folder, on_event=on_event)

    def stop(event):
        if event["step"] == 7:
            raise Stop

    with pytest.raises(Stop):
        start(tmp_path, stop)
    events = []
    (model, result), (whole, expected) = start(tmp_path, events.append), start(None)
    assert "resumed" in events[0] and events[0]["step"] == 6
    assert result.losses == expected.losses
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    for name, value in expected.edits[0].values.items():
        assert torch.equal(value, result.edits[0].values[name]), name


# --- recipes


def make_content(tmp_path: Path, method: str = "wanda", **changes: Any) -> dict[str, Any]:
    content = yaml.safe_load(make_recipe(tmp_path).read_text())
    common = {key: value for key, value in content["stages"][1].items() if key not in ("mean_rank", "learning_rate")}
    content["stages"] = [
        {"stage": "sparsify", "method": method, "pattern": "2:4"},
        {**common, "method": "spp", "distill": 1.0, **changes},
    ]
    return content


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_run_keeps_the_masks_of_its_first_stage(method, tmp_path):
    recipe = parse_recipe(make_content(tmp_path, method))
    assert recipe.recover.model_dump().items() >= {"learning_rate": 4e-3, "rank": 16, "scale": 2.0}.items()
    metrics = run(recipe, tmp_path / "out")
    assert metrics["recovered"]["perplexity"] < metrics["pruned"]["perplexity"]
    assert metrics["recovered"]["parameters"] == metrics["dense"]["parameters"]
    content = make_content(tmp_path, method)
    run(parse_recipe({**content, "stages": content["stages"][:1]}), tmp_path / "one-shot")
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("one-shot", "out"))
    for path in block_linears(one):
        pruned, trained = (model.get_submodule(path).weight.detach() for model in (one, two))
        assert torch.equal(pruned != 0, trained != 0) and is_positive_zero(trained[pruned == 0])
        # factors of what was there, so nothing came from the dense model
        assert (trained / pruned)[pruned != 0].sub(1).abs().max() < 0.5
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in event for event in steps) == 6


def test_a_run_in_half_precision(tmp_path):
    metrics = run(parse_recipe({**make_content(tmp_path), "dtype": "bfloat16"}), tmp_path / "out")
    assert metrics["recovered"]["perplexity"] < metrics["pruned"]["perplexity"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype="auto")
    for linear in block_linears(model).values():
        assert linear.weight.dtype == torch.bfloat16 and ((linear.weight != 0).float().mean() == 0.5)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rank": 0}, "rank = 0: must be greater than or equal to 1"),
        ({"scale": 0}, "scale = 0: must be greater than 0"),
        ({"learning_rate": 0}, "learning_rate = 0: must be greater than 0"),
    ],
)
def test_settings_that_make_no_sense(changes, what):
    with pytest.raises(RecipeError, match=what):
        parse_recipe(changes, kind=SPP)


def test_where_it_may_stand(tmp_path):
    content = make_content(tmp_path)
    sparsify, recover = content["stages"]
    prune = {"stage": "prune", "method": "cfsp", "sparsity": 0.3}
    for stages, what in (
        ([prune, recover], "after prune, recover.method must be lora or full$"),
        ([sparsify, {**recover, "method": "full"}], "after sparsify, recover.method must be ast or spp, which keep to"),
        ([sparsify, {**recover, "rnk": 8}], "recover.rnk: unknown key; did you mean rank?"),
        ([sparsify, {**recover, "method": "sp"}], "must be one of lora, full, ast, spp; did you mean spp?"),
    ):
        with pytest.raises(RecipeError, match=what):
            parse_recipe({**content, "stages": stages})


# --- bad input


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ranks_that_do_not_divide_the_outputs(family):
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    numbers = {linear.weight.shape[isinstance(linear, Conv1D)] for linear in block_linears(model).values()}
    for rank in (0, 7, 32):
        with pytest.raises(ShearlingError) as caught:
            train(model, tiny_tokens(8, LENGTH), [SPPPolicy(anatomy_of(model.config), rank)], SETTINGS)
        (line,) = str(caught.value).splitlines()
        path, _, message = line.partition(": ")
        outputs = model.get_submodule(path).weight.shape[family == "gpt2"]
        assert message == f"rank = {rank} must divide its {outputs} outputs; all linears take the divisors of 16"
        assert all(number % 16 == 0 for number in numbers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, EffectiveLinear) for module in model.modules())
