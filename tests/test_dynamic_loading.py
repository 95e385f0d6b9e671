"""Dynamic batch loading: the rule by hand, references against the paper's table, and training with both."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from shearling.anatomy import anatomy_of
from shearling.data import Domains
from shearling.errors import ShearlingError
from shearling.methods.dynamic_loading import DynamicLoading, reweighted
from shearling.methods.ig_lora import LoRAPolicy
from shearling.methods.reference_losses import fit_scaling_law, reference_losses, source_losses
from shearling.train import (
    CachedTeacher,
    Distillation,
    Policy,
    TrainSettings,
    affordable_windows,
    cache_teacher,
    train,
)
from shearling.train.sampler import MixtureSampler
from shearling.train.world import World
from tests.tiny import VOCAB, tiny_model, tiny_tokens

LENGTH = 12
SETTINGS = TrainSettings(
    tokens=8 * 4 * LENGTH, length=LENGTH, batch=4, micro_batch=4, learning_rate=1e-2, log_every=1, checkpoint_every=1,
    validate_every=3,
)  # fmt: skip
REFERENCE = {"web": 4.0, "code": 3.0, "books": 50.0}


def some_domains(**weights: float) -> Domains:
    parts = {name: tiny_tokens(count, LENGTH, seed=count) for name, count in (("web", 9), ("code", 5), ("books", 3))}
    return Domains(parts, weights or None)


def held_out() -> dict[str, torch.Tensor]:
    return {name: tiny_tokens(2, LENGTH, seed=20 + n) for n, name in enumerate(REFERENCE)}


# --- the rule

LN2 = math.log(2)


@pytest.mark.parametrize(
    ("weights", "excess", "changes", "expected"),
    [
        # the paper: an excess below 0 counts as 0
        ([1 / 2, 1 / 4, 1 / 4], [LN2, 0, -1], {}, [2 / 3, 1 / 6, 1 / 6]),
        ([1 / 2, 1 / 4, 1 / 4], [LN2, 0, -1], {"eta": 2.0}, [0.8, 0.1, 0.1]),
        ([1 / 2, 1 / 2, 0], [0, LN2, 9], {}, [1 / 3, 2 / 3, 0]),
        ([0.3, 0.7], [-1, -2], {}, [0.3, 0.7]),
        # the authors' code: it counts, and a share is dealt out evenly
        ([1 / 2, 1 / 4, 1 / 4], [LN2, 0, -LN2], {"clamp": False}, [8 / 11, 2 / 11, 1 / 11]),
        ([1 / 2, 1 / 4, 1 / 4], [LN2, 0, -LN2], {"clamp": False, "smoothing": 0.12}, [0.68, 0.2, 0.12]),
        ([1, 0], [0, 0], {"clamp": False, "smoothing": 1e-4}, [1 - 5e-5, 5e-5]),
        # raised to the floor, the rest scaled down, which may send another one below
        ([0.9, 0.06, 0.04], [0, 0, 0], {"floor": 0.05}, [0.95 * 0.9 / 0.96, 0.95 * 0.06 / 0.96, 0.05]),
        ([0.04, 0.88, 0.0505, 0.0295], [0, 0, 0, 0], {"floor": 0.05}, [0.05, 0.85, 0.05, 0.05]),
        ([0.9, 0.1], [5, 0], {"floor": 0.5}, [0.5, 0.5]),
        # nothing follows from a loss that is not finite
        ([0.9, 0.1], [math.nan, 0], {}, [0.9, 0.1]),
        ([0.9, 0.1], [1, math.inf], {"floor": 0.2}, [0.9, 0.1]),
    ],
)
def test_the_rule_by_hand(weights: list[float], excess: list[float], changes: dict, expected: list[float]) -> None:
    rule: dict[str, Any] = {"eta": 1.0, "clamp": True, "smoothing": 0.0, "floor": 0.0, **changes}
    new = reweighted(torch.tensor(weights, dtype=torch.float64), torch.tensor(excess, dtype=torch.float64), **rule)
    assert new.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_a_constant_gap_multiplies_the_odds_at_every_validation() -> None:
    weights = torch.tensor([0.2, 0.8], dtype=torch.float64)
    for _ in range(64):
        excess = torch.tensor([0.13, 0.1], dtype=torch.float64)
        weights = reweighted(weights, excess, eta=1.0, clamp=True, smoothing=0.0, floor=0.0)
    assert math.log(weights[0] / weights[1]) == pytest.approx(math.log(0.25) + 64 * 0.03, rel=1e-10)


share = st.floats(0, 1)


@settings(max_examples=200, deadline=None)
@given(
    domains=st.lists(
        st.tuples(st.floats(0, 1), st.floats(allow_nan=True, allow_infinity=True)), min_size=1, max_size=8
    ),
    eta=st.floats(1e-6, 1e6),
    clamp=st.booleans(),
    smoothing=share,
    floor=share,
)
def test_weights_stay_weights(
    domains: list[tuple[float, float]], eta: float, clamp: bool, smoothing: float, floor: float
) -> None:
    """Whatever the losses do: finite, at least the floor, of sum 1."""
    weights = torch.tensor([weight for weight, _ in domains], dtype=torch.float64) + 1e-300
    weights /= weights.sum()
    excess = torch.tensor([loss for _, loss in domains], dtype=torch.float64)
    floor /= len(domains)
    new = reweighted(weights, excess, eta=eta, clamp=clamp, smoothing=smoothing, floor=floor)
    assert new.isfinite().all() and (new >= 0).all() and new.sum().item() == pytest.approx(1, abs=1e-12)
    if (eta * excess).isfinite().all():
        assert (new >= floor - 1e-12).all()
    else:
        assert clamp or torch.equal(new, weights)


@pytest.mark.parametrize(
    ("reference", "changes", "message"),
    [
        ({"a": math.nan}, {}, "reference: domain 'a' has nan; must be a finite loss"),
        ({"a": -1.0}, {}, "reference: domain 'a' has -1.0"),
        ({"a": 1.0}, {"eta": 0.0}, "eta=0.0: must be above 0"),
        ({"a": 1.0}, {"smoothing": 1.5}, "smoothing=1.5: must lie in 0 to 1"),
        ({"a": 1.0, "b": 1.0}, {"floor": 0.6}, "floor=0.6: must lie in 0 to 1 over the number of domains, 2"),
        ({"a": 1.0}, {"floor": -0.1}, "floor=-0.1"),
    ],
)
def test_bad_settings_are_named(reference: dict[str, float], changes: dict[str, float], message: str) -> None:
    with pytest.raises(ShearlingError, match=f"^{message}[^\n]*$"):
        DynamicLoading(reference, **changes)


# --- references

LLAMA2 = (6738415616, 13015864320, 68976648192)
SHEARED = (373867520, 1345423360, 2.7016e9)
#: losses of LLaMA-2 at 7B, 13B and 70B, and the references that the authors took from them at 370M, 1.3B and 2.7B
TABLE = {
    "cc": ((1.7520, 1.6680, 1.4621), (2.1401, 1.9643, 1.8712)),
    "github": ((0.6216, 0.5791, 0.4890), (0.8694, 0.7459, 0.6883)),
    "book": ((1.9063, 1.8242, 1.6450), (2.3625, 2.1393, 2.0325)),
    "stackexchange": ((1.4482, 1.3936, 1.2805), (1.7791, 1.6117, 1.5353)),
    "wiki": ((1.4844, 1.3945, 1.2118), (2.0470, 1.7590, 1.6297)),
    "arxiv": ((1.2637, 1.2109, 1.1148), (1.6637, 1.4449, 1.3560)),
    "c4": ((1.9219, 1.8486, 1.6848), (2.3139, 2.1251, 2.0328)),
}


@pytest.mark.parametrize("size", range(3))
def test_the_papers_references_come_out_to_the_last_digit(size: int) -> None:
    table = {name: dict(zip(LLAMA2, known, strict=True)) for name, (known, _) in TABLE.items()}
    found, doubts = reference_losses({**table, "own": 1.25}, round(SHEARED[size]))
    assert found.pop("own") == 1.25
    assert {name: round(loss, 4) for name, loss in found.items()} == {name: row[1][size] for name, row in TABLE.items()}
    assert len(doubts) == 1 and doubts[0].startswith(
        "scaling law of domain 'cc': c = -2.8 is below 0; its reference is"
    )


@settings(max_examples=60, deadline=None)
@given(
    a=st.floats(0.5, 500), b=st.floats(0.03, 0.8), c=st.floats(0, 3),
    sizes=st.lists(st.integers(80, 260), min_size=3, max_size=7, unique=True),
)  # fmt: skip
def test_a_law_is_found_again(a: float, b: float, c: float, sizes: list[int]) -> None:
    """From three points exactly, and from more that all obey it."""
    family = [10 ** (size / 20) for size in sizes]
    law = fit_scaling_law({n: a / n**b + c for n in family})
    for n in (min(family) / 3, *family):
        assert law.loss(n) == pytest.approx(a / n**b + c, rel=1e-6)


def test_more_points_are_fitted_by_least_squares() -> None:
    """No law close by, in any of its three numbers, has a smaller squared error."""
    noise = (0.01, -0.02, 0.015, 0.0, -0.01)
    family = {10.0**n: 30 / 10 ** (0.25 * n) + 1 + d for n, d in zip((6, 7, 8, 9, 10), noise, strict=True)}
    law = fit_scaling_law(family)

    def error(candidate: Any) -> float:
        return sum((candidate.loss(n) - loss) ** 2 for n, loss in family.items())

    for name in ("a", "b", "c"):
        for factor in (0.999, 1.001):
            assert error(dataclasses.replace(law, **{name: factor * getattr(law, name)})) > error(law)
    assert not law.doubts


@pytest.mark.parametrize(
    ("losses", "doubt"),
    [
        ({1e8: 1.0, 1e9: 2.0, 1e10: 2.5}, "a = .* is not above 0"),
        # falls ever faster: no power does
        ({1e8: 3.0, 1e9: 2.5, 1e10: 1.0}, "b = 0.001 lies outside 0.01 to 2.0, c = -.* is below 0"),
        ({1e8: 3.0, 1e9: 1.0, 1e10: 1.0}, "b = 4 lies outside"),
    ],
)
def test_unphysical_laws_are_doubted(losses: dict[float, float], doubt: str) -> None:
    found, doubts = reference_losses({"x": losses}, 10**9)
    assert math.isfinite(found["x"])
    assert len(doubts) == 1 and re.search(doubt, doubts[0])


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({1e8: 1.0, 1e9: 2.0}, "2 models are too few"),
        ({0: 3.0, 1e9: 2.0, 1e10: 1.5}, "a loss of 3.0 at 0 parameters"),
        ({1e8: math.nan, 1e9: 2.0, 1e10: 1.5}, "a loss of nan at"),
    ],
)
def test_families_that_make_no_law(losses: dict[float, float], message: str) -> None:
    with pytest.raises(ShearlingError, match=f"^scaling law: {message}[^\n]*$"):
        fit_scaling_law(losses)


def test_a_source_is_scored_as_the_model_itself() -> None:
    model, parts = tiny_model("llama"), held_out()
    with torch.no_grad():
        expected = {name: model(part, labels=part).loss.item() for name, part in parts.items()}
    assert source_losses(model, parts, SETTINGS, World()) == pytest.approx(expected, rel=1e-5)


# --- training


class Watch(Policy):
    """Notes which windows were read."""

    def __init__(self) -> None:
        self.indices: list[torch.Tensor] = []

    def after_step(self, ctx: Any) -> None:
        self.indices.append(ctx.indices.clone())

    def state_dict(self) -> dict[str, Any]:
        return {"indices": [indices.tolist() for indices in self.indices]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.indices = [torch.tensor(indices) for indices in state["indices"]]


def test_weights_follow_the_losses_and_batches_follow_the_weights() -> None:
    events: list[dict[str, Any]] = []
    watch, model, domains = Watch(), tiny_model("llama"), some_domains(web=2, code=1, books=1)
    loading = DynamicLoading(REFERENCE, eta=0.5, smoothing=0.0)
    result = train(model, domains, [watch, loading], SETTINGS, validation=held_out(), on_event=events.append)
    steps = {event["step"]: event for event in events if "loss" in event}
    scored = {event["step"]: event for event in events if "validation_loss" in event}
    assert list(scored) == [3, 6, 8]
    weights = {"web": 0.5, "code": 0.25, "books": 0.25}
    sampler = MixtureSampler(domains, SETTINGS.seed)
    for step in range(1, 9):
        told = {name: steps[step][f"weight/{name}"] for name in weights}
        assert told == pytest.approx(weights, rel=1e-12)
        sampler.weights = told
        assert torch.equal(watch.indices[step - 1], sampler.take(4))
        assert sum(steps[step][f"tokens/{name}"] for name in weights) == steps[step]["tokens"]
        if step in scored:
            event = scored[step]
            losses = {name: event[f"validation_loss/{name}"] for name in weights}
            assert event["validation_loss"] == pytest.approx(sum(losses.values()) / 3)
            excess = {name: losses[name] - REFERENCE[name] for name in weights}
            assert {name: event[f"excess_loss/{name}"] for name in weights} == pytest.approx(excess)
            grown = {name: weights[name] * math.exp(0.5 * max(0.0, excess[name])) for name in weights}
            weights = {name: value / sum(grown.values()) for name, value in grown.items()}
    assert result.weights == pytest.approx(weights, rel=1e-12)
    assert result.weights["books"] < 0.25 < 0.5 < result.weights["web"] + result.weights["code"]
    with torch.no_grad():
        expected = {name: model(part, labels=part).loss.item() for name, part in held_out().items()}
    assert {name: scored[8][f"validation_loss/{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_domains_alone_keep_their_weights_and_one_text_has_none() -> None:
    domains = some_domains(web=2, code=1, books=1)
    result = train(tiny_model("llama"), domains, [], SETTINGS, validation=held_out()["web"])
    assert result.weights == {"web": 0.5, "code": 0.25, "books": 0.25}
    events: list[dict[str, Any]] = []
    result = train(tiny_model("llama"), tiny_tokens(9, LENGTH), [], SETTINGS, on_event=events.append)
    assert result.weights == {} and not any("/" in key for event in events for key in event)


def test_the_best_parameters_are_those_of_the_best_mean() -> None:
    """The domains' losses are best at different steps."""
    events: list[dict[str, Any]] = []
    domains = some_domains(web=1, code=0, books=0)
    changes = {"learning_rate": 0.03, "validate_every": 1, "keep": "best", "tokens": 20 * 4 * LENGTH, "warmup": 0}
    parts = {"web": domains.parts["web"][torch.arange(2)], **{n: held_out()[n] for n in ("code", "books")}}
    steady = dataclasses.replace(SETTINGS, schedule="constant", **changes)
    result = train(tiny_model("llama"), domains, [], steady, validation=parts, on_event=events.append)
    scored = [event for event in events if "validation_loss" in event]
    means = [sum(event[f"validation_loss/{name}"] for name in parts) / 3 for event in scored]
    assert result.best_step == 1 + means.index(min(means))
    web = [event["validation_loss/web"] for event in scored]
    assert result.best_step != 1 + web.index(min(web))


