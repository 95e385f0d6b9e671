from __future__ import annotations

import dataclasses
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import import_utils

from shearling.anatomy import anatomy_of
from shearling.errors import ShearlingError
from shearling.methods.ig_lora import LoRAPolicy
from shearling.plan import Structure
from shearling.surgery import cut_
from shearling.train import Distillation, Policy, TrainProgress, TrainSettings, chunked_divergence, train
from shearling.train.events import Clock
from shearling.train.flops import forward_flops
from shearling.train.head import blocks_of, hidden_states, output_head
from shearling.train.resume import Counters
from shearling.train.sampler import WindowSampler
from shearling.train.validation import validation_loss
from shearling.train.world import World, clip_
from tests.tiny import FAMILIES, VOCAB, tiny_model, tiny_tokens

LENGTH = 12


def some_settings(steps=6, **changes):
    base = TrainSettings(
        tokens=steps * 4 * LENGTH, length=LENGTH, batch=4, micro_batch=4, learning_rate=1e-2, log_every=1
    )
    return dataclasses.replace(base, **changes)


def some_windows(count=10):
    return tiny_tokens(count, LENGTH, seed=5)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- settings, schedule, sampler


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", 0), ("length", 1), ("batch", 0), ("micro_batch", -1), ("learning_rate", 0.0), ("warmup", -1.0),
        ("clip", 0.0), ("schedule", "step"), ("min_ratio", 1.5), ("weight_decay", -0.1), ("checkpoint_every", -1),
    ],
)  # fmt: skip
def test_bad_settings_are_named(field, value):
    with pytest.raises(ShearlingError, match=f"^{field}="):
        some_settings(**{field: value})


def test_steps_cover_the_tokens():
    assert some_settings(tokens=1).steps == 1
    assert some_settings(tokens=2 * 4 * LENGTH).steps == 2
    assert some_settings(tokens=2 * 4 * LENGTH + 1).steps == 3


def test_cosine_by_hand():
    settings = some_settings(steps=12, warmup=4, schedule="cosine", min_ratio=0.2)
    rates = [settings.rate(step) for step in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.6)  # half-way between 1 and 0.2
    assert rates[10] == pytest.approx(0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2)


def test_other_schedules_and_fractional_warmup():
    linear = some_settings(steps=10, warmup=0.2, schedule="linear", min_ratio=0.0)
    assert [linear.rate(s) for s in range(10)] == pytest.approx(
        [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    assert {some_settings(warmup=0, schedule="constant").rate(s) for s in range(6)} == {1.0}


@hypothesis_settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 20), batch=st.integers(1, 30), takes=st.integers(1, 12), stop=st.integers(0, 11))
def test_sampler_reads_each_window_once_an_epoch_and_resumes(count, batch, takes, stop):
    sampler, interrupted = WindowSampler(count, 7), WindowSampler(count, 7)
    batches = [sampler.take(batch) for _ in range(takes)]
    read = torch.cat(batches)
    for epoch in range(len(read) // count):
        assert sorted(read[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))
    stop = min(stop, takes)
    for _ in range(stop):
        interrupted.take(batch)
    resumed = WindowSampler(count, 7)
    resumed.load_state_dict(interrupted.state_dict())
    assert all(torch.equal(resumed.take(batch), expected) for expected in batches[stop:])


def test_epochs_and_seeds_differ():
    sampler = WindowSampler(50, 0)
    first, second = sampler.take(50), sampler.take(50)
    assert not torch.equal(first, second) and not torch.equal(first, WindowSampler(50, 1).take(50))


# --- the loop against a plain loop


def plain_training(model, windows, settings):
    """AdamW by its own formula on full logits, one batch a step; returns the losses."""
    model.train()
    sampler = WindowSampler(len(windows), settings.seed)
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    losses = []
    for step in range(settings.steps):
        ids = windows[sampler.take(settings.batch)]
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        scale = min(1.0, settings.clip / (norm.item() + 1e-6)) if settings.clip else 1.0
        rate = settings.learning_rate * settings.rate(step)
        b1, b2 = settings.betas
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                g = g * scale
                if p.ndim > 1:
                    p.mul_(1 - rate * settings.weight_decay)
                m.mul_(b1).add_(g, alpha=1 - b1)
                v.mul_(b2).addcmul_(g, g, value=1 - b2)
                denominator = (v / (1 - b2 ** (step + 1))).sqrt() + 1e-8
                p.sub_(rate / (1 - b1 ** (step + 1)) * m / denominator)
    model.eval()
    return losses


@pytest.mark.parametrize("micro_batch", [4, 3, 1])
def test_full_training_equals_a_plain_loop(micro_batch):
    """Loss by loss, whatever the micro-batch (3 leaves a ragged one), over more than one epoch."""
    settings = some_settings(micro_batch=micro_batch, weight_decay=0.1, warmup=2, clip=0.5)
    model, reference = tiny_model("gemma2"), tiny_model("gemma2")
    result = train(model, some_windows(), [], settings)
    losses = plain_training(reference, some_windows(), settings)
    assert result.losses == pytest.approx(losses, rel=1e-4)
    assert result.losses[-1] < result.losses[0]
    for got, want in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-4)


