"""AST and its relatives: the update, the masks, and what training with them leaves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from shearling.anatomy import anatomy_of
from shearling.errors import RecipeError, ShearlingError
from shearling.export import save_model
from shearling.methods import ast as methods_ast
from shearling.methods.ast import AnnealedAdamW, ASTPolicy, Strength, annealed, annealed_adam_, unmask_
from shearling.models import load_model
from shearling.nn import EffectiveLinear, SoftThreshold, StraightMask
from shearling.plan import Delta, Masks
from shearling.plan.patterns import Pattern
from shearling.recipe import AST, parse_recipe
from shearling.surgery import attach_adapters_, cut_
from shearling.train import Distillation, TrainSettings, train
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer, tiny_tokens

TWO_OF_FOUR = Pattern(2, 4)
LENGTH = 12
SETTINGS = TrainSettings(
    tokens=12 * 4 * LENGTH, length=LENGTH, batch=4, micro_batch=2, learning_rate=1e-2, log_every=1, checkpoint_every=1
)


def own(**changes):
    content = {"refresh_every": 2, "decay": 1e-3, "score": "magnitude", **changes}
    if not content["refresh_every"]:
        del content["score"]
    return AST(**content)


def moments(weight):
    return torch.zeros_like(weight), torch.zeros_like(weight)


# --- the update


@pytest.mark.parametrize("second_moment", ["ast", "adam"])
def test_without_a_gradient_masked_weights_shrink_and_kept_ones_stay(second_moment):
    weight = torch.tensor([0.1, 1.0, -0.1], dtype=torch.float64)
    first, second = moments(weight)
    mask = torch.tensor([False, True, False])
    for step in range(1, 51):
        before = weight.clone()
        strength = Strength(1e-3, 1e-4, second_moment=second_moment)
        annealed_adam_(weight, torch.zeros_like(weight), first, second, mask, step, strength)
        assert weight[1] == 1.0 and 0 <= weight[0] <= before[0] and weight[2] == -weight[0]
    # what the reference's rule gives with a bool mask, where its release grows both
    assert weight[0].item() == pytest.approx(0.034, abs=5e-4) if second_moment == "ast" else weight[0] == 0


def test_the_update_by_hand():
    """First step of the paper's form, in numbers."""
    weight, gradient = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.2, 0.2], dtype=torch.float64)
    first, second = moments(weight)
    strength = Strength(0.01, 0.1, second_moment="ast", weight_decay=0.1, betas=(0.9, 0.95), eps=0.0)
    annealed_adam_(weight, gradient, first, second, torch.tensor([False, True]), 1, strength)
    shrunk = 0.5 * (1 - 0.01 * 0.1)
    # m1 = 0.1 g; u = m1 + lam W where masked; m2 = 0.05 u^2, and its correction takes 0.05 away again
    u = torch.tensor([0.02 + 0.1 * shrunk, 0.02])
    expected = [shrunk - 0.01 / 0.1 * u[n].item() / u[n].item() for n in range(2)]
    assert weight.tolist() == pytest.approx(expected, abs=1e-7)
    assert first.tolist() == pytest.approx([0.02, 0.02]) and second.tolist() == pytest.approx((0.05 * u**2).tolist())