class Stop(Exception):
    pass


@pytest.mark.parametrize(("at", "scoring"), [(2, False), (3, True), (5, False), (6, False)])
def test_resuming_in_the_middle_of_an_interval_changes_no_bit(at: int, scoring: bool, tmp_path: Path) -> None:
    def start(folder: Path | None, on_event: Any) -> tuple[Any, Any, Watch]:
        model, watch = tiny_model("llama"), Watch()
        loading = DynamicLoading(REFERENCE, eta=0.5, clamp=False)
        domains = some_domains(web=2, code=1, books=1)
        policies = [watch, loading]
        result = train(model, domains, policies, SETTINGS, validation=held_out(), state_dir=folder, on_event=on_event)
        return model, result, watch

    def stop(event: dict[str, Any]) -> None:
        if event["step"] == at and ("validation_loss" if scoring else "loss") in event:
            raise Stop

    expected: list[dict[str, Any]] = []
    model, result, watch = start(None, expected.append)
    with pytest.raises(Stop):
        start(tmp_path, stop)
    events: list[dict[str, Any]] = []
    other, resumed, watched = start(tmp_path, events.append)
    assert events.pop(0) == {"step": at - 1, "resumed": True}
    assert resumed.losses == result.losses and resumed.weights == result.weights
    assert all(torch.equal(a, b) for a, b in zip(watched.indices, watch.indices, strict=True))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    running = ("tokens_per_second", "eta_seconds")
    told = [[{k: v for k, v in e.items() if k not in running} for e in found] for found in (events, expected)]
    assert told[0] == [event for event in told[1] if event["step"] >= at]