def test_same_seed_same_bits_other_seed_other_bits():
    """With dropout on (GPT-2's default), so that torch's generator matters."""

    def run(seed):
        model = tiny_model("gpt2")
        result = train(model, some_windows(), [], some_settings(seed=seed))
        return state(model), result.losses

    torch.manual_seed(1)
    one, one_losses = run(0)
    torch.manual_seed(2)
    two, two_losses = run(0)
    assert same(one, two) and one_losses == two_losses
    assert not same(one, run(1)[0])


def test_the_callers_generator_and_model_flags_are_left_alone():
    model = tiny_model("llama")
    model.model.norm.weight.requires_grad_(False)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    train(model, some_windows(), [], some_settings(steps=2))
    assert torch.equal(torch.rand(4), expected)
    assert not model.training
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not flags.pop("model.norm.weight") and all(flags.values())
    assert all(p.grad is None for p in model.parameters())


# --- policies


class Recorder(Policy):
    """Notes the order of calls and checks what a context holds at each."""

    def __init__(self, calls, name="a"):
        self.calls, self.name = calls, name

    def note(self, what):
        self.calls.append(f"{self.name}.{what}")

    def attach(self, model, settings):
        self.note("attach")

    def param_groups(self):
        self.note("param_groups")

    def optimizer(self):
        self.note("optimizer")

    def begin_step(self, step, rng):
        self.note(f"begin_step {step}")

    def loss_terms(self, ctx):
        assert ctx.hidden is not None and ctx.hidden.requires_grad
        assert torch.equal(ctx.labels[:, :-1], ctx.input_ids[:, 1:]) and (ctx.labels[:, -1] == -100).all()
        self.note(f"loss_terms {len(ctx.input_ids)}")
        return {self.name: ctx.hidden.square().mean()}

    def after_backward(self, ctx):
        assert ctx.hidden is None and all(p.grad is not None for p in ctx.model.parameters())
        self.note("after_backward")

    def after_step(self, ctx):
        self.note("after_step")

    def on_eval(self, metrics):
        self.note(f"on_eval {sorted(metrics)}")

    def finalize(self):
        self.note("finalize")
        return [self.name]


def test_hooks_are_called_in_the_documented_order():
    calls, events = [], []
    result = train(
        tiny_model("llama"), some_windows(), [Recorder(calls), Recorder(calls, "b")],
        some_settings(steps=2, micro_batch=3), validation=some_windows(2), on_event=events.append,
    )  # fmt: skip
    step = ["begin_step {}", "loss_terms 3", "loss_terms 1", "after_backward", "after_step"]

    def both(whats):
        return [f"{name}.{what}" for what in whats for name in "ab"]

    expected = both(["attach", "param_groups", "optimizer"])
    for number in range(2):
        expected += both([what.format(number) for what in step])
    assert calls == expected + both(["on_eval ['validation_loss']", "finalize"])
    assert result.edits == ("a", "b")
    # the terms are noted, and the loss is their sum
    for event in events[:2]:
        assert event["loss"] == pytest.approx(event["cross_entropy"] + event["a"] + event["b"], rel=1e-5)


class OneMatrix(Policy):
    """Trains one matrix through the loop's AdamW at its own rate, another through its own SGD."""

    def attach(self, model, settings):
        self.up = model.model.layers[0].mlp.up_proj.weight
        self.down = model.model.layers[0].mlp.down_proj.weight
        self.rates = []

    def param_groups(self):
        return [{"params": [self.up], "lr": 1e-3}]

    def optimizer(self):
        self.sgd = torch.optim.SGD([self.down], lr=0.5)
        return self.sgd

    def after_backward(self, ctx):
        self.rates.append(ctx.rate)
        self.expected = self.down.detach() - 0.5 * self.down.grad

    def after_step(self, ctx):
        assert torch.equal(self.down, self.expected)