@pytest.mark.parametrize(("how", "decay"), [("decoupled", 0.0), ("coupled", 0.3), ("coupled", 0.0), ("l1", 0.0)])
def test_relatives_equal_adam_with_the_gradient_they_name(how, decay):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    mask = TWO_OF_FOUR.mask(weight.abs())
    reference = nn.Parameter(weight.clone())
    adam = torch.optim.AdamW([reference], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    first, second = moments(weight)
    for step in range(1, 8):
        gradient = torch.randn(6, 8, generator=generator, dtype=torch.float64)
        shrunk = reference.detach() * (1 - 0.01 * 0.1)
        reference.grad = gradient + decay * shrunk * ~mask
        adam.step()
        annealed_adam_(weight, gradient, first, second, mask, step, Strength(0.01, decay, how, weight_decay=0.1))
        torch.testing.assert_close(weight, reference.detach(), rtol=1e-10, atol=1e-12)


def test_l1_takes_masked_weights_to_zero_and_no_further():
    weight = torch.tensor([0.05, -0.05, 0.4, 0.4], dtype=torch.float64)
    first, second = moments(weight)
    mask = torch.tensor([False, False, False, True])
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 41):
        # noise without a mean moves nothing far at this rate
        gradient = 1e-12 * torch.randn(4, generator=generator, dtype=torch.float64)
        second.fill_(1.0)
        annealed_adam_(weight, gradient, first, second, mask, step, Strength(1e-3, 5.0, "l1"))
    assert weight[0].abs() < 1e-9 and weight[1].abs() < 1e-9
    # the same distance at every step, however large the weight
    assert 0.1 < weight[2] < 0.35 and weight[3] == pytest.approx(0.4, abs=1e-6)


@pytest.mark.parametrize(
    ("moved", "masks_alone", "back"), [(False, False, True), (True, False, False), (True, True, True)]
)
def test_what_goes_back_to_the_dense_weights(moved, masks_alone, back):
    name = "model.layers.0.mlp.up_proj.weight"
    dense, model = tiny_model("llama"), tiny_model("llama")
    model.load_state_dict(dense.state_dict())
    weight = dense.get_parameter(name).detach()
    edits = [Masks({name: TWO_OF_FOUR.mask(weight.abs())}, "2:4")]
    if moved:
        edits.insert(0, Delta({name: weight * 1.5}))
    cut_(model, edits)
    cut = model.get_parameter(name).detach().clone()
    assert (cut == 0).sum() == cut.numel() / 2
    unmask_(model, dense, edits, masks_alone=masks_alone)
    assert torch.equal(model.get_parameter(name), weight if back else cut)


def test_decay_is_annealed():
    table = [annealed(step, 40, 8e-5, 0.25) for step in (0, 1, 5, 10, 11, 39)]
    assert table == pytest.approx([0, 8e-6, 4e-5, 8e-5, 8e-5, 8e-5])
    assert annealed(0, 40, 8e-5, 0.0) == 8e-5


# --- transforms


def test_the_gradient_reaches_masked_weights():
    weight = torch.randn(4, 8, requires_grad=True)
    mask = TWO_OF_FOUR.mask(weight.detach().abs())
    factor = torch.randn(4, 8)
    (StraightMask(mask)(weight) * factor).sum().backward()
    assert torch.equal(weight.grad, factor)
    assert not torch.signbit(StraightMask(mask)(-weight.abs())[~mask]).any()


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2)]), st.booleans())
def test_soft_threshold_keeps_the_greatest_less_the_next(seed, numbers, transposed):
    keep, of = numbers
    rows = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight = (rows.T.contiguous() if transposed else rows).requires_grad_()
    transform = SoftThreshold(weight, torch.ones_like(weight).bool(), keep, of, transposed)
    soft = transform(weight)
    found = (soft.T if transposed else soft).detach()
    expected = torch.zeros_like(rows)
    for row in range(5):
        for start in range(0, 16, of):
            group = rows[row, start : start + of].abs()
            order = group.argsort(descending=True)
            for index in order[:keep].tolist():
                size = group[index] - group[order[keep]]
                expected[row, start + index] = size * rows[row, start + index].sign()
    scale = (rows * expected).sum() / expected.square().sum()
    torch.testing.assert_close(found, scale * expected)
    assert not torch.signbit(found[found == 0]).any()
    soft.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


