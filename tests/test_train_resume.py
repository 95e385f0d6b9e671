from __future__ import annotations

import dataclasses
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from shearling.anatomy import anatomy_of
from shearling.errors import ShearlingError
from shearling.methods.ig_lora import LoRAPolicy
from shearling.nn import EffectiveLinear, MaskTransform, unwrap_, wrap_
from shearling.train import Policy, TrainSettings, train
from shearling.train.checkpoint import Checkpoints, checkpoints
from shearling.train.world import World
from tests.tiny import tiny_model, tiny_tokens

LENGTH = 12
SETTINGS = TrainSettings(
    tokens=8 * 4 * LENGTH, length=LENGTH, batch=4, micro_batch=2, learning_rate=1e-2, log_every=1, checkpoint_every=1
)


def some_windows():
    return tiny_tokens(10, LENGTH, seed=5)


class Masks(Policy):
    """Redraws masks from the step's generator, and keeps a count, an average and gates of its own optimizer."""

    def attach(self, model, settings):
        self.model = model
        self.linears = wrap_(model, [f"model.layers.{i}.mlp.up_proj" for i in range(3)])
        for linear in self.linears.values():
            linear.transforms.append(MaskTransform(torch.rand(linear.weight.shape) > 0.3))
        self.average, self.flips = torch.zeros(()), 0
        self.gate = nn.Parameter(torch.ones(32))

    def param_groups(self):
        return [{"params": list(self.model.parameters())}]

    def optimizer(self):
        return torch.optim.SGD([self.gate], lr=0.1, momentum=0.9)

    def begin_step(self, step, rng):
        if step % 3 == 2:
            for linear in self.linears.values():
                mask = linear.transforms[0].mask
                new = torch.rand(mask.shape, generator=rng) > 0.3
                self.flips += int((mask != new).sum())
                mask.copy_(new)

    def loss_terms(self, ctx):
        return {"gate": (ctx.hidden * self.gate).square().mean()}

    def after_step(self, ctx):
        self.average = 0.9 * self.average + 0.1 * self.gate.detach().mean()

    def finalize(self):
        unwrap_(self.model)
        return [self.flips, self.average.item(), *self.gate.tolist()]

    def state_dict(self):
        return {"average": self.average, "flips": self.flips, "gate": self.gate, "nested": {"a": [1, (2, None)]}}

    def load_state_dict(self, state):
        assert state["nested"] == {"a": [1, (2, None)]}
        self.average, self.flips = state["average"], state["flips"]
        self.gate.data.copy_(state["gate"])


def start(kind, folder, on_event=None, settings=SETTINGS):
    """Train a fresh model of a kind; returns it with the result."""
    model = tiny_model("gpt2" if kind == "full" else "llama")
    policies = {
        "full": lambda: [],
        "lora": lambda: [LoRAPolicy(anatomy_of(model.config), [2, 3, 4])],
        "masks": lambda: [Masks()],
    }[kind]()
    return model, train(model, some_windows(), policies, settings, state_dir=folder, on_event=on_event)