def test_only_what_policies_name_is_trained():
    model, policy = tiny_model("llama"), OneMatrix()
    before = state(model)
    settings = some_settings(steps=1, warmup=0)
    train(model, some_windows(), [policy], settings)
    changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"}
    # Adam's first step moves every weight by its learning rate
    moved = (policy.up.detach() - before["model.layers.0.mlp.up_proj.weight"]).abs()
    assert moved.max().item() == pytest.approx(1e-3, rel=1e-3) and moved.median().item() == pytest.approx(
        1e-3, rel=1e-3
    )
    assert policy.rates == [settings.rate(0)]


def test_a_parameter_named_twice_is_refused():
    class Twice(OneMatrix):
        def optimizer(self):
            return torch.optim.SGD([self.up], lr=0.5)

    model = tiny_model("llama")
    with pytest.raises(ShearlingError, match="up_proj.weight: trained by two"):
        train(model, some_windows(), [Twice()], some_settings())


def test_the_steps_generator_depends_on_seed_and_step_alone():
    class Draws(Policy):
        def __init__(self):
            self.drawn = []

        def begin_step(self, step, rng):
            self.drawn.append(torch.rand(1, generator=rng).item())

    def draws(seed):
        policy = Draws()
        train(tiny_model("llama"), some_windows(), [policy], some_settings(steps=3, seed=seed))
        return policy.drawn

    assert draws(0) == draws(0) and len(set(draws(0))) == 3 and draws(0) != draws(1)


# --- distillation


def test_distillation_pulls_towards_the_teacher():
    teacher = tiny_model("llama", seed=1)
    before = state(teacher)
    result = train(
        tiny_model("llama"), some_windows(), [Distillation(teacher, temperature=2.0)],
        some_settings(steps=30, cross_entropy=0.0, warmup=0),
    )  # fmt: skip
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert same(state(teacher), before)


def test_a_copy_as_teacher_gives_no_loss_and_no_gradient():
    norms = []
    result = train(
        tiny_model("llama"), some_windows(), [Distillation(tiny_model("llama"))],
        some_settings(steps=1, cross_entropy=0.0), on_event=lambda event: norms.append(event["grad_norm"]),
    )  # fmt: skip
    assert abs(result.losses[0]) < 1e-5 and norms[0] < 1e-4


def test_unusable_teachers_are_named():
    model = tiny_model("llama")
    with pytest.raises(ShearlingError, match="vocabulary of 50, the model's is 97"):
        train(model, some_windows(), [Distillation(tiny_model("llama", vocab_size=50))], some_settings())
    with pytest.raises(ShearlingError, match="the model itself"):
        train(model, some_windows(), [Distillation(model)], some_settings())


# --- the forward pass


@pytest.mark.parametrize("family", FAMILIES)
def test_capturing_changes_no_mask(family, monkeypatch):
    def masks():
        found = []
        block = blocks_of(model)[0]
        handle = block.register_forward_pre_hook(
            lambda module, args, kwargs: found.append(kwargs.get("attention_mask")), with_kwargs=True
        )
        states = hidden_states(model, ids)
        handle.remove()
        return found[0], states

    # longer than the sliding windows of those that have some
    model, ids = tiny_model(family), tiny_tokens(2, 24)
    (mask, states), stock = masks(), model.base_model(ids).last_hidden_state
    torch.testing.assert_close(states, stock)
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
    again, _ = masks()
    assert (mask is None) == (again is None) and (mask is None or torch.equal(mask, again))
    assert mask is None or family.startswith("gemma")


# --- what goes wrong, and what is told


