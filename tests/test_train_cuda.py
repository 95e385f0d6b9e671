from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shearling.anatomy import anatomy_of
from shearling.captured import WARMUP
from shearling.errors import ShearlingError
from shearling.methods.ig_lora import LoRAPolicy
from shearling.train import (
    Distillation,
    LayerwiseDistillation,
    Policy,
    Teacher,
    TrainSettings,
    chunked_cross_entropy,
    train,
)
from shearling.train.memory import training_memory
from shearling.train.optimizers import build_optimizers
from shearling.train.world import clip_, total_norm
from tests.tiny import tiny_model, tiny_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SETTINGS = TrainSettings(
    tokens=8 * 4 * 24, length=24, batch=4, micro_batch=3, learning_rate=1e-2, log_every=1, checkpoint_every=1
)


class Stop(Exception):
    pass


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16_training_resumes_to_the_bit(family, lora, tmp_path):
    def start(folder, on_event=None):
        model = tiny_model(family).cuda()
        policies = [Distillation(tiny_model(family, seed=1).cuda())]
        if lora:
            policies.append(LoRAPolicy(anatomy_of(model.config), [2, 3, 4]))
        result = train(model, tiny_tokens(10, 24), policies, SETTINGS, state_dir=folder, on_event=on_event)
        return model, result

    def stop(event):
        if event["step"] == 5:
            raise Stop

    with pytest.raises(Stop):
        start(tmp_path, stop)
    (resumed, result), (undisturbed, expected) = start(tmp_path), start(None)
    assert result.losses == expected.losses and result.losses[-1] < result.losses[0]
    for name, tensor in resumed.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, undisturbed.state_dict()[name]), name


class Probe(Policy):
    """Does something at one of the calls of ``loss_terms``, of which a graph makes none."""

    def __init__(self, call=0, act=lambda ctx: None):
        self.call, self.act, self.calls = call, act, 0

    def capturable(self):
        return True

    def loss_terms(self, ctx):
        self.calls += 1
        if self.calls == self.call:
            self.act(ctx)
        return {}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("lora", [False, True])
def test_captured_steps_train_as_others(family, lora):
    def losses(capture, **changes):
        model = tiny_model(family).cuda()
        teacher = Teacher(tiny_model(family, seed=1).cuda())
        probe = Probe()
        policies = [Distillation(teacher), LayerwiseDistillation(teacher), probe]
        if lora:
            policies.append(LoRAPolicy(anatomy_of(model.config), [2, 3, 4]))
        changes |= {"batch": 7, "micro_batch": 2, "tokens": 8 * 7 * 24, "learning_rate": 1e-3}
        settings = replace(SETTINGS, capture=capture, **changes)
        events = []
        result = train(model, tiny_tokens(20, 24), policies, settings, on_event=events.append)
        # three calls go ahead of the capture, and each step's odd window is not captured
        assert probe.calls == (WARMUP + 1 + 8 if capture else 4 * 8)
        names = ("cross_entropy", "distillation", "layerwise")
        return result.losses, [{name: event[name] for name in names} for event in events]

    found, expected = losses(True), losses(False)
    assert found[0] == pytest.approx(expected[0], rel=2e-4)
    for event, other in zip(found[1], expected[1], strict=True):
        assert event == pytest.approx(other, rel=2e-3)
    assert losses(True, compile=True)[0] == pytest.approx(expected[0], rel=5e-3)


def test_a_captured_update_is_the_eager_one():
    """Rates are sums of few powers of two, since a graph reads them as float32; a gradient comes late."""

    def trained(capture):
        generator = torch.Generator().manual_seed(0)
        model = torch.nn.Linear(48, 32).cuda()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        built = build_optimizers(model, [], replace(SETTINGS, capture=capture, learning_rate=2**-7, weight_decay=0.25))
        for step in range(16):
            built.zero_grad(keep=capture)
            for name, parameter in model.named_parameters():
                gradient = torch.randn(parameter.shape, generator=generator).cuda()
                if name == "weight" or step > 6:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            built.set_rate(0.25 * (1 + step % 3))
            clip_(built.gradients, 3.0, total_norm(built.gradients))
            built.step()
        return [p.detach() for p in model.parameters()]

    for one, other in zip(trained(True), trained(False), strict=True):
        assert torch.equal(one, other)


def test_a_capture_without_memory_takes_less():
    # more than any GPU has
    probe, events = Probe(WARMUP + 1, lambda ctx: torch.empty(2**50, device=ctx.device)), []
    settings = replace(SETTINGS, capture=True, batch=3)
    result = train(tiny_model("llama").cuda(), tiny_tokens(10, 24), [probe], settings, on_event=events.append)
    assert [e["warning"] for e in events if "warning" in e] == [
        "out of memory; 2 windows at a time instead of 3, the batch stays"
    ]
    plain = train(tiny_model("llama").cuda(), tiny_tokens(10, 24), [], replace(SETTINGS, batch=3))
    assert result.losses == pytest.approx(plain.losses, rel=1e-2)


def test_what_cannot_be_captured_is_told_and_the_gpu_goes_on():
    probe, settings = Probe(WARMUP + 1, lambda ctx: ctx.hidden.sum().item()), replace(SETTINGS, capture=True, batch=3)
    with pytest.raises(ShearlingError, match="capture: cannot become a CUDA graph.*leave it off"):
        train(tiny_model("llama").cuda(), tiny_tokens(10, 24), [probe], settings)
    train(tiny_model("llama").cuda(), tiny_tokens(10, 24), [], settings)


def test_chunked_cross_entropy_under_autocast():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator).cuda().requires_grad_()
    weight = torch.randn(500, 64, generator=generator).cuda().requires_grad_()
    labels = torch.randint(0, 500, (300,), generator=generator).cuda()
    labels[::7] = -100
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in (hidden, weight)]
    expected = torch.nn.functional.cross_entropy(rounded[0] @ rounded[1].T, labels)
    expected.backward()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, labels, chunk=64)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)
    for got, want in zip((hidden, weight), rounded, strict=True):
        assert (got.grad.double() - want.grad).norm() < 2e-2 * want.grad.norm()


@pytest.mark.parametrize(
    "changes", [{}, {"compile": True}, {"compile": True, "capture": True}, {"recompute": True}],
    ids=["eager", "compiled", "captured", "recomputed"],
)  # fmt: skip
def test_memory_is_estimated_within_15_percent(changes):
    # of SmolLM2-135M's size
    sizes = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 1024, "tie_word_embeddings": True,
    }  # fmt: skip
    model, teacher = tiny_model("llama", **sizes).cuda(), tiny_model("llama", seed=1, **sizes).cuda().bfloat16()
    settings = TrainSettings(
        tokens=6 * 16 * 1024, length=1024, batch=16, micro_batch=8, learning_rate=1e-5, cross_entropy=0.0, **changes
    )
    expected = training_memory(model, settings, compute=torch.bfloat16, teacher=teacher)
    torch.cuda.reset_peak_memory_stats()
    train(model, tiny_tokens(96, 1024), [Distillation(teacher)], settings)
    assert expected.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)
