"""Numbers of training in TensorBoard and trackio, with stand-ins for both packages."""

from __future__ import annotations

import json
import signal
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shearling.errors import ShearlingError
from shearling.recipe import Recipe
from shearling.run import Interrupted, run
from shearling.tracking import scalars
from tests.test_run import only_training


def installed(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """A module of that name that has just this content."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


class Writer:
    """A SummaryWriter that remembers."""

    def __init__(self, log_dir: str, purge_step: int) -> None:
        self.log_dir, self.purge_step = log_dir, purge_step
        self.told: list[tuple[str, float, int]] = []
        self.closed = False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.told.append((name, value, step))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    """The writers that TensorBoard's stand-in makes from now on."""
    made: list[Writer] = []

    def make(*args: Any, **named: Any) -> Writer:
        made.append(Writer(*args, **named))
        return made[-1]

    installed(monkeypatch, "tensorboard")
    installed(monkeypatch, "torch.utils.tensorboard", SummaryWriter=make)
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is called of trackio from now on: its name, positional and named arguments."""
    found: list[tuple[Any, ...]] = []
    functions = {
        name: lambda *args, _name=name, **named: found.append((_name, args, named))
        for name in ("init", "log", "finish")
    }
    installed(monkeypatch, "trackio", **functions)
    return found


def tracked(tmp_path: Path, track: str, **changes: Any) -> Recipe:
    return only_training(tmp_path, method="full", **changes).model_copy(update={"track": track})


def strike(event: dict[str, Any]) -> None:
    """A listener that stops the run after its third step."""
    if event.get("step") == 3:
        signal.raise_signal(signal.SIGTERM)


def test_only_steps_have_numbers() -> None:
    assert scalars({"stage": "recover", "step": 3, "steps": 9, "loss": 2.5, "skipped": 1, "warning": "w"}) == {
        "recover/loss": 2.5,
        "recover/skipped": 1,
    }
    assert scalars({"stage": "recover", "step": 3, "resumed": True}) == {}
    assert scalars({"stage": "measure", "block": 3, "seconds": 0.4}) == {}


def test_tensorboard_is_told_what_metrics_jsonl_has(tmp_path: Path, writers: list[Writer]) -> None:
    checks = {"validation": str(tmp_path / "calibration.txt"), "validation_windows": 2, "validate_every": 3}
    run(tracked(tmp_path, "tensorboard", **checks), tmp_path / "out")
    (writer,) = writers
    assert Path(writer.log_dir) == tmp_path / "out" / "tensorboard" and writer.closed
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    expected = [
        (name, value, json.loads(line)["step"]) for line in lines for name, value in scalars(json.loads(line)).items()
    ]
    assert writer.told == expected
    steps = {name: [step for told, _, step in writer.told if told == name] for name, _, _ in writer.told}
    assert steps["recover/loss"] == steps["recover/grad_norm"] == list(range(1, 7))
    assert steps["recover/validation_loss"] == [3, 6]


def test_a_resumed_run_goes_on_and_hides_what_it_repeats(tmp_path: Path, writers: list[Writer]) -> None:
    recipe = tracked(tmp_path, "tensorboard")
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "out", on_event=strike)
    run(recipe, tmp_path / "out", resume=True)
    # a finished run tells nothing
    run(recipe, tmp_path / "out", resume=True)
    assert [writer.purge_step for writer in writers] == [1, 4]
    assert all(writer.closed for writer in writers)
    assert [[step for name, _, step in w.told if name == "recover/loss"] for w in writers] == [[1, 2, 3], [4, 5, 6]]


def test_trackio_is_told_by_the_name_of_the_folder(tmp_path: Path, calls: list[tuple[Any, ...]]) -> None:
    recipe, out = tracked(tmp_path, "trackio"), tmp_path / "out"
    with pytest.raises(Interrupted):
        run(recipe, out, on_event=strike)
    run(recipe, out, resume=True)
    assert [name for name, _, _ in calls] == ["init", *["log"] * 3, "finish", "init", *["log"] * 3, "finish"]
    started = [named for name, _, named in calls if name == "init"]
    common = {"project": "out", "name": str(out), "config": recipe.model_dump(mode="json")}
    assert started == [{**common, "resume": "never"}, {**common, "resume": "allow"}]
    logged = [(args[0], named) for name, args, named in calls if name == "log"]
    assert [named for _, named in logged] == [{"step": step} for step in range(1, 7)]
    assert all(numbers["recover/loss"] > 0 for numbers, _ in logged)


def test_a_run_may_go_on_without_its_tracker(tmp_path: Path, writers: list[Writer]) -> None:
    recipe = tracked(tmp_path, "tensorboard")
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "out", on_event=strike)
    run(recipe.model_copy(update={"track": None}), tmp_path / "out", resume=True)
    assert len(writers) == 1


@pytest.mark.parametrize("package", ["tensorboard", "trackio"])
def test_a_missing_package_is_named_before_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ShearlingError, match=rf"^track = '{package}': needs .*pip install 'shearling\[track\]'$"):
        run(tracked(tmp_path, package), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["__init__", "add_scalar", "close"])
def test_a_tracker_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writers: list[Writer], place: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space\nleft")

    monkeypatch.setattr(Writer, place, fail)
    with pytest.raises(ShearlingError, match=r"^track = 'tensorboard': failed \(no space left\)[^\n]*$"):
        run(tracked(tmp_path, "tensorboard"), tmp_path / "out")