class Poison(Policy):
    """Makes the loss or the gradient NaN at some steps."""

    def __init__(self, steps, where):
        self.steps, self.where, self.stepped = steps, where, []

    def loss_terms(self, ctx):
        if ctx.step not in self.steps:
            return {}
        if self.where == "loss":
            return {"poison": ctx.hidden.sum() * math.nan}
        # finite, with an infinite slope at zero
        return {"poison": (ctx.hidden - ctx.hidden.detach()).abs().sum().sqrt()}

    def after_step(self, ctx):
        self.stepped.append(ctx.step)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(where):
    model, events, policy = tiny_model("llama"), [], Poison({1, 3}, where)
    result = train(model, some_windows(), [policy], some_settings(), on_event=events.append)
    assert policy.stepped == [0, 2, 4, 5] and result.skipped == 2 and result.steps == 6
    assert [e["step"] for e in events if "warning" in e] == [2, 4]
    assert all(where in e["warning"] for e in events if "warning" in e)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("policies", "changes", "what"),
    [
        ([Poison({1}, "loss")], {}, "capture: Poison does other work at every step; leave it off"),
        ([], {}, "capture: needs a GPU, this is cpu; leave it off"),
        ([], {"recompute": True}, "capture: a graph cannot compute activations again"),
    ],
)
def test_capturing_where_it_cannot_be(policies, changes, what):
    with pytest.raises(ShearlingError, match=what):
        train(tiny_model("llama"), some_windows(), policies, some_settings(capture=True, **changes))


def test_five_in_a_row_end_the_run():
    with pytest.raises(ShearlingError, match="5 steps in a row"):
        train(tiny_model("llama"), some_windows(), [Poison(set(range(1, 6)), "loss")], some_settings(steps=9))
    train(tiny_model("llama"), some_windows(), [Poison({0, 1, 2, 3, 5, 6, 7, 8}, "loss")], some_settings(steps=9))


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.zeros(0, LENGTH, dtype=torch.long), "at least one window"),
        (torch.zeros(LENGTH, dtype=torch.long), "must be"),
        (torch.zeros(3, 8, dtype=torch.long), "8 tokens a window"),
        (torch.full((3, LENGTH), VOCAB), f"0 to {VOCAB - 1}"),
        (torch.full((3, LENGTH), -1), "token ids -1"),
    ],
)
def test_unusable_windows_are_named(windows, message):
    with pytest.raises(ShearlingError, match=f"windows: .*{message}"):
        train(tiny_model("llama"), windows, [], some_settings())


def test_bfloat16_masters_and_no_loss_are_refused():
    with pytest.raises(ShearlingError, match="float32"):
        train(tiny_model("llama").bfloat16(), some_windows(), [], some_settings())
    with pytest.raises(ShearlingError, match="cross_entropy=0"):
        train(tiny_model("llama"), some_windows(), [], some_settings(cross_entropy=0.0))


def test_events_tell_the_run():
    events = []
    settings = some_settings(steps=7, log_every=3, validate_every=4)
    model = tiny_model("llama")
    result = train(model, some_windows(), [], settings, validation=some_windows(3), on_event=events.append)
    logged = [e for e in events if "loss" in e]
    assert [e["step"] for e in logged] == [1, 3, 6, 7]
    assert logged[1]["loss"] == pytest.approx(sum(result.losses[:3]) / 3)
    assert logged[3]["loss"] == pytest.approx(result.losses[6])
    for event in logged:
        assert event["tokens"] == event["step"] * 4 * LENGTH
        assert event["learning_rate"] == pytest.approx(1e-2 * settings.rate(event["step"] - 1))
        assert event["tokens_per_second"] > 0 and event["grad_norm"] > 0
    assert logged[-1]["eta_seconds"] == 0
    validated = {e["step"]: e["validation_loss"] for e in events if "validation_loss" in e}
    assert list(validated) == [4, 7]
    with torch.no_grad():
        expected = model(some_windows(3), labels=some_windows(3)).loss.item()
    assert validated[7] == pytest.approx(expected, rel=1e-5)
    assert (result.steps, result.tokens, result.stopped) == (7, 7 * 4 * LENGTH, False)


def test_tensors_in_events_become_numbers_in_one_transfer(monkeypatch):
    """Whole numbers beyond float32 and values of float32, bfloat16 and float64 are told as they are."""
    given = {
        "whole": torch.tensor(2**40 + 1), "half": torch.tensor([1 / 3], dtype=torch.bfloat16),
        "single": torch.tensor(1 / 3), "double": torch.tensor(1 / 3, dtype=torch.float64),
    }  # fmt: skip
    expected = {name: float(tensor) for name, tensor in given.items()}
    transfers = []
    whole = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: transfers.append(tensor) or whole(tensor))
    monkeypatch.setattr(torch.Tensor, "__float__", None)
    counters = Counters(4, step=1, seconds=1.0, losses=[2.0])
    event = Clock(Counters(4), 1.0, None).report({"step": 1, **given}, counters, some_settings())
    assert {name: event[name] for name in given} == expected and event["step"] == 1 and event["loss"] == 2.0
    assert all(type(event[name]) is float for name in given) and len(transfers) == 1


