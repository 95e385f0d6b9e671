"""The optimizers of a captured step: a trace on the CPU stands in for the CUDA graph, and must give the eager bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from shearling.anatomy import anatomy_of
from shearling.captured import NotCapturable
from shearling.errors import ShearlingError
from shearling.methods.ast import ASTPolicy
from shearling.plan.patterns import Pattern
from shearling.recipe import AST
from shearling.train import Policy, TrainSettings, gradients, loop, optimizers, train
from tests.tiny import tiny_model, tiny_tokens
from tests.traced import Traced

LENGTH = 12
# rates are sums of few powers of two: a graph reads them as float32
SETTINGS = TrainSettings(
    tokens=12 * 4 * LENGTH, length=LENGTH, batch=4, micro_batch=4, learning_rate=2**-7, warmup=4, schedule="linear",
    min_ratio=0.0, weight_decay=0.25, clip=0.5, log_every=1, checkpoint_every=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Stand-ins where a GPU is asked for; the list is of those that were made."""
    whole = gradients.Gradients
    monkeypatch.setattr(optimizers, "Captured", Traced)
    monkeypatch.setattr(
        loop, "Gradients", lambda policies, own, *rest: whole(policies, dataclasses.replace(own, capture=False), *rest)
    )
    monkeypatch.setattr(Traced, "made", [])
    return Traced.made


class Poison(Policy):
    """Makes the loss NaN at some steps, and the gradient at others."""

    def loss_terms(self, ctx):
        if ctx.step in (2, 7):
            return {"poison": ctx.hidden.sum() * float("nan")}
        if ctx.step == 5:
            return {"poison": (ctx.hidden - ctx.hidden.detach()).abs().sum().sqrt()}
        return {}


class Narrow(Policy):
    """Has no memory for more than two windows from some step on, and leaves gradients behind that are worth nothing."""

    def loss_terms(self, ctx):
        if ctx.step >= 6 and len(ctx.input_ids) > 2:
            for parameter in ctx.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.add_(1.0)
            raise torch.OutOfMemoryError("no memory")
        return {}


def masked(model):
    settings = AST(refresh_every=3, decay=1e-3, score="activation-refreshed", slorb={"size": 8})
    return ASTPolicy(anatomy_of(model.config), Pattern(2, 4), settings)


MADE = {"plain": lambda model: [], "poison": lambda model: [Poison()], "narrow": lambda model: [Narrow()],
        "ast": lambda model: [masked(model)]}  # fmt: skip


def start(kind, capture, folder=None, on_event=None):
    model = tiny_model("llama")
    settings = dataclasses.replace(SETTINGS, capture=capture)
    policies = MADE[kind](model)
    return model, train(model, tiny_tokens(10, LENGTH), policies, settings, state_dir=folder, on_event=on_event)


def assert_same(one, two):
    (model, result), (other, expected) = one, two
    # NaN is not itself
    assert str(result.losses) == str(expected.losses) and result.skipped == expected.skipped
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("kind", MADE)
def test_a_repeated_update_is_the_eager_one(kind, traced):
    found = start(kind, True)
    (one,) = traced
    skipped = 3 if kind == "poison" else 0
    assert one.calls == 12 - skipped and one.graph is not None and found[1].skipped == skipped
    assert_same(found, start(kind, False))
    assert len(traced) == 1


class Waiting(Policy):
    """Does something at one step that a graph cannot hold."""

    def after_backward(self, ctx):
        if ctx.step == 4:
            raise NotCapturable("cannot become a CUDA graph: it waits")


def test_what_cannot_be_captured_is_told_in_a_line():
    model = tiny_model("llama")
    with pytest.raises(ShearlingError, match="^capture: cannot become a CUDA graph: it waits; leave it off$"):
        train(model, tiny_tokens(10, LENGTH), [Waiting()], SETTINGS)


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["plain", "ast"])
@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_checkpoints_are_the_same_with_capture_and_without(kind, before, after, traced, tmp_path):
    def stop(event):
        if event["step"] == 6:
            raise Stop

    with pytest.raises(Stop):
        start(kind, before, tmp_path, stop)
    found = start(kind, after, tmp_path)
    assert len(traced) == before + after and all(one.graph is not None for one in traced)
    assert_same(found, start(kind, False))


def pair_of(capture):
    model = nn.Linear(3, 2)
    settings = dataclasses.replace(SETTINGS, capture=capture)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model, optimizers.build_optimizers(model, [], settings)


@pytest.mark.parametrize("lacking", [range(0, 6), range(6, 12), range(5, 7)])
def test_a_gradient_that_comes_goes_or_is_another_tensor(lacking, traced):
    """A graph that went on with the tensors of before would move what has no gradient, or read a stale one."""

    def trained(capture):
        model, built = pair_of(capture)
        generator = torch.Generator().manual_seed(0)
        for step in range(12):
            built.zero_grad(keep=capture)
            for name, parameter in model.named_parameters():
                gradient = torch.randn(parameter.shape, generator=generator)
                if name == "bias" and step in lacking:
                    parameter.grad = None
                elif parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad += gradient
            built.set_rate(0.25 * (1 + step % 3))
            built.step()
        return [p.detach() for p in model.parameters()]

    for one, other in zip(trained(True), trained(False), strict=True):
        assert torch.equal(one, other)
    assert len(traced) == 1 + (lacking[0] > 0) + (lacking[-1] < 11)


def test_states_taken_back_in_the_middle_are_what_goes_on(traced):
    model, built = pair_of(True)
    states, weights = [], []
    for step in range(10):
        if step == 8:
            built.load_state_dicts(states)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.grad is None else parameter.grad
        built.set_rate(1.0)
        built.step()
        states = [optimizer.state_dict() for optimizer in built.all] if step < 8 else states
        weights.append(model.weight[0, 0].item())
        assert built.scheduled.state[model.weight]["step"] == step + 1
    # gradients of one: Adam takes equal steps, but for what decay takes
    assert weights == pytest.approx([0.5 * (1 - 2**-9) ** n - sum((1 - 2**-9) ** k for k in range(n)) * 2**-7
                                     for n in range(1, 11)], rel=1e-4)  # fmt: skip
    assert len(traced) == 2
