"""Several processes do what one does: gloo on the CPU, started by torchrun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file

from shearling.recipe import Recipe, load_recipe
from shearling.run import run
from tests.test_run import FOLLOWING, MASKED, adapting, made_small, only_training
from tests.world_child import KINDS, carry_out

ROOT = Path(__file__).parents[1]


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*LAUNCH, *map(str, arguments)]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    return torchrun(ROOT / "tests" / "world_child.py", *arguments)


def run_pair(recipe: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return torchrun("-m", "shearling.cli", "run", recipe, "--out", out, *more)


def metrics_of_pair(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What two processes measure of a recipe, in ``folder / "pair"``."""
    (folder / "pair.yaml").write_text(recipe.dump())
    done = run_pair(folder / "pair.yaml", folder / "pair")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "pair" / "metrics.json").read_text())


def result(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    for name in ("losses", "scores"):
        torch.testing.assert_close(torch.tensor(one[name]), torch.tensor(other[name]), rtol=0, atol=tolerance)
    for name, tensor in one["model"].items():
        torch.testing.assert_close(tensor, other["model"][name], rtol=0, atol=10 * tolerance)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # pytest's own processes share what the first of them launches
    folder = (
        tmp_path_factory.getbasetemp().parent
        if "PYTEST_XDIST_WORKER" in os.environ
        else tmp_path_factory.mktemp("twins")
    )
    out = folder / "two.pt"
    with FileLock(folder / "two.lock"):
        if not out.exists():
            done = launch(out, *KINDS)
            assert done.returncode == 0, done.stderr[-3000:]
    return result(out)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_follow_one(kind: str, twins: dict[str, Any]) -> None:
    alone = carry_out(kind)
    assert len(alone["losses"]) == 10 and len(alone["scores"]) == 3
    assert_same(twins[kind], alone, 1e-4)


def test_a_killed_pair_resumes_as_a_pair_to_the_bit_and_alone_within_tolerance(
    tmp_path: Path, twins: dict[str, Any]
) -> None:
    state = tmp_path / "state"
    struck = launch(tmp_path / "none", "distillation", "--state", state, "--kill", 6)
    assert struck.returncode != 0 and not (tmp_path / "none").exists()
    steps = [int(path.name.removeprefix("step-")) for path in state.glob("step-*")]
    assert steps and max(steps) in (4, 5)
    alone = tmp_path / "alone"
    shutil.copytree(state, alone)
    resumed = launch(tmp_path / "two.pt", "distillation", "--state", state)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    again, undisturbed = result(tmp_path / "two.pt")["distillation"], twins["distillation"]
    assert again["losses"] == undisturbed["losses"]
    for name, tensor in undisturbed["model"].items():
        assert torch.equal(again["model"][name], tensor), name
    single = carry_out("distillation", alone)
    assert_same(single | {"scores": undisturbed["scores"]}, undisturbed, 1e-4)


def test_the_twin_of_a_large_recipe_under_torchrun_ends_as_in_one_process(tmp_path: Path) -> None:
    """All that recipes/cfsp-llama3-8b-full.yaml says, but for a tiny model, few tokens, and no compiler."""
    content = made_small(yaml.safe_load((ROOT / "recipes" / "cfsp-llama3-8b-full.yaml").read_text()), tmp_path)
    content["stages"][1] |= {"batch": 8, "tokens": 1536, "learning_rate": 0.01, "checkpoint_every": 2, "compile": False}
    recipe = tmp_path / "twin.yaml"
    recipe.write_text(yaml.safe_dump(content))
    alone = run(load_recipe(recipe), tmp_path / "alone")
    done = run_pair(recipe, tmp_path / "pair")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report.html") == 1
    pair = json.loads((tmp_path / "pair" / "metrics.json").read_text())
    for stage in ("pruned", "recovered"):
        assert pair[stage]["perplexity"] == pytest.approx(alone[stage]["perplexity"], rel=1e-4)
    assert pair["recovered"]["perplexity"] != pair["pruned"]["perplexity"]
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("alone", "pair"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4)
    steps = [json.loads(line)["step"] for line in (tmp_path / "pair" / "metrics.jsonl").open() if '"loss"' in line]
    assert steps == sorted(set(steps))
    # a finished run is not done again, by as many processes as may come
    assert run_pair(recipe, tmp_path / "pair", "--resume").returncode == 0
    uneven = run_pair(recipe, tmp_path / "pair", "--set", "recover.batch=3")
    assert uneven.returncode != 0
    assert "recover.batch = 3: must be a multiple of 2 processes" in uneven.stderr


def test_training_alone_under_torchrun_ends_as_in_one_process(tmp_path: Path) -> None:
    recipe = only_training(tmp_path, method="full", distill=0.5)
    alone, pair = run(recipe, tmp_path / "alone"), metrics_of_pair(recipe, tmp_path)
    assert pair["recovered"]["perplexity"] == pytest.approx(alone["recovered"]["perplexity"], rel=1e-4)
    assert pair["recovered"]["perplexity"] < pair["dense"]["perplexity"]
    # as if killed when training was recorded and the model not yet saved: all train again
    shutil.rmtree(tmp_path / "pair" / "model")
    (tmp_path / "pair" / "state" / "finished.json").unlink()
    again = run_pair(tmp_path / "pair.yaml", tmp_path / "pair", "--resume")
    assert again.returncode == 0, again.stderr[-3000:]
    assert (tmp_path / "pair" / "model" / "config.json").exists()


def test_adapting_under_torchrun_ends_as_in_one_process(tmp_path: Path) -> None:
    recipe = adapting(tmp_path, MASKED, FOLLOWING)
    alone, pair = run(recipe, tmp_path / "alone"), metrics_of_pair(recipe, tmp_path)
    for stage in ("adapted", "pruned", "recovered"):
        assert pair[stage]["perplexity"] == pytest.approx(alone[stage]["perplexity"], rel=1e-4)
    # a helper that kept the model as it was loaded would follow another teacher
    told = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("alone", "pair"))
    ours, theirs = ([event["loss"] for event in events if "loss" in event] for events in told)
    assert len(ours) == 12 and ours == pytest.approx(theirs, rel=1e-3)