def test_a_cached_teacher_finds_the_windows_of_every_domain(tmp_path: Path) -> None:
    """It is cached in the domains' order and read in the mixture's, beside LoRA and changing weights."""
    domains, teacher = some_domains(web=1, code=1, books=1), tiny_model("llama", seed=3)
    cached = cache_teacher(teacher, domains, tmp_path, k=VOCAB)
    found = []
    for source in (teacher, CachedTeacher(tmp_path, some_domains(web=1, code=8, books=1))):
        model = tiny_model("llama")
        lora = LoRAPolicy(anatomy_of(model.config), [2, 3, 4])
        policies = [lora, Distillation(source), DynamicLoading(REFERENCE)]
        found.append(train(model, domains, policies, SETTINGS, validation=held_out()))
    assert cached.count == len(domains)
    assert found[1].losses == pytest.approx(found[0].losses, rel=1e-3)
    assert found[1].weights == pytest.approx(found[0].weights, rel=1e-3)
    assert found[1].weights != domains.weights


def test_other_weights_at_the_start_are_another_run(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, tokens=4 * LENGTH)
    train(tiny_model("llama"), some_domains(web=1, code=1, books=1), [], settings, state_dir=tmp_path)
    with pytest.raises(ShearlingError, match="holds a run with domains=.*'web': 0.33.*, this one has .*'web': 0.5"):
        train(tiny_model("llama"), some_domains(web=2, code=1, books=1), [], settings, state_dir=tmp_path)