def assert_same_run(one, two):
    (model, result), (other, other_result) = one, two
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in other.named_modules()]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert result.losses == other_result.losses and len(result.losses) == 8
    if result.edits and isinstance(result.edits[0], int):
        assert result.edits == other_result.edits


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["full", "lora", "masks"])
@pytest.mark.parametrize(("every", "at"), [(1, 3), (3, 5), (3, 2)])
def test_an_exception_and_a_resume_change_no_bit(kind, every, at, tmp_path):
    settings = dataclasses.replace(SETTINGS, checkpoint_every=every)
    undisturbed = start(kind, None, settings=settings)

    def stop(event):
        if event["step"] == at:
            raise Stop

    with pytest.raises(Stop):
        start(kind, tmp_path, stop, settings)
    events = []
    resumed = start(kind, tmp_path, events.append, settings)
    # the event of a step comes before its checkpoint
    expected = (at - 1) // every * every
    assert [e["step"] for e in events if "resumed" in e] == ([expected] if expected else [])
    assert_same_run(resumed, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", ["lora", "masks"])
def test_a_signal_ends_the_run_after_the_step_and_leaves_a_stock_model(kind, number, tmp_path):
    def interrupt(event):
        if event["step"] == 3:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    settings = dataclasses.replace(SETTINGS, checkpoint_every=0)
    model, result = start(kind, tmp_path, interrupt, settings)
    assert result.stopped and result.steps == 3
    assert not any(isinstance(m, EffectiveLinear) for m in model.modules())
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000000003"]
    resumed = start(kind, tmp_path, settings=settings)
    assert not resumed[1].stopped
    assert_same_run(resumed, start(kind, None))


def test_the_second_signal_acts_at_once():
    def interrupt(event):
        if event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        start("full", None, interrupt)


CHILD = """
import os, signal, sys
from pathlib import Path
import shearling.train.checkpoint as checkpoint
from tests.test_train_resume import start

kind, folder, at, where = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

write = checkpoint._write
def half(tensors, writer, world):
    write(tensors, writer, world)
    path = next(Path(writer.path).glob("*.distcp"))
    os.truncate(path, os.path.getsize(path) // 2)
    kill()

def on_event(event):
    if event["step"] == at:
        if where == "step":
            kill()
        checkpoint._write = half

start(kind, folder, on_event)
"""


@pytest.mark.parametrize(("kind", "where"), [("masks", "step"), ("full", "write")])
def test_a_killed_process_resumes_to_the_bit(kind, where, tmp_path):
    """SIGKILL between two checkpoints, and in the middle of writing one."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, "-c", CHILD, kind, str(tmp_path), "5", where]
    killed = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (where == "write") == bool(list(tmp_path.glob(".*.tmp")))
    events = []
    resumed = start(kind, tmp_path, events.append)
    assert events[0] == {"step": 4, "resumed": True}
    assert_same_run(resumed, start(kind, None))
    assert not list(tmp_path.glob(".*"))


#: imports once, which takes longer than all that is struck; nothing runs before processes are forked
STRUCK = """
import os, signal, sys, threading
from pathlib import Path
from tests.test_train_resume import LONG, start

def struck(moment):
    def on_event(event):
        # from the first sign of life, so that the moment does not depend on how long anything before takes
        if not timer.is_alive():
            timer.start()

    timer = threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    start("masks", Path(sys.argv[1]), on_event, LONG)

for moment in map(float, sys.argv[2:]):
    process = os.fork()
    if not process:
        code = 1
        try:
            struck(moment)
            code = 0
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
LONG = dataclasses.replace(SETTINGS, tokens=60 * 4 * LENGTH)


def test_ten_kills_at_random_moments_change_no_bit(tmp_path):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    drawn = random.Random(7)
    moments = [str(drawn.uniform(0, 0.2)) for _ in range(10)]
    command = [sys.executable, "-c", STRUCK, str(tmp_path), *moments]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    ends = list(map(int, done.stdout.split()))
    assert len(ends) == 10, done.stderr
    # a quick machine may be done before the last ones
    assert set(ends) <= {0, -signal.SIGKILL} and ends[0] == -signal.SIGKILL
    events = []
    model, result = start("masks", tmp_path, events.append, LONG)
    assert not [e for e in events if "warning" in e]
    other, undisturbed = start("masks", None, settings=LONG)
    assert result.losses == undisturbed.losses and result.edits == undisturbed.edits
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = start("lora", tmp_path)
    events = []
    second = start("lora", tmp_path, events.append)
    assert events == [{"step": 8, "resumed": True}]
    assert_same_run(second, first)


@pytest.mark.parametrize("damage", ["truncated tensors", "no tensors", "truncated state"])
def test_an_unreadable_checkpoint_is_passed_over(damage, tmp_path):
    undisturbed = start("full", tmp_path)
    newest = checkpoints(tmp_path)[-1]
    tensors, state = next(newest.glob("*.distcp")), newest / "state.json"
    if damage == "no tensors":
        tensors.unlink()
    else:
        path = tensors if damage == "truncated tensors" else state
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    events = []
    resumed = start("full", tmp_path, events.append)
    assert newest.name in events[0]["warning"] and events[1] == {"step": 7, "resumed": True}
    assert_same_run(resumed, undisturbed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-3}, "learning_rate=0.01, this one has 0.001"),
        ({"seed": 1}, "seed"),
        ({"batch": 3}, "batch"),
    ],
)
def test_another_runs_folder_is_refused(change, message, tmp_path):
    start("full", tmp_path)
    with pytest.raises(ShearlingError, match=message):
        start("full", tmp_path, settings=dataclasses.replace(SETTINGS, **change))


