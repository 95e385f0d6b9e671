"""Budgets in milliseconds: what is timed, what follows from it, and what is proposed."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import shearling.commands as commands
import shearling.run as running
from shearling.anatomy import anatomy_of
from shearling.errors import ShearlingError
from shearling.evaluate import Workload, measure_latency, step_time
from shearling.evaluate.latency import shapes_to_measure
from shearling.plan import Width, inventory_of, propose_shapes
from shearling.recipe import parse_recipe
from tests.test_cli import command as command
from tests.test_cli import refused
from tests.test_run import sheared
from tests.test_target import LLAMA2_7B, SMOLLM2, on_meta
from tests.tiny import tiny_config, tiny_folder, tiny_model

WORK = Workload()


class Clock:
    """Times by a formula, instead of a model; ``asked`` are the configs that were to be timed."""

    def __init__(self, scale: float = 1.0, stop: float = math.inf) -> None:
        self.asked: list[Any] = []
        self.scale, self.stop = scale, stop

    def __call__(self, config: Any, workload: Workload, dtype: torch.dtype, device: torch.device) -> float:
        if len(self.asked) >= self.stop:
            raise KeyboardInterrupt
        self.asked.append(config)
        width = Width(config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
        return self.scale * formula(config.vocab_size, config.num_hidden_layers, width, config.intermediate_size)


def formula(words: int, layers: int, width: Width, ffn: int) -> float:
    """Milliseconds that go with the bytes read, after some for the start."""
    attention = width.hidden * (2 * width.heads + 5 * width.kv_heads) * 2e-6
    return 1e-3 + words * width.hidden * 1e-8 + layers * (attention + width.hidden * ffn * 2e-7)


def measured(config: Any, file: Path, clock: Any, **options: Any) -> Any:
    return measure_latency(config, options.pop("workload", WORK), file=file, timer=clock, **options)


@pytest.mark.parametrize("size", [SMOLLM2, LLAMA2_7B], ids=["smollm2", "llama2-7b"])
def test_times_of_all_shapes_follow_from_those_of_one_and_two_blocks(size: dict[str, Any], tmp_path: Path) -> None:
    clock, config = Clock(), tiny_config("llama", **size)
    costs = measured(config, tmp_path / "times.json", clock).costs()
    for width, cost in costs.items():
        for layers, ffn in ((1, 64), (7, 448), (30, 1536)):
            assert cost(layers, ffn) == pytest.approx(formula(config.vocab_size, layers, width, ffn))
    assert Width(config.hidden_size, config.num_attention_heads, config.num_key_value_heads) in costs
    assert max(asked.num_hidden_layers for asked in clock.asked) == 2
    # the head, and so most of the memory, is there once for each hidden size
    assert sum(asked.vocab_size > 256 for asked in clock.asked) == len({width.hidden for width in costs}) <= 10
    assert len(clock.asked) <= 250


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("size", [SMOLLM2, LLAMA2_7B], ids=["smollm2", "llama2-7b"])
def test_proposals_use_a_budget_and_never_exceed_it(size: dict[str, Any], budget: float, tmp_path: Path) -> None:
    model = on_meta("llama", **size)
    config, anatomy, inventory = model.config, anatomy_of(model.config), inventory_of(model)
    costs = measured(config, tmp_path / "times.json", Clock()).costs()
    own = Width(config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    whole = formula(config.vocab_size, config.num_hidden_layers, own, config.intermediate_size)
    found = propose_shapes(anatomy, inventory, budget, "milliseconds", measured=costs)
    names = [proposal.name for proposal in found]
    assert names == ["balanced", "deeper", "shallower", *([] if budget == 0.8 else ["stream"]), "depth"]
    for proposal in found[:-1]:
        target = proposal.target
        width = Width(target.hidden, target.heads, target.kv_heads)
        took = formula(config.vocab_size, target.layers, width, target.ffn)
        # a step of 64 channels is 3 % of the small model
        assert budget * whole * (0.96 if size is SMOLLM2 else 0.98) <= took <= budget * whole
        more = formula(config.vocab_size, target.layers, width, target.ffn + 64)
        assert more > budget * whole or target.ffn == config.intermediate_size
        assert proposal.milliseconds == pytest.approx(took)
        assert proposal.share == pytest.approx(took / whole)
        assert proposal.row()[-1] == f"{took:.3f}"
    if budget * whole >= 1:
        assert propose_shapes(anatomy, inventory, budget * whole, "milliseconds", measured=costs) == found


def test_times_with_steps_and_noise_never_fall_with_the_size(tmp_path: Path) -> None:
    clock = Clock()

    def stepped(config: Any, *rest: Any) -> float:
        noise = torch.rand(1, generator=torch.Generator().manual_seed(len(clock.asked))).item()
        return clock(config, *rest) + 0.3 * math.ceil(config.intermediate_size / 512) + 0.2 * noise

    latency = measured(tiny_config("llama", **SMOLLM2), tmp_path / "times.json", stepped)
    for cost in latency.costs().values():
        for layers in (1, 30):
            times = [cost(layers, ffn) for ffn in range(64, 1537, 64)]
            assert times == sorted(times) and times[0] >= 0
        assert cost(2, 640) >= cost(1, 640)
    full = latency.costs()[Width(576, 9, 3)]
    for shape, time in latency.block.items():
        if shape.width == Width(576, 9, 3):
            assert full(1, shape.ffn) >= latency.base[576] + time


def test_nothing_is_timed_twice(tmp_path: Path) -> None:
    config, file = tiny_config("llama", **SMOLLM2), tmp_path / "deep" / "times.json"
    first = Clock()
    expected = measured(config, tmp_path / "other.json", first)
    broken = Clock(stop=20)
    with pytest.raises(KeyboardInterrupt):
        measured(config, file, broken)
    events: list[dict[str, Any]] = []
    second = Clock()
    assert measured(config, file, second, on_event=events.append) == expected
    assert len(broken.asked) + len(second.asked) == len(first.asked)
    assert events[-1] == {"stage": "latency", "done": len(events), "total": len(events)}
    silent = Clock(stop=0)
    assert measured(config, file, silent) == expected
    for changes in ({"dtype": torch.bfloat16}, {"workload": Workload(batch=2)}):
        with pytest.raises(KeyboardInterrupt):
            measured(config, file, silent, **changes)
    with pytest.raises(KeyboardInterrupt):
        measured(tiny_config("llama", **{**SMOLLM2, "vocab_size": 1000}), file, silent)


def test_a_busy_device_is_measured_again_and_then_named(tmp_path: Path) -> None:
    config, clock, busy = tiny_config("llama"), Clock(), [1.0, 1.0, 5.0]

    def disturbed(of: Any, *rest: Any) -> float:
        return clock(of, *rest) + (busy.pop() if of.num_hidden_layers == 1 and busy else 0.0)

    expected = measured(config, tmp_path / "quiet.json", Clock())
    with pytest.raises(ShearlingError, match=r"^latency: two blocks took no longer than one; measure while[^\n]*$"):
        measured(config, tmp_path / "times.json", disturbed)
    busy.extend([1.0, 1.0])
    assert measured(config, tmp_path / "times.json", disturbed) == expected


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    file.write_text("[1]")
    with pytest.raises(ShearlingError, match=r"^[^\n]*times.json: holds no latencies; remove it[^\n]*$"):
        measured(tiny_config("llama"), file, Clock())
    with pytest.raises(ShearlingError, match=r"^latency: context: 200 tokens exceed the 128 learned positions"):
        measure_latency(tiny_config("gpt2"), Workload("prefill", 1, 200), file=tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()
    model = tiny_model("llama")
    with pytest.raises(ShearlingError, match="budget = 0.5 milliseconds: needs the model measured first"):
        propose_shapes(anatomy_of(model.config), inventory_of(model), 0.5, "milliseconds")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "phi3"])
def test_blocks_of_every_kind_of_family_are_timed(family: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(step_time, "FLUSH", 1)
    config, file = tiny_config(family), tmp_path / "times.json"
    phase: Any = "prefill" if family == "gemma3_text" else "decode"
    latency = measure_latency(config, Workload(phase, 2, 8), file=file)
    shapes = list(shapes_to_measure(anatomy_of(config)))
    assert set(latency.block) == set(shapes)
    assert set(latency.base) == {shape.width.hidden for shape in shapes}
    assert all(0 <= time < math.inf for time in latency.base.values())
    assert all(0 < time < math.inf for time in latency.block.values())
    ((key, times),) = json.loads(file.read_text()).items()
    assert f"{family} " in key and f"phase {phase}, batch 2, context 8" in key
    assert len(times) == len(latency.base) + len(latency.block)


@pytest.fixture
def formal(monkeypatch: Any, tmp_path: Path) -> Any:
    """Commands and runs that time by the formula."""
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "cache"))

    def with_clock(clock: Clock) -> None:
        monkeypatch.setattr(commands, "measure_latency", functools.partial(measure_latency, timer=clock))

    with_clock(Clock())
    return with_clock


def test_shapes_of_a_latency(tmp_path: Path, command: Any, formal: Any) -> None:
    dense = tiny_folder(tmp_path / "dense")
    options = ("--batch", 2, "--context", 64, "--device", "cpu")
    code, table, err = command("shapes", dense, "--latency", 0.8, *options)
    assert code == 0, err
    words = " ".join(table.split())
    assert "milliseconds" in words and "0.8 milliseconds of decode, batch 2, context 64, float32, on cpu" in words
    assert "latency: " in err
    code, text, err = command("shapes", dense, "--latency", 0.8, *options, "--json")
    assert code == 0 and "latency: " not in err
    (first, *_) = json.loads(text)
    target = first["target"]
    width = Width(target["hidden"], target["heads"], target["kv_heads"])
    assert first["milliseconds"] == pytest.approx(formula(97, target["layers"], width, target["ffn"]))
    assert first["share"] <= 0.8
    refused(command("shapes", dense, "--latency", 9, *options), "budget = 9 milliseconds: must be above 0 and below")
    refused(command("shapes", dense, "--latency", 0.01, *options), "the smallest shape of this grid has 0.00")
    refused(command("shapes", dense, "--latency", -1), "shapes: latency = -1.0: must be greater than 0")
    refused(command("shapes", dense, "--flops", 0.5, "--batch", 2), "has batch, which only a latency is measured by")
    refused(command("shapes", dense, "--latency", 0.5, "--phase", "both"), "phase = 'both': must be 'decode' or")


@pytest.mark.parametrize("stage", ["shear", "prune"])
def test_a_run_within_a_latency_keeps_to_the_shape_it_began_with(
    stage: str, tmp_path: Path, command: Any, formal: Any
) -> None:
    content = yaml.safe_load(sheared(tmp_path).dump())
    content["stages"] = content["stages"][:1]
    if stage == "prune":
        content["stages"][0] = {"stage": "prune", "method": "minitron"}
    content["stages"][0]["target"] = {"latency": 0.8, "context": 64}
    recipe, file = parse_recipe(content), tmp_path / "latency.yaml"
    file.write_text(yaml.safe_dump(content))
    code, table, err = command("plan", file)
    assert code == 0 and "milliseconds" in table, err

    def strike(event: dict[str, Any]) -> None:
        if event.get("stage") == "dense":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        running.run(recipe, tmp_path / "out", on_event=strike)
    recorded = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["stages"][0]["target"]
    assert set(recorded) == {"layers", "hidden", "heads", "kv_heads", "ffn"}
    # what is kept of the measurements may be gone, or the device another one
    (tmp_path / "cache" / "latency.json").unlink()
    formal(Clock(stop=0))
    metrics = running.run(recipe, tmp_path / "out", resume=True)
    assert metrics["pruned"]["parameters"] < metrics["dense"]["parameters"]
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert [config["num_hidden_layers"], config["intermediate_size"]] == [recorded["layers"], recorded["ffn"]]
    content["stages"][0]["target"]["latency"] = 0.7
    with pytest.raises(KeyboardInterrupt):
        running.run(parse_recipe(content), tmp_path / "out", resume=True)