def test_a_domain_that_runs_out_is_read_again_and_says_so() -> None:
    events: list[dict[str, Any]] = []
    result = train(tiny_model("llama"), some_domains(web=0, code=1, books=1), [], SETTINGS, on_event=events.append)
    warned = [(event["step"], event["warning"]) for event in events if "warning" in event]
    # 16 windows of each: 5 are read to their end three times, 3 five times
    code = [f"domain 'code': all 5 windows were read, epoch {epoch} begins" for epoch in (2, 3, 4)]
    books = [f"domain 'books': all 3 windows were read, epoch {epoch} begins" for epoch in (2, 3, 4, 5, 6)]
    assert sorted(text for _, text in warned) == sorted(code + books)
    assert [step for step, _ in warned] == sorted(step for step, _ in warned)
    assert result.skipped == 0 and len(result.losses) == 8


@pytest.mark.parametrize(
    ("windows", "reference", "validation", "changes", "message"),
    [
        ("one", REFERENCE, "all", {}, "dynamic loading: the windows have no domains"),
        ("all", REFERENCE, "one", {}, "validation: misses the domain 'web'"),
        ("all", REFERENCE, None, {}, "validation: misses the domain 'web'"),
        ("all", REFERENCE, ["web", "code"], {}, "validation: misses the domain 'books'"),
        ("all", {"web": 1.0, "code": 1.0}, "all", {}, "reference: misses the domain 'books'"),
        (
            "all",
            {**REFERENCE, "wiki": 1.0},
            "all",
            {},
            "reference: unknown domain 'wiki'; must be one of web, code, books",
        ),
        ("all", REFERENCE, "all", {"validate_every": 0}, "validate_every=0: weights would never change"),
        ("all", REFERENCE, [], {}, "validation: has no domains"),
        ("all", REFERENCE, "empty", {}, r"validation/code: shape \(0, 12\); must be"),
    ],
)
def test_what_does_not_go_together_is_said_before_training(
    windows: str, reference: dict[str, float], validation: Any, changes: dict[str, Any], message: str
) -> None:
    parts = held_out()
    kinds = {"one": parts["web"], "all": parts, None: None, "empty": {**parts, "code": parts["code"][:0]}}
    chosen = {name: parts[name] for name in validation} if isinstance(validation, list) else kinds[validation]
    watch, model = Watch(), tiny_model("llama")
    text = some_domains() if windows == "all" else tiny_tokens(4, LENGTH)
    settings = dataclasses.replace(SETTINGS, **changes)
    with pytest.raises(ShearlingError, match=f"^{message}[^\n]*$"):
        train(model, text, [watch, DynamicLoading(reference)], settings, validation=chosen)
    assert not watch.indices


@pytest.mark.parametrize("frozen", [False, True])
def test_scoring_affordable_windows_takes_a_twentieth_of_the_flops(frozen: bool) -> None:
    """Counted by torch, over one interval of training on all weights or on next to none of them."""
    settings = dataclasses.replace(SETTINGS, tokens=6 * 40 * LENGTH, batch=40, micro_batch=40, validate_every=6)

    class Norms(Policy):
        def attach(self, model: Any, settings: TrainSettings) -> None:
            self.norm = model.model.layers[0].input_layernorm.weight

        def param_groups(self) -> list[dict[str, Any]]:
            return [{"params": [self.norm]}]

    def flops(validation: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            policies = [Norms()] if frozen else []
            train(tiny_model("llama"), tiny_tokens(40, LENGTH), policies, settings, validation=validation)
        return counter.get_total_flops()

    trained = 0.0 if frozen else 1.0
    count = affordable_windows(40, 6, 2, trained=trained)
    assert count == (12 if frozen else 18)
    plain, scored = flops(None), flops({name: tiny_tokens(count, LENGTH) for name in "ab"})
    assert 0.045 < (scored - plain) / plain < 0.051
    assert affordable_windows(8, 1, 7) == 1