def test_other_windows_policies_or_shapes_are_refused(tmp_path):
    start("full", tmp_path)
    with pytest.raises(ShearlingError, match="windows="):
        train(tiny_model("gpt2"), some_windows().flip(0), [], SETTINGS, state_dir=tmp_path)
    with pytest.raises(ShearlingError, match="policies="):
        train(tiny_model("gpt2"), some_windows(), [Policy()], SETTINGS, state_dir=tmp_path)
    with pytest.raises(ShearlingError, match="trained tensors"):
        train(tiny_model("gpt2", n_inner=32), some_windows(), [], SETTINGS, state_dir=tmp_path)


def test_a_disk_that_refuses_loses_no_earlier_checkpoint(tmp_path, monkeypatch):
    def full(tensors, writer, world):
        (Path(writer.path) / "__0_0.distcp").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def fill(event):
        if event["step"] == 5:
            monkeypatch.setattr("shearling.train.checkpoint._write", full)

    with pytest.raises(ShearlingError, match="step-000000005.*No space left"):
        start("full", tmp_path, fill)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000003", "step-000000004"]
    monkeypatch.undo()
    assert_same_run(start("full", tmp_path), start("full", None))


@pytest.mark.parametrize("background", [False, True])
def test_checkpoints_hold_any_tree_and_only_two_are_kept(background, tmp_path):
    base = torch.arange(12.0).view(3, 4)
    state = {
        "view": base[:, 1], "base": base, "flags": torch.tensor([True, False]), "half": base.bfloat16(),
        "scalar": torch.tensor(3), 7: (1, [2.5, "x", None, True]), "empty": {}, "nan": float("inf"),
        "nested": [{"a/b": torch.tensor([1.5])}, (torch.zeros(0),)],
    }  # fmt: skip
    store = Checkpoints(tmp_path, background=background)
    for step in (1, 2, 10):
        store.save(step, state)
    store.wait()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000000002", "step-000000010"]
    stored, broken = store.newest()
    assert broken == [] and stored is not None
    loaded = stored.load(World())
    assert loaded.keys() == state.keys()
    assert torch.equal(loaded["nested"][0]["a/b"], torch.tensor([1.5])) and loaded["nested"][1][0].numel() == 0
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(loaded[key], value) and loaded[key].dtype == value.dtype
        elif key != "nested":
            assert loaded[key] == value and type(loaded[key]) is type(value)
    with pytest.raises(TypeError, match="Policy"):
        store.save(11, {"code": Policy()})
    shutil.rmtree(tmp_path / "step-000000010")
    assert store.newest()[0] is not None


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(1, {"few": torch.zeros(1_000_000)[:10]})
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 100_000


def test_background_failures_come_with_the_next_call(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path, background=True)
    store.save(1, {"a": torch.zeros(3)})
    store.wait()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "_publish", full)
    store.save(2, {"a": torch.zeros(3)})
    with pytest.raises(ShearlingError, match="step-000000002.*No space left"):
        store.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_an_index_with_foreign_classes_is_not_loaded(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(1, {"a": torch.zeros(3)})
    index = tmp_path / "step-000000001" / ".metadata"
    size = index.stat().st_size
    harmful = pickle.dumps(Path)
    # of the same length, so that the size does not give it away
    index.write_bytes(harmful + b"\0" * (size - len(harmful)))
    assert store.newest() == (None, [tmp_path / "step-000000001"])


def test_no_folder_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "none").newest() == (None, [])