@pytest.mark.parametrize("bound", [0.1, 5.0, 1e6])
def test_clipping_is_torchs_to_the_bit(bound):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3, 5, generator=generator, dtype=t) for t in (torch.float32, torch.float64)]
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, bound)
    clip_(gradients, bound, norm)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.equal(gradient, parameter.grad) and gradient.dtype == parameter.dtype


def test_validation_leaves_the_training_mode():
    model = tiny_model("gpt2").train()
    first = validation_loss(model, some_windows(), some_settings(), World())
    assert model.training and validation_loss(model, some_windows(), some_settings(), World()) == first


def test_progress_shows_events():
    out = io.StringIO()
    with TrainProgress(3, Console(file=out, width=120)) as progress:
        progress({"step": 1, "resumed": True})
        progress({"step": 2, "warning": "odd"})
        progress({"step": 2, "validation_loss": 1.5})
        event = {"loss": 3.14159, "learning_rate": 1e-4, "tokens_per_second": 900.0, "eta_seconds": 3725.0}
        progress({"step": 3, **event})
    for text in ("step 2: odd", "validation loss 1.5000", "loss 3.142", "900 tokens/s", "1:02:05 left", "3/3"):
        assert text in out.getvalue()


def test_a_policys_module_may_live_outside_the_model():
    class Gate(Policy):
        def __init__(self):
            self.gate = nn.Parameter(torch.ones(32))

        def param_groups(self):
            return [{"params": [self.gate]}]

        def loss_terms(self, ctx):
            return {"gate": (ctx.hidden * self.gate).square().mean()}

    model, policy = tiny_model("llama"), Gate()
    before = state(model)
    train(model, some_windows(), [policy], some_settings(cross_entropy=0.0))
    assert same(state(model), before) and (policy.gate < 1).all()


# --- memory


class Memory(Policy):
    """Runs out of memory where more than ``fits`` windows come at a time."""

    def __init__(self, fits):
        self.fits, self.seen = fits, []

    def loss_terms(self, ctx):
        self.seen.append(len(ctx.input_ids))
        if len(ctx.input_ids) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {}


