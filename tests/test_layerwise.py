"""Layerwise distillation, and a teacher that several policies share."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shearling.anatomy import anatomy_of
from shearling.errors import ShearlingError
from shearling.methods.ig_lora import LoRAPolicy
from shearling.train import (
    Distillation,
    LayerwiseDistillation,
    Policy,
    Teacher,
    TrainSettings,
    cache_teacher,
    offloaded,
    train,
)
from shearling.train.head import blocks_of
from shearling.train.layerwise import even_pairs, projection_start, relative_error
from tests.tiny import tiny_model, tiny_tokens

LENGTH = 12
SETTINGS = TrainSettings(
    tokens=6 * 4 * LENGTH, length=LENGTH, batch=4, micro_batch=3, learning_rate=1e-2, log_every=1, cross_entropy=0.0
)
DEEPER = {"num_hidden_layers": 5}


def some_windows():
    return tiny_tokens(10, LENGTH, seed=5)


def states_after_blocks(model, ids):
    """As transformers itself tells them, the final norm taken away so that the last ones are told raw."""
    model.model.norm = nn.Identity()
    return model.model(ids, output_hidden_states=True).hidden_states[1:]


class Gradients(Policy):
    """Keeps the gradients of the first step."""

    def after_backward(self, ctx):
        self.found = {name: p.grad.clone() for name, p in ctx.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layers", [None, [(0, 0)], [(1, 4), (2, 0), (0, 4)]])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_loss_and_gradient_equal_the_formula_in_float64(family, layers):
    windows, pairs = some_windows()[:4], layers or [(0, 1), (1, 3), (2, 4)]
    settings = dataclasses.replace(SETTINGS, micro_batch=2, tokens=4 * LENGTH, clip=None)
    teacher, gradients = tiny_model(family, seed=1, **DEEPER), Gradients()
    result = train(
        tiny_model(family), windows, [LayerwiseDistillation(teacher, 0.7, layers), gradients], settings
    )  # fmt: skip
    exact = tiny_model(family).double()
    with torch.no_grad():
        taught = states_after_blocks(tiny_model(family, seed=1, **DEEPER).double(), windows)
    own = states_after_blocks(exact, windows)
    error = torch.stack([((own[i] - taught[j]) ** 2).mean(-1) / (taught[j] ** 2).mean(-1) for i, j in pairs]).mean()
    (0.7 * error).backward()
    assert result.losses[0] == pytest.approx(0.7 * error.item(), rel=1e-5)
    wanted = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    for name, gradient in wanted.items():
        assert (gradients.found[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-9, name


class Projection(Gradients):
    """Keeps the projection of another policy as it is at the first step, and its gradient."""

    def __init__(self, policy):
        self.policy = policy

    def after_backward(self, ctx):
        super().after_backward(ctx)
        projection = self.policy.projection
        self.start, self.slope = projection.detach().clone(), projection.grad.clone()


@pytest.mark.parametrize("kept", [None, tuple(range(1, 64, 2))])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_projected_loss_and_gradients_equal_the_formula_in_float64(family, kept):
    wider = {"hidden_size": 64, **({"word_embed_proj_dim": 64} if family == "opt" else {}), **DEEPER}
    windows, pairs = some_windows()[:4], [(0, 1), (1, 3), (2, 4)]
    # one micro-batch, whose gradient in float32 is the batch's
    settings = dataclasses.replace(SETTINGS, micro_batch=4, tokens=4 * LENGTH, clip=None)
    policy = LayerwiseDistillation(tiny_model(family, seed=1, **wider), 0.7, kept=kept)
    seen = Projection(policy)
    result = train(tiny_model(family), windows, [policy, seen], settings)

    def states(model):
        found = []
        for block in blocks_of(model):
            block.register_forward_hook(lambda module, args, out: found.append(out))
        model.base_model(windows)
        return found

    exact = tiny_model(family).double()
    with torch.no_grad():
        taught = states(tiny_model(family, seed=1, **wider).double())
    own, projection = states(exact), seen.start.double().requires_grad_()
    error = torch.stack(
        [((own[i] @ projection.T - taught[j]) ** 2).sum(-1) / (taught[j] ** 2).sum(-1) for i, j in pairs]
    ).mean()
    (0.7 * error).backward()
    assert result.losses[0] == pytest.approx(0.7 * error.item(), rel=1e-5)
    wanted = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    for name, gradient in wanted.items():
        assert (seen.found[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-9, name
    assert (seen.slope - projection.grad).norm() <= 2e-5 * projection.grad.norm()
    if kept is None:
        torch.testing.assert_close(seen.start.T @ seen.start, torch.eye(32), rtol=0, atol=1e-5)
    else:
        assert torch.equal(seen.start, torch.eye(64)[:, list(kept)])


def test_a_narrower_teacher_starts_from_orthonormal_rows():
    start = projection_start(32, 24)
    torch.testing.assert_close(start @ start.T, torch.eye(24), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_a_projection_is_trained_beside_what_else_is_and_dropped(lora):
    model, teacher = tiny_model("llama"), tiny_model("llama", seed=1, hidden_size=48)
    before = {name: p.clone() for name, p in model.named_parameters()}
    classes = [(name, type(module)) for name, module in model.named_modules()]
    policy = LayerwiseDistillation(teacher)

    class Watch(Policy):
        def __init__(self):
            self.starts = []

        def begin_step(self, step, rng):
            self.starts.append(policy.projection.detach().clone())

    watch = Watch()
    policies = [policy, watch, *([LoRAPolicy(anatomy_of(model.config), [2, 3, 4])] if lora else [])]
    result = train(model, some_windows(), policies, SETTINGS)
    assert result.losses[-1] < 0.9 * result.losses[0]
    assert all(not torch.equal(one, two) for one, two in pairwise(watch.starts))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    blocks = {name for name in before if "layers" in name}
    # without other policies everything that the loss reaches is trained, as in a run without a projection
    assert moved == ({name for name in blocks if "proj" in name} if lora else blocks | {"model.embed_tokens.weight"})
    assert policy.projection is None and classes == [(name, type(module)) for name, module in model.named_modules()]
    for module in (*model.modules(), *teacher.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_a_projected_run_resumes_to_the_bit(micro_batch, tmp_path):
    settings = dataclasses.replace(SETTINGS, checkpoint_every=2, micro_batch=micro_batch, weight_decay=0.1)

    class Stop(Exception):
        pass

    def start(folder, at=None):
        def stop(event):
            if event["step"] == at:
                raise Stop

        model, policy = tiny_model("llama"), LayerwiseDistillation(tiny_model("llama", seed=1, hidden_size=48))
        result = train(model, some_windows(), [policy], settings, state_dir=folder, on_event=stop)
        return result.losses, model.state_dict()

    losses, tensors = start(None)
    with pytest.raises(Stop):
        start(tmp_path, 4)
    again, other = start(tmp_path)
    assert losses == again and all(torch.equal(tensor, other[name]) for name, tensor in tensors.items())


def test_relative_error_by_hand():
    states, target = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 5.0], [2.0, 0.0]])
    assert relative_error(states, target).item() == pytest.approx((10 / 25 + 1 / 4) / 2)
    # scale does not matter, and half precision is not summed in half precision
    assert relative_error(states * 300, (target * 300).bfloat16()).item() == pytest.approx(0.325, rel=1e-2)


@given(num=st.integers(1, 100), taught=st.integers(1, 100))
def test_even_pairs_keep_order_share_and_ends(num, taught):
    pairs = even_pairs(num, taught)
    assert [mine for mine, _ in pairs] == list(range(num)) and pairs[-1] == (num - 1, taught - 1)
    others = [theirs for _, theirs in pairs]
    assert others == sorted(others) and min(others) >= 0
    for mine, theirs in pairs:
        # less than a block away from the same share of the depth
        assert 0 <= Fraction(theirs + 1, taught) - Fraction(mine + 1, num) < Fraction(1, taught)
    if num == taught:
        assert all(mine == theirs for mine, theirs in pairs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_copy_as_teacher_gives_no_loss(family):
    options = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if family == "gpt2" else {}
    model, teacher = (tiny_model(family, **options) for _ in range(2))
    settings = dataclasses.replace(SETTINGS, tokens=4 * LENGTH)
    assert train(model, some_windows(), [LayerwiseDistillation(teacher)], settings).losses[0] < 1e-9


@pytest.mark.parametrize("lora", [False, True])
def test_recomputing_changes_no_bit(lora):
    def start(recompute):
        model = tiny_model("llama")
        policies = [LayerwiseDistillation(tiny_model("llama", seed=1))]
        if lora:
            policies.append(LoRAPolicy(anatomy_of(model.config), [2, 3, 4]))
        settings = dataclasses.replace(SETTINGS, recompute=recompute)
        return train(model, some_windows(), policies, settings).losses, model.state_dict()

    (losses, tensors), (again, other) = start(False), start(True)
    assert losses == again and losses[-1] < losses[0]
    assert all(torch.equal(tensor, other[name]) for name, tensor in tensors.items())


def counted(teacher):
    calls = []
    teacher.base_model.register_forward_pre_hook(lambda module, args: calls.append(1))
    return calls


@pytest.mark.parametrize("away", [False, True])
def test_a_shared_teacher_runs_once_and_changes_nothing(away):
    def start(shared):
        teacher = tiny_model("llama", seed=1)
        calls = counted(teacher)
        followed = Teacher(teacher) if shared else teacher
        policies = [Distillation(followed, weight=0.5), LayerwiseDistillation(followed, 0.3)]
        if away and shared:
            with offloaded(teacher, "cpu"):
                return train(tiny_model("llama"), some_windows(), policies, SETTINGS).losses, len(calls), followed
        return train(tiny_model("llama"), some_windows(), policies, SETTINGS).losses, len(calls), followed

    (losses, calls, teacher), (expected, twice, _) = start(True), start(False)
    assert losses == expected and calls == 6 * 2 and twice == 2 * calls
    # nothing is left behind: a second training follows as the first did
    assert (teacher._users, teacher._taught, teacher._ids, teacher._blocks) == (0, None, None, set())


def test_models_are_left_without_hooks():
    model, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
    train(model, some_windows(), [LayerwiseDistillation(teacher)], SETTINGS, validation=some_windows()[:2])
    for module in (*model.modules(), *teacher.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks


class Memory(Policy):
    """Runs out of memory where more than two windows come at a time, before or after the teacher has run."""

    def loss_terms(self, ctx):
        if len(ctx.input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_micro_batch_given_up_leaves_nothing_behind(place):
    def start(micro_batch, more):
        teacher = Teacher(tiny_model("llama", seed=1))
        policies = [Distillation(teacher), LayerwiseDistillation(teacher)]
        policies[place:place] = more
        settings = dataclasses.replace(SETTINGS, micro_batch=micro_batch)
        return train(tiny_model("llama"), some_windows(), policies, settings).losses

    assert start(4, [Memory()]) == start(2, [])


def test_unusable_teachers_and_layers_are_named(tmp_path):
    model, teacher = tiny_model("llama"), tiny_model("llama", seed=1)

    def start(*args):
        train(model, some_windows(), [LayerwiseDistillation(*args)], SETTINGS)

    for kept in (range(31), range(33, 65), [0] * 32):
        policy = LayerwiseDistillation(tiny_model("llama", hidden_size=64), kept=kept)
        with pytest.raises(ShearlingError, match=r"^kept: must be 32 of the teacher's hidden dimensions 0 to 63, each"):
            train(model, some_windows(), [policy], SETTINGS)
    with pytest.raises(ShearlingError, match=r"layers \(0, 3\): the model has blocks 0 to 2, the teacher 0 to 2"):
        start(teacher, 1.0, [(0, 3)])
    with pytest.raises(ShearlingError, match=r"layers \(-1, 0\)"):
        start(teacher, 1.0, [(-1, 0)])
    with pytest.raises(ShearlingError, match="layers: is empty"):
        start(teacher, 1.0, [])
    with pytest.raises(ShearlingError, match="the model itself"):
        start(model)
    with pytest.raises(ShearlingError, match="weight 0: must be above 0"):
        start(teacher, 0)
    with pytest.raises(ShearlingError, match="a cache holds no block outputs"):
        start(cache_teacher(teacher, some_windows(), tmp_path, k=2))