# --- masks in training


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"score": "activation-refreshed", "freeze": 0.5},
        {"forward": "soft", "decay": 0},
        {"refresh_every": 0, "decay_by": "coupled"},
        {"quantise": "int4", "group": 8},
        {"quantise": "float8_e4m3", "score": "activation-refreshed"},
    ],
    ids=str,
)
def test_training_ends_in_a_stock_model_with_exact_zeros(family, changes, tmp_path):
    model = tiny_model(family)
    names = set(model.state_dict())
    policy = ASTPolicy(anatomy_of(model.config), TWO_OF_FOUR, own(**changes))
    seen = {}

    class Watch(type(policy)):
        """Remembers what the training model says just before the end."""

        def finalize(self):
            with torch.no_grad():
                seen["logits"] = self._model.eval()(tiny_tokens(2, LENGTH)).logits
            return super().finalize()

    policy.__class__ = Watch
    result = train(model, tiny_tokens(10, LENGTH), [policy], SETTINGS)
    (edit,) = result.edits
    assert edit.pattern == "2:4" and set(model.state_dict()) == names
    assert not any(isinstance(module, EffectiveLinear) for module in model.modules())
    assert len(edit.kept) == 3 * len(anatomy_of(model.config).family.linears)
    for name, mask in edit.kept.items():
        weight = model.get_parameter(name).detach()
        stored = isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D)
        rows, kept = (weight.T, mask.T) if stored else (weight, mask)
        assert (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()
        assert not rows[~kept].any() and not torch.signbit(rows[~kept]).any()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tiny_tokens(2, LENGTH)).logits, seen["logits"], rtol=1e-5, atol=1e-5)
    refreshes = [refresh.step for refresh in policy.refreshes]
    assert refreshes == (
        [] if "refresh_every" in changes else [2, 4, 6] if "freeze" in changes else [2, 4, 6, 8, 10, 12]
    )


def test_masks_and_flip_rates_follow_the_weights():
    """Weights are set from outside: the mask is that of topk, and the rates are counted by hand."""
    model = tiny_model("llama")
    policy = ASTPolicy(anatomy_of(model.config), TWO_OF_FOUR, own(refresh_every=1, decay=0.01))
    generator = torch.Generator().manual_seed(1)
    states = []

    class Moving(type(policy)):
        def after_step(self, ctx):
            before = {name: mask.clone() for name, mask in self._masks().items()}
            for linear in self._linears.values():
                linear.weight.data.add_(0.3 * torch.randn(linear.weight.shape, generator=generator))
            gone = [(~before[name], linear.weight, self._optimizer.state[linear.weight]["exp_avg"])
                    for name, linear in self._linears.items()]  # fmt: skip
            pull, mean = (sum(pair[n][pair[0]].double().abs().sum().item() for pair in gone) for n in (1, 2))
            super().after_step(ctx)
            assert ctx.metrics["decay_ratio"] == pytest.approx(ctx.metrics["decay"] * pull / mean, rel=1e-5)
            states.append((before, {name: mask.clone() for name, mask in self._masks().items()}, dict(ctx.metrics)))

    policy.__class__ = Moving
    train(model, tiny_tokens(10, LENGTH), [policy], dataclasses.replace(SETTINGS, tokens=3 * 4 * LENGTH))
    start = states[0][0]
    for before, after, metrics in states:
        total = sum(mask.numel() for mask in after.values())
        moved = sum((after[name] != before[name]).sum().item() for name in after)
        away = sum((after[name] != start[name]).sum().item() for name in after)
        assert metrics["flip_rate"] == pytest.approx(moved / total) and metrics["flip_rate"] > 0
        assert metrics["flips_from_start"] == pytest.approx(away / total)


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_masks_equal_topk(seed, tied):
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    weight = weight.mul(2).round() if tied else weight
    mask = TWO_OF_FOUR.mask(weight.abs())
    groups, kept = weight.abs().unflatten(1, (-1, 4)), mask.unflatten(1, (-1, 4))
    greatest = groups.topk(2, -1).values.sum(-1)
    assert torch.equal((groups * kept).sum(-1), greatest) and (kept.sum(-1) == 2).all()