@pytest.mark.parametrize("fits", [1, 2])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(fits):
    events = []
    memory, model = Memory(fits), tiny_model("llama")
    result = train(model, some_windows(), [memory], some_settings(steps=3), on_event=events.append)
    plain = tiny_model("llama")
    expected = train(plain, some_windows(), [], some_settings(steps=3, micro_batch=fits))
    assert result.losses == expected.losses
    assert same(state(model), state(plain))
    assert result.skipped == 0
    warnings = [event for event in events if "warning" in event]
    assert [event["step"] for event in warnings] == [1] * (3 - fits)
    assert f"{fits} windows at a time" in warnings[-1]["warning"]
    # it does not try more again
    assert memory.seen == [4, 2, 1][: 3 - fits] + [fits] * (12 // fits)


def test_out_of_memory_with_one_window_is_one_line(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(ShearlingError, match="step 1: out of memory with one window of 12 tokens") as caught:
        train(model, some_windows(), [Memory(0)], some_settings(), state_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt", "phi3"])
def test_recomputed_activations_change_nothing(family):
    results = {}
    for recompute in (False, True):
        model, calls = tiny_model(family), []
        block = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[1]
        handle = next(block.children()).register_forward_hook(lambda *args, calls=calls: calls.append(1))
        result = train(model, some_windows(), [], some_settings(steps=3, recompute=recompute))
        handle.remove()
        results[recompute] = (result.losses, state(model), len(calls))
        assert "forward" not in vars(block)
    assert results[True][0] == results[False][0]
    assert same(results[True][1], results[False][1])
    assert results[True][2] == 2 * results[False][2]


# --- the best parameters


class Spoil(Policy):
    """Does harm from the sixth step on."""

    @torch.no_grad()
    def after_step(self, ctx):
        if ctx.step >= 5:
            for parameter in ctx.model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(-2)


def validated(**changes):
    return some_settings(steps=8, validate_every=1, **changes)


@pytest.mark.parametrize("lora", [False, True])
def test_the_best_parameters_by_validation_are_kept(lora):
    def policies(model):
        return [Spoil(), *([LoRAPolicy(anatomy_of(model.config), [2, 2, 2])] if lora else [])]

    held_out, events, model = some_windows(3), [], tiny_model("llama")
    settings = validated(keep="best")
    result = train(model, some_windows(), policies(model), settings, validation=held_out, on_event=events.append)
    losses = {event["step"]: event["validation_loss"] for event in events if "validation_loss" in event}
    assert result.best_step == min(losses, key=losses.get) < 8
    assert validation_loss(model, held_out, settings, World()) == pytest.approx(losses[result.best_step], rel=1e-5)
    last = tiny_model("llama")
    assert train(last, some_windows(), policies(last), validated(), validation=held_out).best_step is None
    assert validation_loss(last, held_out, settings, World()) == pytest.approx(losses[8], rel=1e-5)


def test_the_best_parameters_survive_an_interruption(tmp_path):
    whole, model = tiny_model("llama"), tiny_model("llama")
    settings = validated(keep="best", checkpoint_every=1)
    expected = train(whole, some_windows(), [Spoil()], settings, validation=some_windows(3))

    class Stop(Exception):
        pass

    def stop(event):
        if event.get("step") == 8 and "loss" in event:
            raise Stop

    with pytest.raises(Stop):
        train(model, some_windows(), [Spoil()], settings, validation=some_windows(3), state_dir=tmp_path, on_event=stop)
    model = tiny_model("llama")
    result = train(model, some_windows(), [Spoil()], settings, validation=some_windows(3), state_dir=tmp_path)
    assert result.best_step == expected.best_step < 8
    assert same(state(model), state(whole))


def test_keeping_the_best_needs_something_to_choose_by():
    with pytest.raises(ShearlingError, match="needs validation windows"):
        train(tiny_model("llama"), some_windows(), [], validated(keep="best"))
    with pytest.raises(ShearlingError, match="must be last or best"):
        validated(keep="first")


def test_compiled_blocks_train_alike_with_widths_of_their_own():
    def cut():
        model = tiny_model("llama")
        cut_(model, [Structure({"ffn.0": tuple(range(20)), "ffn.2": tuple(range(30))})])
        return model

    settings = some_settings(recompute=True)
    eager, fast = cut(), cut()
    expected = train(eager, some_windows(), [], settings)
    found = train(fast, some_windows(), [], dataclasses.replace(settings, compile=True))
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert not any("forward" in vars(module) for module in fast.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_forward_flops_are_what_torch_counts(family):
    length = 24
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, length, dtype=torch.int64))
    heads = model.config.num_attention_heads * anatomy_of(model.config).head_dim * model.config.num_hidden_layers
    # torch counts scores and values of all pairs, of which a causal model needs half
    assert forward_flops(model, length) == counter.get_total_flops() / (2 * length) - 2 * length * heads


def test_utilisation_is_reported_where_the_peak_is_known(monkeypatch):
    monkeypatch.setattr("shearling.train.loop.peak_flops", lambda device, count: 1e12 * count)
    model, events = tiny_model("llama"), []
    flops = 3 * forward_flops(model, LENGTH)
    train(model, some_windows(), [], some_settings(), on_event=events.append)
    for event in events:
        assert event["flops_utilisation"] == pytest.approx(event["tokens_per_second"] * flops / 1e12)


class Apart(Policy):
    """Distillation in a pass through the head of its own."""

    def __init__(self, teacher):
        self.teacher = teacher

    def loss_terms(self, ctx):
        with torch.no_grad():
            taught = hidden_states(self.teacher, ctx.input_ids)
        heads = output_head(ctx.model), output_head(self.teacher)
        divergence = chunked_divergence(ctx.hidden, heads[0], taught, heads[1], ctx.labels, 2.0, kind="reverse")
        return {"distillation": 0.7 * divergence}


def test_both_losses_in_one_pass_are_both_losses():
    results = []
    for policy in (Distillation(tiny_model("llama", 3), weight=0.7, temperature=2.0, kind="reverse"), None):
        model, events = tiny_model("llama"), []
        policy = policy or Apart(tiny_model("llama", 3))
        train(model, some_windows(), [policy], some_settings(cross_entropy=0.4), on_event=events.append)
        results.append((events, state(model)))
    (together, model), (apart, other) = results
    for one, two in zip(together, apart, strict=True):
        for name in ("loss", "cross_entropy", "distillation"):
            assert one[name] == pytest.approx(two[name], rel=1e-5)
    for name, tensor in model.items():
        # Adam takes a step of full length along gradients that are nearly zero
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-4)
