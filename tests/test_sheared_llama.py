"""Gates that learn an exact shape."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from shearling.anatomy import anatomy_of
from shearling.errors import ShearlingError
from shearling.methods import sheared_llama
from shearling.methods.gate_step import GateStep, penalty
from shearling.methods.hard_concrete import LIMIT, closed, sample, sparsity
from shearling.methods.sheared_llama import Shearing, ShearingPolicy, gate_shapes
from shearling.nn import EffectiveLinear
from shearling.surgery import cut_
from shearling.train import Distillation, Policy, TrainSettings, train
from shearling.train.memory import training_memory
from shearling.train.optimizers import Optimizers
from tests.tiny import FAMILIES, tiny_config, tiny_model, tiny_tokens
from tests.traced import Traced

LENGTH = 16
SETTINGS = TrainSettings(tokens=40 * 4 * LENGTH, length=LENGTH, batch=4, micro_batch=2, learning_rate=1e-3, log_every=1)
KEEP = {"layers": 2, "kv_group": 1, "ffn": 20}


def windows(count: int = 12) -> torch.Tensor:
    return tiny_tokens(count, LENGTH, seed=5)


def keep_of(family: str, **changes: int) -> dict[str, int]:
    """What every family can cut; query heads in a group where there are several."""
    shapes = gate_shapes(anatomy_of(tiny_config(family)))
    keep = {"layers": 2, "kv_group": shapes["kv_group"][-1] // 2, "ffn": 20}
    if shapes["query_head"][-1] > 1:
        keep["query_head"] = 1
    return {**keep, **changes}


class Last(Policy):
    """Keeps the logits of the model of the last step, with its gates."""

    def __init__(self) -> None:
        self.logits = torch.empty(0)

    def after_step(self, ctx: Any) -> None:
        if ctx.step + 1 == ctx.total_steps:
            ctx.model.eval()
            with torch.no_grad():
                self.logits = ctx.model(tiny_tokens(), use_cache=False).logits
            ctx.model.train()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hidden", [{}, {"hidden": 16}], ids=["", "hidden"])
def test_the_cut_model_is_the_gated_one(family: str, hidden: dict[str, int]) -> None:
    model, last = tiny_model(family), Last()
    anatomy, keep = anatomy_of(model.config), keep_of(family, **hidden)
    policy = ShearingPolicy(anatomy, keep, Shearing(binary=0.2))
    events: list[dict[str, Any]] = []
    result = train(model, windows(), [policy, last], SETTINGS, on_event=events.append)
    assert not any(isinstance(module, EffectiveLinear) or hasattr(module, "gate") for module in model.modules())
    after = cut_(model, result.edits)
    shape = after.shapes[0]
    heads = keep.get("query_head", 1) * keep["kv_group"]
    assert after.uniform and after.num_layers == keep["layers"] and after.hidden == keep.get("hidden", anatomy.hidden)
    assert (shape.ffn, shape.kv_heads, shape.query_heads) == (keep["ffn"], keep["kv_group"], heads)
    with torch.no_grad():
        torch.testing.assert_close(model(tiny_tokens(), use_cache=False).logits, last.logits, atol=1e-4, rtol=0)


def test_gates_start_in_the_order_of_scores() -> None:
    anatomy = anatomy_of(tiny_config("llama"))
    scores = {space: torch.randn(shape, dtype=torch.float64) for space, shape in gate_shapes(anatomy).items()}
    policy = ShearingPolicy(anatomy, KEEP, Shearing(), scores)
    policy.attach(tiny_model("llama"), SETTINGS)
    for space, log_alpha in policy.log_alpha.items():
        # evenly spaced from 2 to log 100, but for noise of a hundredth
        expected = torch.empty(log_alpha.shape)
        evenly = torch.linspace(2, LIMIT, log_alpha.shape[-1])
        expected.scatter_(-1, scores[space].argsort(dim=-1), evenly.expand(log_alpha.shape))
        assert (log_alpha.detach() - expected).abs().max() < 0.06, space
        assert (log_alpha <= LIMIT).all()


def test_gates_and_multipliers_have_rates_of_their_own() -> None:
    model = tiny_model("llama")
    anatomy = anatomy_of(model.config)
    # in an order, many gates are not so open that no gradient comes through
    scores = {space: torch.randn(shape) for space, shape in gate_shapes(anatomy).items()}
    policy = ShearingPolicy(anatomy, {"ffn": 20}, Shearing(learning_rate=0.25, multiplier_rate=8.0), scores)
    seen: list[torch.Tensor] = []

    class See(Policy):
        def after_backward(self, ctx: Any) -> None:
            seen.append(policy.log_alpha["ffn"].detach().clone())

        def after_step(self, ctx: Any) -> None:
            # Adam's first step is its rate, whatever the gradient
            moved = (policy.log_alpha["ffn"].detach() - seen[0]).abs().max().item()
            assert moved == pytest.approx(0.25 * ctx.rate, rel=1e-3)
            assert policy.multipliers["ffn"][0].abs().item() == pytest.approx(8 * ctx.rate, rel=1e-3)

    train(model, windows(), [policy, See()], dataclasses.replace(SETTINGS, tokens=4 * LENGTH))
    assert len(seen) == 1


def test_gates_reach_their_targets() -> None:
    model, events = tiny_model("llama"), []
    policy = ShearingPolicy(anatomy_of(model.config), KEEP, Shearing())
    settings = dataclasses.replace(SETTINGS, tokens=400 * 4 * LENGTH)
    train(model, windows(), [policy], settings, on_event=events.append)
    steps = [event for event in events if "closed/ffn" in event]
    for space, size in (("layers", 3), ("kv_group", 2), ("ffn", 48)):
        # a fifth of the steps takes the target to its height
        assert steps[40][f"target/{space}"] == pytest.approx((1 - KEEP[space] / size) / 2)
        assert steps[-1][f"closed/{space}"] == pytest.approx(1 - KEEP[space] / size, abs=0.02)
    assert len(steps) == 380 and policy.dead["layers"] == 0
    assert {f"dead/{space}": count for space, count in policy.dead.items()}.items() <= events[-1].items()


@pytest.mark.parametrize(
    ("rise", "risen"), [("linear", [0, 0.25, 0.5, 0.75, 1, 1]), ("cubic", [0, 37 / 64, 7 / 8, 63 / 64, 1, 1])]
)
def test_targets_rise_over_a_share_of_the_steps(rise: Any, risen: list[float]) -> None:
    shearing = Shearing(warmup=0.8, rise=rise)
    policy = ShearingPolicy(anatomy_of(tiny_config("llama")), {"ffn": 12, "layers": 2}, shearing)
    # of 48 channels three quarters go, of three layers one; the rise takes 80 of 100 steps
    for space, share in (("ffn", 3 / 4), ("layers", 1 / 3)):
        goals = [policy.goal(space, step, 100) for step in (0, 20, 40, 60, 80, 99)]
        assert goals == pytest.approx([share * part for part in risen])
    immediate = ShearingPolicy(policy.anatomy, {"ffn": 12}, Shearing(warmup=0.0, rise=rise))
    assert immediate.goal("ffn", 0, 100) == pytest.approx(3 / 4)


def test_gates_follow_targets_that_rise_through_the_whole_run() -> None:
    model, events = tiny_model("llama"), []
    shearing = Shearing(warmup=0.9, rise="cubic", learning_rate=2.0)
    policy = ShearingPolicy(anatomy_of(model.config), KEEP, shearing)
    settings = dataclasses.replace(SETTINGS, tokens=400 * 4 * LENGTH)
    result = train(model, windows(), [policy], settings, on_event=events.append)
    steps = {event["step"]: event for event in events if "closed/ffn" in event}
    # a third of the way through the rise; then where it is about over
    assert steps[121]["target/ffn"] == pytest.approx((1 - 20 / 48) * (1 - (2 / 3) ** 3))
    for step in (121, 241, 370):
        assert steps[step]["closed/ffn"] == pytest.approx(steps[step]["target/ffn"], abs=0.06)
    assert cut_(model, result.edits).shapes[0].ffn == 20


def test_penalty_by_hand() -> None:
    multipliers = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    share = torch.tensor([0.5, 0.1], dtype=torch.float64, requires_grad=True)
    value = penalty(share, 0.3, multipliers)
    # rows are off by 0.2 and -0.2: (0.4 + 0.12 - 0.4 + 0.12) / 2
    assert value.item() == pytest.approx(0.12)
    value.backward()
    assert multipliers.grad.tolist() == pytest.approx([0.0, 0.04])
    assert share.grad.tolist() == pytest.approx([(2 + 1.2) / 2, (2 - 1.2) / 2])


def test_gradients_of_gates_are_those_of_one_graph() -> None:
    """Gates drawn once a step, and gradients summed over micro-batches: as if all were one differentiable function."""
    model = tiny_model("llama")
    anatomy = anatomy_of(model.config)
    found: dict[str, torch.Tensor] = {}
    noise: dict[str, torch.Tensor] = {}

    class Heard(ShearingPolicy):
        def begin_step(self, step: int, rng: torch.Generator) -> None:
            state = rng.get_state()
            noise.update({space: torch.rand(a.shape, generator=rng) for space, a in self.log_alpha.items()})
            rng.set_state(state)
            super().begin_step(step, rng)

    class See(Policy):
        def after_backward(self, ctx: Any) -> None:
            found.update({space: a.grad.clone() for space, a in policy.log_alpha.items()})

    policy, reference = Heard(anatomy, KEEP, Shearing(learning_rate=0.0)), copy.deepcopy(model)
    settings = dataclasses.replace(SETTINGS, tokens=4 * LENGTH, clip=None)
    text = windows(4)
    train(model, text, [policy, See()], settings)
    # the same loss, with the gates multiplying what the units write
    log_alpha = {space: a.detach().clone().requires_grad_() for space, a in policy.log_alpha.items()}
    gates = {space: sample(a, noise[space]) for space, a in log_alpha.items()}
    for layer, block in enumerate(reference.model.layers):
        heads = gates["kv_group"][layer].repeat_interleave(2).repeat_interleave(8)
        block.mlp.down_proj.register_forward_pre_hook(lambda m, a, g=gates["ffn"][layer]: (a[0] * g,))
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, a, g=heads: (a[0] * g,))
        for linear in (block.mlp.down_proj, block.self_attn.o_proj):
            linear.register_forward_hook(lambda m, a, y, g=gates["layers"][layer]: y * g)
    reference(text, labels=text, use_cache=False).loss.backward()
    for space, a in log_alpha.items():
        torch.testing.assert_close(found[space], a.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("stop", [3, 37])
def test_resumes_to_the_bit(tmp_path: Any, stop: int) -> None:
    settings = dataclasses.replace(SETTINGS, checkpoint_every=1)

    class Stop(Exception):
        pass

    def halt(event: dict[str, Any]) -> None:
        if event.get("step") == stop + 1:
            raise Stop

    def start(folder: Any, on_event: Any = None) -> Any:
        model = tiny_model("llama")
        policy = ShearingPolicy(anatomy_of(model.config), KEEP, Shearing())
        result = train(
            model, windows(), [Distillation(tiny_model("llama", seed=1)), policy], settings, state_dir=folder,
            on_event=on_event,
        )  # fmt: skip
        return model, policy, result

    with pytest.raises(Stop):
        start(tmp_path, halt)
    (resumed, policy, result), (whole, other, expected) = start(tmp_path), start(None)
    assert result.losses == expected.losses and policy.dead == other.dead and result.edits[0] == expected.edits[0]
    for space, log_alpha in policy.log_alpha.items():
        assert torch.equal(log_alpha, other.log_alpha[space])
        assert torch.equal(policy.multipliers[space], other.multipliers[space])
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


@pytest.mark.parametrize("kept", [{}, {"hidden": 16, "query_head": 1}, {"query_head": 1}], ids=str)
def test_captured_gates_are_the_eager_ones_to_the_bit(monkeypatch: Any, kept: dict[str, int]) -> None:
    settings = dataclasses.replace(SETTINGS, tokens=16 * 4 * LENGTH, validate_every=3)
    monkeypatch.setattr(Traced, "made", [])

    class Capturing(ShearingPolicy):
        def attach(self, model: Any, settings: TrainSettings) -> None:
            super().attach(model, dataclasses.replace(settings, capture=True))

    def run(kind: type[ShearingPolicy]) -> Any:
        model, events = tiny_model("llama"), []
        policy = kind(anatomy_of(model.config), {**KEEP, **kept}, Shearing(binary=0.25))
        policies = [Distillation(tiny_model("llama", seed=1)), policy]
        result = train(model, windows(), policies, settings, validation=windows(2), on_event=events.append)
        times = ("tokens_per_second", "eta_seconds", "flops_utilisation")
        events = [{key: value for key, value in event.items() if key not in times} for event in events]
        return model.state_dict(), policy, result.losses, result.edits, events

    zero_grad = Optimizers.zero_grad
    # as the loop does where a step is captured
    monkeypatch.setattr(Optimizers, "zero_grad", lambda self, keep: zero_grad(self, keep=True))
    eager = run(ShearingPolicy)
    monkeypatch.setattr(sheared_llama, "Captured", Traced)
    captured = run(Capturing)
    # four steps of sixteen are binary
    assert [(step.calls, step.graph is not None) for step in Traced.made] == [(12, True), (12, True)]
    assert eager[2:] == captured[2:]
    for space, log_alpha in eager[1].log_alpha.items():
        assert torch.equal(log_alpha, captured[1].log_alpha[space])
        assert torch.equal(eager[1].multipliers[space], captured[1].multipliers[space])
    for name, tensor in eager[0].items():
        assert torch.equal(tensor, captured[0][name]), name


def test_learned_gradients_are_those_of_the_formulas() -> None:
    """Several spaces at once, against each by itself as the paper has it."""
    shapes = {"layers": (3,), "kv_group": (3, 2), "query_head": (3, 2, 4), "ffn": (3, 5)}
    torch.manual_seed(0)
    for corrected in (True, False):
        gates = GateStep(shapes, 4, corrected, torch.device("cpu"))
        for tensor in (gates.log_alpha, gates.multipliers):
            tensor.normal_()
        gates.noise.uniform_()
        gates.draw()
        goals = {"layers": 0.1, "kv_group": 0.4, "query_head": 0.7, "ffn": 0.2}
        gates.goals.copy_(torch.tensor([goal for space, goal in goals.items() for _ in range(gates.rows[space])]))
        slopes = {kind: torch.randn(3, *gates.leaves[kind][0].shape) for kind in gates.leaves}
        for kind, leaves in gates.leaves.items():
            for leaf, slope in zip(leaves, slopes[kind], strict=True):
                leaf.grad.copy_(slope)
        gates.learn()
        log_alpha = {k: a.clone().double().requires_grad_() for k, a in gates.parts(gates.log_alpha).items()}
        multipliers = gates.multipliers.clone().double().requires_grad_()
        z = {k: sample(a, gates.parts(gates.noise)[k].double()) for k, a in log_alpha.items()}
        heads = (z["query_head"] * z["kv_group"][..., None]).flatten(1)
        used = {"layers": z["layers"], "ffn": z["ffn"], "heads": heads}
        loss = sum((used[kind] * slopes[kind].double()).sum() for kind in used)
        lagrangian = 0
        for (space, a), (first, second) in zip(log_alpha.items(), multipliers, strict=True):
            off = sparsity(a, corrected=corrected) - goals[space]
            lagrangian = lagrangian + (first * off + second * off**2).mean()
        (loss + lagrangian).backward()
        for kind, values in used.items():
            torch.testing.assert_close(torch.stack(gates.leaves[kind]), values.float())
        for space, slope in gates.parts(gates.slopes).items():
            torch.testing.assert_close(slope, log_alpha[space].grad.float(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(gates.multiplier_slopes, multipliers.grad.float(), atol=1e-6, rtol=1e-4)
        assert gates.lagrangian.item() == pytest.approx(lagrangian.item(), abs=1e-5)
        shares = [sparsity(a, corrected=corrected).mean().item() for a in log_alpha.values()]
        assert gates.closed.tolist() == pytest.approx(shares, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_linears_come_back_where_gates_are_on_outputs_alone(family: str) -> None:
    model = tiny_model(family)
    modules = dict(model.named_modules())
    policy = ShearingPolicy(anatomy_of(model.config), {"layers": 2, "hidden": 16}, Shearing())
    train(model, windows(), [policy], dataclasses.replace(SETTINGS, tokens=4 * LENGTH))
    assert all(module is modules[name] for name, module in model.named_modules())


def test_a_compiled_block_keeps_no_more_with_gates_than_without() -> None:
    settings = dataclasses.replace(SETTINGS, length=64, compile=True)
    kept = []
    for gated in (False, True):
        activations = []
        for layers in (2, 4):
            torch.compiler.reset()
            model = tiny_model("llama", num_hidden_layers=layers)
            shapes = gate_shapes(anatomy_of(model.config))
            keep = {space: shape[-1] - 1 for space, shape in shapes.items()}
            policies = [ShearingPolicy(anatomy_of(model.config), keep, Shearing())] if gated else []
            activations.append(training_memory(model, settings, policies, compute=torch.bfloat16).activations)
        kept.append(activations[1] - activations[0])
    # the gates themselves, and nothing as large as what a linear writes
    assert kept[0] <= kept[1] < kept[0] + 2 * 2 * 64 * 32 * 2


def test_counts_that_the_model_has_not() -> None:
    anatomy = anatomy_of(tiny_config("llama"))
    with pytest.raises(ShearlingError, match="target: ffn = 49; the model has 48"):
        ShearingPolicy(anatomy, {"ffn": 49}, Shearing())
    with pytest.raises(ShearlingError, match="target: layers = 0; the model has 3"):
        ShearingPolicy(anatomy, {"layers": 0}, Shearing())
    with pytest.raises(ShearlingError, match="nothing would be cut"):
        ShearingPolicy(anatomy, {"layers": 3}, Shearing())


def test_nothing_is_gated_where_nothing_is_cut() -> None:
    policy = ShearingPolicy(anatomy_of(tiny_config("llama")), {"ffn": 48, "layers": 2}, Shearing())
    assert set(policy.log_alpha) == {"layers"}


def test_the_bound_holds_gates() -> None:
    model = tiny_model("llama")
    policy = ShearingPolicy(anatomy_of(model.config), {"ffn": 8}, Shearing(learning_rate=5.0))
    train(model, windows(), [policy], SETTINGS)
    assert policy.log_alpha["ffn"].abs().max() <= LIMIT + 1e-6
    assert closed(policy.log_alpha["ffn"]).min() > 0.002