def test_decay_shrinks_what_is_masked_and_frees_what_gradients_ask_for():
    """Against the gradient of a fixed problem: a weight that matters comes back, decay alone forgets it."""

    def masked_size(decay):
        model = tiny_model("llama")
        policy = ASTPolicy(anatomy_of(model.config), TWO_OF_FOUR, own(decay=decay, anneal=0.0, refresh_every=0))
        sizes = []

        class Sizes(type(policy)):
            def finalize(self):
                pairs = zip(self._linears.values(), self._masks().values(), strict=True)
                sizes.append(sum(linear.weight[~mask].abs().sum().item() for linear, mask in pairs))
                return super().finalize()

        policy.__class__ = Sizes
        train(model, tiny_tokens(10, LENGTH), [policy], dataclasses.replace(SETTINGS, learning_rate=1e-4))
        return sizes[0]

    assert masked_size(10.0) < masked_size(1.0) < masked_size(0.0)


def test_starting_masks_are_those_given_and_what_is_masked_may_come_back():
    model, anatomy = tiny_model("llama"), anatomy_of(tiny_model("llama").config)
    # the least important weights stay at first
    masks = {
        name: ~TWO_OF_FOUR.mask(parameter.detach().abs())
        for name, parameter in model.named_parameters()
        if any(name.endswith(f"{linear}.weight") for linear in anatomy.family.linears)
    }
    policy = ASTPolicy(anatomy, TWO_OF_FOUR, own(refresh_every=4, decay=0), masks)
    train(model, tiny_tokens(10, LENGTH), [policy], dataclasses.replace(SETTINGS, learning_rate=1e-5))
    # the first refresh turns nearly everything round
    first, second, *_, last = policy.refreshes
    assert first.flip_rate > 0.9 and second.flip_rate < 0.05 and last.flips_from_start > 0.9


@pytest.mark.parametrize(
    "changes",
    [{}, {"score": "activation-refreshed"}, {"slorb": {"size": 8}, "quantise": "int4", "group": 8}],
    ids=str,
)
def test_resumes_to_the_bit(changes, tmp_path):
    class Stop(Exception):
        pass

    def start(folder, on_event=None):
        model = tiny_model("llama")
        policy = ASTPolicy(anatomy_of(model.config), TWO_OF_FOUR, own(**changes))
        policies = [Distillation(tiny_model("llama", seed=1)), policy]
        result = train(model, tiny_tokens(10, LENGTH), policies, SETTINGS, state_dir=folder, on_event=on_event)
        return model, policy, result

    def stop(event):
        if event["step"] == 7:
            raise Stop

    with pytest.raises(Stop):
        start(tmp_path, stop)
    (model, policy, result), (whole, other, expected) = start(tmp_path), start(None)
    assert result.losses == expected.losses and policy.refreshes == other.refreshes and len(policy.refreshes) == 6
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    for one, other_edit in zip(expected.edits, result.edits, strict=True):
        for name, tensor in one.tensors().items():
            assert torch.equal(tensor, other_edit.tensors()[name]), name


def test_activation_scores_use_the_norms_given():
    model = tiny_model("llama")
    anatomy = anatomy_of(model.config)
    norms = {
        name: torch.rand(parameter.shape[1]) + 0.01
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2
    }
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    policy = ASTPolicy(anatomy, TWO_OF_FOUR, own(score="activation", refresh_every=12, decay=0), norms=norms)
    train(model, tiny_tokens(10, LENGTH), [policy], dataclasses.replace(SETTINGS, learning_rate=1e-9))
    for name in policy._start:
        assert torch.equal(policy._start[name], TWO_OF_FOUR.mask(dense[name].abs() * norms[name]))
    with pytest.raises(ShearlingError, match="need the norms of the linears' inputs"):
        ASTPolicy(anatomy, TWO_OF_FOUR, own(score="activation"))


def test_the_optimizer_skips_weights_without_a_gradient():
    weights = [nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(2, 4))]
    optimizer = AnnealedAdamW(weights, [torch.ones(2, 4).bool()] * 2, Strength(0.1, 0.0))
    weights[0].grad = torch.ones(2, 4)
    optimizer.step()
    assert (weights[0] < 1).all() and (weights[1] == 1).all()


def test_the_state_has_the_names_of_adams_and_goes_on_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(2, 4, generator=generator) for _ in range(3)]
    gradients = torch.randn(6, 3, 2, 4, generator=generator)

    def made(weights):
        return AnnealedAdamW([nn.Parameter(w.clone()) for w in weights], [w > 0 for w in start], Strength(0.1, 0.5))

    def carry_on(optimizer, steps):
        weights = optimizer.param_groups[0]["params"]
        for step in steps:
            for index, weight in enumerate(weights):
                # the second has none in the first two steps, the third never
                skipped = index == 2 or (index == 1 and step < 2)
                weight.grad = None if skipped else gradients[step, index].clone()
            optimizer.step()
        return weights

    whole = made(start)
    expected = carry_on(whole, range(6))
    first = made(start)
    half = carry_on(first, range(3))
    state = first.state_dict()
    assert [{name: t.shape for name, t in state["state"][index].items()} for index in (0, 1)] == [
        {"exp_avg": (2, 4), "exp_avg_sq": (2, 4), "step": ()}
    ] * 2
    assert [state["state"][index]["step"].item() for index in (0, 1)] == [3, 1] and 2 not in state["state"]
    second = made([w.detach() for w in half])
    second.load_state_dict(state)
    for one, other in zip(carry_on(second, range(3, 6)), expected, strict=True):
        assert torch.equal(one, other)
    assert second.state_dict()["state"][1]["step"] == 4


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        (TWO_OF_FOUR, {}),
        (Pattern(1, 16), {}),
        (0.5, {"score": "activation"}),
        (TWO_OF_FOUR, {"score": "activation-refreshed", "decay_by": "l1"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masks_are_those_of_each_weight_alone(family, pattern, changes, monkeypatch):
    """Some weights at a time, with ties: the lower index stays, as counted weight by weight in Python."""
    monkeypatch.setattr(methods_ast, "_AT_ONCE", 4000)
    model = tiny_model(family)
    linears = anatomy_of(model.config).family.linears
    names = [n for n, p in model.named_parameters() if p.ndim == 2 and any(f".{each}." in n for each in linears)]
    stored = isinstance(model.get_submodule(names[0].removesuffix(".weight")), Conv1D)
    norms = {n: 1.0 + torch.arange(model.get_parameter(n).shape[0 if stored else 1]) % 3 for n in names}
    policy = ASTPolicy(anatomy_of(model.config), pattern, own(refresh_every=1, **changes), norms=norms)
    checked = []

    class Tied(type(policy)):
        def after_step(self, ctx):
            for linear in self._linears.values():
                linear.weight.data.mul_(40).round_()
            if changes.get("score") == "activation-refreshed":
                # running means move on in the step
                self._remember()
                self._remember = lambda: None
            super().after_step(ctx)
            vars(self).pop("_remember", None)
            for name, linear in self._linears.items():
                score = (linear.weight.T if linear.transposed else linear.weight).detach().abs()
                if changes.get("score") == "activation":
                    score = score * norms[name]
                elif "score" in changes:
                    score = score * linear.input_squares.sqrt()
                mask = self._masks()[name]
                for row, kept in zip(score.tolist(), (mask.T if linear.transposed else mask).tolist(), strict=True):
                    of = pattern.of if isinstance(pattern, Pattern) else len(row)
                    keep = pattern.keep if isinstance(pattern, Pattern) else len(row) - round(pattern * len(row))
                    for at in range(0, len(row), of):
                        group = range(at, at + of)
                        best = sorted(group, key=lambda index: (-row[index], index))[:keep]
                        assert [index for index in group if kept[index]] == sorted(best)
            checked.append(len(list(self._alike())))

    policy.__class__ = Tied
    train(model, tiny_tokens(10, LENGTH), [policy], dataclasses.replace(SETTINGS, tokens=2 * 4 * LENGTH))
    assert len(checked) == 2 and 1 < checked[0] < len(names)
    assert all(refresh.decay_ratio > 0 for refresh in policy.refreshes[1:])


# --- SLoRB


def slorb_policy(model, start="block-mean"):
    norms = {name: 1.0 + torch.arange(p.shape[-1]) for name, p in model.named_parameters() if p.ndim == 2}
    settings = own(slorb={"start": start, "size": 4})
    return ASTPolicy(anatomy_of(model.config), TWO_OF_FOUR, settings, norms=norms)


@pytest.mark.parametrize("start", ["block-mean", "svd", "activation-svd"])
def test_branches_stay_beside_the_zeros(start, tmp_path):
    model, ids = tiny_model("llama"), tiny_tokens(2, LENGTH)
    policy, seen = slorb_policy(model, start), {}

    class Watch(type(policy)):
        def finalize(self):
            with torch.no_grad():
                seen["logits"] = self._model.eval()(ids).logits
            return super().finalize()

    policy.__class__ = Watch
    result = train(model, tiny_tokens(10, LENGTH), [policy], SETTINGS)
    masks, adapters = result.edits
    for name, mask in masks.kept.items():
        assert not model.get_parameter(name)[~mask].any()
        assert adapters.up[name.removesuffix(".weight")].shape[1] == mask.shape[1] // 4
    attach_adapters_(model, adapters)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, seen["logits"])
        save_model(model, tiny_tokenizer(), tmp_path / "model", provenance={})
        torch.testing.assert_close(load_model(str(tmp_path / "model"))(ids).logits, seen["logits"])


def test_a_branch_starts_from_what_the_mask_takes_and_its_reading_factor_may_stay():
    model = tiny_model("llama")
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    policy = slorb_policy(model)
    settings = own(slorb={"start": "block-mean", "size": 4, "train_down": False})
    policy.settings, starts = settings, {}

    class Watch(type(policy)):
        def param_groups(self):
            starts.update({name: linear.branches[0].up.detach().clone() for name, linear in self._linears.items()})
            return super().param_groups()

    policy.__class__ = Watch
    _, adapters = train(model, tiny_tokens(10, LENGTH), [policy], SETTINGS).edits
    for name, up in starts.items():
        gone = dense[name].masked_fill(policy._start[name], 0.0)
        torch.testing.assert_close(up, gone.unflatten(1, (-1, 4)).mean(-1))
        path = name.removesuffix(".weight")
        assert not torch.equal(adapters.up[path], up)
        assert torch.equal(adapters.down[path], torch.eye(up.shape[1]).repeat_interleave(4, 1))


# --- bad input


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"slorb": {"size": 5}}, "self_attn.q_proj: slorb.size = 5 must divide its 32 inputs"),
        ({"slorb": {"size": 1}}, "give a rank of 1 to 16"),
        ({"quantise": "int4", "group": 12}, "12"),
    ],
)
def test_branches_and_grids_that_do_not_fit(changes, what):
    model = tiny_model("llama")
    with pytest.raises(ShearlingError, match=what):
        train(
            model, tiny_tokens(10, LENGTH), [ASTPolicy(anatomy_of(model.config), TWO_OF_FOUR, own(**changes))], SETTINGS
        )
    assert not any(isinstance(module, EffectiveLinear) for module in model.modules())


def test_inputs_that_the_pattern_does_not_divide(tmp_path):
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ShearlingError, match="32 inputs are no multiple of 5"):
        train(model, tiny_tokens(10, LENGTH), [ASTPolicy(anatomy_of(model.config), Pattern(2, 5), own())], SETTINGS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, EffectiveLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"refresh_every": 0, "freeze": 0.2}, "refresh_every = 0 keeps the masks of the start; leave freeze"),
        ({"forward": "soft"}, "it needs decay = 0"),
        ({"freeze": 1.0}, "less than 1"),
        ({"group": 8}, "group needs quantise"),
        ({"slorb": {"start": "sum"}}, "'block-mean', 'svd' or 'activation-svd'"),
        ({"decay_by": "l2"}, "'decoupled', 'coupled' or 'l1'"),
    ],
)
def test_settings_that_make_no_sense(changes, what):
    with pytest.raises(RecipeError, match=what):
        parse_recipe(changes, kind=AST)
