"""Models side by side: the order of their turns, what is made of the samples, and the command."""

from __future__ import annotations

import importlib.machinery
import json
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shearling.bench import bench
from shearling.errors import ShearlingError
from shearling.evaluate import bench as measuring
from shearling.evaluate.bench import Bench, Cell, Measured, Prefill, Subject, measure_cells, percentiles, summary
from shearling.evaluate.energy import EnergyCounter, rapl_counter
from shearling.evaluate.llama_cpp_engine import LlamaCppEngine
from shearling.evaluate.torch_engine import TorchEngine
from shearling.report.bench import bench_page
from shearling.runtime import random_24
from tests.test_cli import command as command
from tests.test_cli import refused
from tests.tiny import VOCAB, tiny_folder, tiny_model

CELL = Cell(batch=2, context=8, generate=3)


@dataclass
class Scripted:
    """An engine whose turns take as long as the test says, written into a common log."""

    name: str
    log: list[tuple[str, str, Any]]
    seconds: float = 1.0
    weight_bytes: int | None = None
    refuses: int = 10**9
    runner: str = "script"
    parameters: int = 10
    disk_bytes: int = 20
    note: str = ""

    def check(self, cell: Cell) -> None:
        if cell.context > self.refuses:
            raise ShearlingError(f"{self.name}: {cell.context} tokens are too many")

    def prepare(self, cell: Cell) -> None:
        self.cell = cell
        self.log.append((self.name, "prepare", cell))

    def prefill(self) -> Prefill:
        self.log.append((self.name, "prefill", self.cell))
        return Prefill(self.seconds, self.seconds + 0.5)

    def decode(self) -> list[float]:
        self.log.append((self.name, "decode", self.cell))
        return [self.seconds / 4] * self.cell.generate

    def release(self) -> None:
        self.log.append((self.name, "release", None))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100, 101, 999])
def test_percentiles_are_those_of_numpy(count: int) -> None:
    samples = np.random.default_rng(count).lognormal(size=count)
    found = percentiles(samples.tolist())
    assert [found.p50, found.p90, found.p99] == pytest.approx(np.percentile(samples, [50, 90, 99]).tolist(), rel=1e-12)


def test_speeds_are_medians_over_the_batch() -> None:
    prefills = [Prefill(2.0, 2.5), Prefill(9.0, 9.25), Prefill(4.0, 4.125)]
    found = summary(CELL, prefills, [[1.0, 2.0, 3.0], [0.5, 0.5, 0.5], [30.0, 30.0, 30.0]])
    assert found.prefill_tokens_per_second == 2 * 8 / 4.0
    assert found.decode_tokens_per_second == 2 * 3 / 6.0
    assert found.first_token.p50 == 4.125
    assert found.decode.p50 == 2.0
    assert (found.peak_bytes, found.joules_per_token) == (None, None)


def test_models_take_turns_in_every_repeat() -> None:
    log: list[Any] = []
    engines = [Scripted("a", log), Scripted("b", log), Scripted("c", log)]
    cells = [CELL, Cell(1, 4, 2)]
    events: list[Any] = []
    rows = measure_cells(engines, cells, repeats=3, on_event=events.append)
    assert [len(row) for row in rows] == [3, 3]
    for cell in cells:
        turns = [(name, what) for name, what, of in log if of == cell and what in ("prefill", "decode")]
        in_turn = [(name, what) for name in "abc" for what in ("prefill", "decode")]
        # one turn before those that count, and for the smaller cell one before all cells
        assert turns == in_turn * (4 + (cell == cells[1]))
    # nothing is kept for a cell that is done
    first, second = (log.index(("a", "prepare", cell), 12) for cell in cells)
    assert {entry[0] for entry in log[first:second] if entry[1] == "release"} == {"a", "b", "c"}
    assert events == [{"stage": "bench", "done": n, "total": 2} for n in (1, 2)]


def test_bad_sizes_and_cells_are_refused_before_anything_runs() -> None:
    log: list[Any] = []
    engines = [Scripted("a", log), Scripted("b", log, refuses=100)]
    with pytest.raises(ShearlingError, match=r"^b: 101 tokens are too many$"):
        measure_cells(engines, [CELL, Cell(1, 101, 1)], repeats=1)
    for cell, repeats, name in [(Cell(0, 1, 1), 1, "batch 0"), (Cell(1, -3, 1), 1, "context -3"),
                                (Cell(1, 1, 0), 1, "generate 0"), (Cell(1, 1, 1), 0, "repeats 0")]:  # fmt: skip
        with pytest.raises(ShearlingError, match=f"^bench: {name} must be at least 1$"):
            measure_cells(engines, [CELL, cell], repeats=repeats)
    assert log == []


def test_an_error_amid_a_cell_releases_all_models() -> None:
    log: list[Any] = []
    broken = Scripted("b", log)
    broken.prefill = lambda: (_ for _ in ()).throw(ShearlingError("broken"))  # type: ignore[method-assign]
    with pytest.raises(ShearlingError, match="broken"):
        measuring._measure_cell([Scripted("a", log), broken], CELL, 1, None)
    assert [entry for entry in log if entry[1] == "release"] == [("a", "release", None), ("b", "release", None)]


def test_peak_memory_is_that_of_a_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """``held`` is what all models hold together; turns that count add to it for a while."""
    held = {"now": 1000, "peak": 0}
    costs = {"a": (100, 30), "b": (200, 50)}

    class Peak:
        def __enter__(self) -> Peak:
            held["peak"] = held["now"]
            return self

        def __exit__(self, *_: Any) -> None:
            self.peak_bytes = held["peak"]

    class Hungry(Scripted):
        def prepare(self, cell: Cell) -> None:
            held["now"] += costs[self.name][0]
            super().prepare(cell)

        def decode(self) -> list[float]:
            counted = sum(what == "decode" for _, what, _ in self.log) >= 2
            held["peak"] = max(held["peak"], held["now"] + counted * costs[self.name][1])
            return super().decode()

        def release(self) -> None:
            held["now"] -= costs[self.name][0]

    monkeypatch.setattr(measuring, "Usage", Peak)
    monkeypatch.setattr(measuring, "held_bytes", lambda: held["now"])
    engines = [Hungry("a", [], weight_bytes=5), Hungry("b", [], weight_bytes=7), Hungry("a", [], weight_bytes=None)]
    ((a, b, unknown),) = measure_cells(engines, [CELL], repeats=2)
    assert (a.peak_bytes, b.peak_bytes, unknown.peak_bytes) == (5 + 130, 7 + 250, None)
    assert held["now"] == 1000


def test_energy_is_counted_over_two_seconds_of_decoding_alone() -> None:
    log: list[Any] = []
    engine = Scripted("a", log, seconds=1.0)
    read_at: list[int] = []

    def read() -> list[float]:
        read_at.append(len(log))
        # 12 joules a call of decode, and much for what else there was
        return [1000.0 + 12.0 * sum(what == "decode" for _, what, _ in log) + 500 * (log[-1][1] == "prefill")]

    ((found,),) = measure_cells([engine], [CELL], repeats=2, energy=EnergyCounter("fake", read, [float("inf")]))
    # a call takes 0.75 s for 3 steps of 2 rows
    assert [what for _, what, _ in log[read_at[0] : read_at[1]]] == ["decode"] * 3
    assert found.joules_per_token == pytest.approx(12 / 6)


def zone(root: Path, name: str, label: str, energy: int, most: int) -> None:
    (root / name).mkdir(parents=True)
    for file, value in (("name", label), ("energy_uj", energy), ("max_energy_range_uj", most)):
        (root / name / file).write_text(f"{value}\n")


def test_processor_counters_start_again(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000, 10_000_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 1_000_000, 10_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 5_000_000, 10_000_000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 2_000_000, 8_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 7_000_000, 10_000_000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 9_000_000, 10_000_000)
    counter = rapl_counter(tmp_path)
    assert counter is not None and counter.source == "RAPL"
    before = counter.read()
    # the first package passes its range of 10 J
    for name, energy in (("intel-rapl:0", 1_500_000), ("intel-rapl:1", 4_000_000), ("intel-rapl:0:1", 2_250_000)):
        (tmp_path / name / "energy_uj").write_text(str(energy))
    (tmp_path / "intel-rapl:2" / "energy_uj").write_text("9000000")
    assert counter.joules(before, counter.read()) == pytest.approx(2.5 + 3.0 + 0.25)


def test_no_counter_is_no_error(tmp_path: Path) -> None:
    assert rapl_counter(tmp_path) is None
    zone(tmp_path, "intel-rapl:0", "package-0", 0, 10)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("not for you")
    assert rapl_counter(tmp_path) is None


def engine_of(model: Any) -> TorchEngine:
    return TorchEngine("tiny", model, 1, 1, 1)


class Passes:
    """Time that passes in the model alone, 10 for a prompt and its own number for every step, and what it was given."""

    def __init__(self, model: Any) -> None:
        self.now, self.tokens = 0.0, []
        model.register_forward_pre_hook(self._pass, with_kwargs=True)

    def _pass(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids_BT = kwargs["input_ids"]
        self.tokens.append(ids_BT.clone())
        self.now += 10.0 if ids_BT.shape[1] > 1 else 1.0

    def __call__(self) -> float:
        return self.now


def test_a_model_reads_prompts_and_continues_them_from_their_end_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    passes = Passes(model)
    monkeypatch.setattr("time.perf_counter", passes)
    engine = engine_of(model)
    engine.prepare(CELL)
    assert engine.prefill() == Prefill(10.0, 10.0)
    del passes.tokens[:]
    assert engine.decode() == [1.0, 1.0, 1.0]
    first = torch.cat(passes.tokens, 1)
    del passes.tokens[:]
    engine.decode()
    assert torch.equal(torch.cat(passes.tokens, 1), first)
    # greedy, without a cache
    expected = engine._ids_BT
    with torch.no_grad():
        for _ in range(3):
            expected = torch.cat([expected, model(input_ids=expected).logits[:, -1:].argmax(-1)], 1)
    assert expected.shape == (2, 11)
    assert torch.equal(first, expected[:, 8:])
    assert len(set(first[0].tolist())) > 1, "the model repeats one token; the test would say little"


@pytest.mark.parametrize("context", [4, 12, 20])
def test_steps_start_again_beside_a_sliding_window(context: int) -> None:
    model = tiny_model("gemma2", tie_word_embeddings=False)
    logits: list[torch.Tensor] = []
    model.register_forward_hook(lambda _, args, outputs: logits.append(outputs.logits[:, -1]))
    engine = engine_of(model)
    engine.prepare(Cell(1, context, 3))
    seen = []
    for _ in range(2):
        del logits[:]
        engine.decode()
        seen.append(torch.stack(logits))
    assert seen[0].shape == (3, 1, VOCAB)
    # a window that was full has lost its oldest tokens
    assert torch.equal(*seen) == (context < 16)


def test_learned_positions_end() -> None:
    engine = engine_of(tiny_model("gpt2"))
    engine.check(Cell(1, 120, 8))
    with pytest.raises(ShearlingError, match="^bench: tiny: context and steps: 129 tokens exceed the 128 learned"):
        engine.check(Cell(1, 121, 8))


def results(names: Sequence[str] = ("dense", "half")) -> Bench:
    def row(speed: float, joules: float | None, peak: int | None) -> Measured:
        return summary(CELL, [Prefill(1 / speed, 2 / speed)], [[0.5 / speed] * 3], peak, joules)

    return Bench(
        subjects=[Subject(names[0], "transformers", 1000, 4000, ""), Subject(names[1], "llama.cpp", 500, 1000, "Q4")],
        cells=[CELL],
        rows=[[row(1.0, None, 1000), row(4.0, 0.25, 250)]],
        repeats=1,
        device="cpu (test)",
        dtype="float32",
        energy=None,
        versions={"torch": "2.13"},
    )


def test_ratios_are_to_the_first_model_of_the_same_cell() -> None:
    found = results()
    assert found.ratios(0, 1) == {
        "prefill_tokens_per_second": 4.0,
        "decode_tokens_per_second": 4.0,
        "first_token": 0.25,
        "peak_bytes": 0.25,
        "joules_per_token": None,
        "disk_bytes": 0.25,
        "parameters": 0.5,
    }
    told = json.loads(json.dumps(found.to_json()))
    assert [row["name"] for row in told["results"]] == ["dense", "half"]
    second = told["results"][1]
    assert (second["batch"], second["context"], second["generate"]) == CELL
    assert second["prefill"] == {"p50": 0.25, "p90": 0.25, "p99": 0.25}
    assert second["decode_tokens_per_second"] == pytest.approx(2 * 4 / 0.5)
    assert second["joules_per_token"] == 0.25
    assert second["ratios"]["peak_bytes"] == 0.25


def test_the_page_shows_all_numbers_and_needs_no_network() -> None:
    hostile = """x</title><script>alert(1)</script>"'&"""
    page = bench_page(results(("models/dense", hostile)).to_json())
    assert "<script" not in page
    assert hostile in unescape(page)
    assert not re.search(r"https?://|src=|@import|url\(", page)
    text = unescape(re.sub(r"<[^>]+>", " ", page))
    for shown in ("Batch 2, context 8, 3 steps", "64.00 (4.000×)", "250 B (0.250×)", "0.250 (–)", "no energy counter"):
        assert shown in text.replace("\N{NO-BREAK SPACE}", " "), shown
    bars = [float(height) for height in re.findall(r'class="bar \w+"[^>]* height="([\d.]+)"', page)]
    assert bars[1] == pytest.approx(4 * bars[0], rel=0.01) and bars[3] == pytest.approx(4 * bars[2], rel=0.01)
    assert "{{" not in page and "{%" not in page


def test_command_compares_a_model_with_its_cut_version(tmp_path: Path, command: Any) -> None:
    dense, half = tiny_folder(tmp_path / "dense"), tiny_folder(tmp_path / "half", intermediate_size=24)
    out = tmp_path / "deep" / "bench"
    options = ("--context", 8, "--context", 12, "--batch", 2, "--generate", 3, "--repeats", 2, "--device", "cpu")
    code, said, err = command("bench", dense, half, *options, "--out", out)
    assert code == 0, err
    for shown in ("dense", "half", "batch 2, context 8, 3 steps", "batch 2, context 12, 3 steps", "bench.html"):
        assert shown in said
    assert sorted(file.name for file in out.iterdir()) == ["bench.html", "bench.json"]
    assert [folder.name for folder in out.parent.iterdir()] == ["bench"]
    found = json.loads((out / "bench.json").read_text())
    assert [model["name"] for model in found["models"]] == [str(dense), str(half)]
    assert [(row["context"], row["model"]) for row in found["results"]] == [(8, 0), (8, 1), (12, 0), (12, 1)]
    for model, folder in zip(found["models"], (dense, half), strict=True):
        tensors = load_file(folder / "model.safetensors")
        assert model["parameters"] == sum(tensor.numel() for tensor in tensors.values())
        assert model["disk_bytes"] == (folder / "model.safetensors").stat().st_size
    for row in found["results"]:
        assert row["decode"]["p50"] <= row["decode"]["p90"] <= row["decode"]["p99"]
        assert row["first_token"]["p50"] >= row["prefill"]["p50"] > 0
        assert row["peak_bytes"] >= 4 * found["models"][row["model"]]["parameters"]
    assert found["results"][1]["ratios"]["parameters"] < 1 == found["results"][0]["ratios"]["decode_tokens_per_second"]
    assert "dense" in (out / "bench.html").read_text()
    refused(command("bench", dense, *options, "--out", out), "bench", "already exists")


def test_sparse_linears_are_accelerated_and_others_left(tmp_path: Path, command: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "cache"))
    dense = tiny_folder(tmp_path / "dense")
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.up_proj.weight
            weight.copy_(random_24(*weight.shape, weight.dtype, "cpu"))
    model.save_pretrained(tmp_path / "sparse")
    for file in dense.glob("tokenizer*"):
        (tmp_path / "sparse" / file.name).write_bytes(file.read_bytes())
    options = ("--context", 4, "--generate", 2, "--repeats", 1, "--device", "cpu", "--accelerate", "--json")
    code, said, err = command("bench", dense, tmp_path / "sparse", *options)
    assert code == 0, err
    notes = [model["note"] for model in json.loads(said)["models"]]
    assert notes == ["no 2:4 weights, run as it is", "3 2:4 linears by the fastest way"]
    (table,) = (tmp_path / "cache" / "runtime").iterdir()
    # a step has one token, a prompt four
    assert {row[4] for row in json.loads(table.read_text())["rows"]} == {1, 4}


def test_what_cannot_be_benched(tmp_path: Path, command: Any, monkeypatch: Any) -> None:
    dense, learned = tiny_folder(tmp_path / "dense"), tiny_folder(tmp_path / "gpt2", "gpt2")
    small = ("--context", 4, "--generate", 2, "--repeats", 1, "--device", "cpu")
    refused(command("bench", dense, *small, "--batch", 0), "batch 0 must be at least 1")
    refused(command("bench", dense, "--context", -1), "context -1 must be at least 1")
    refused(command("bench", dense, *small, "--dtype", "int3"), "dtype 'int3'", "float32, bfloat16, float16")
    refused(command("bench", dense, tmp_path / "none"), "none", "no such folder")
    refused(command("bench", dense, tmp_path / "none.gguf"), "none.gguf: cannot be read (No such file")
    (tmp_path / "not.gguf").write_text("words")
    refused(command("bench", dense, tmp_path / "not.gguf"), "not.gguf: is not a GGUF file")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    refused(command("bench", dense, tmp_path / "model.gguf"), "needs the package llama_cpp; pip install llama-cpp-pyt")
    (tmp_path / "file").write_text("")
    refused(command("bench", dense, *small, "--out", tmp_path / "file" / "out"), "cannot be written")
    out = tmp_path / "out"
    found = command("bench", dense, learned, *small[:-2], "--context", 127, "--device", "cpu", "--out", out)
    refused(found, "129 tokens exceed the 128 learned positions")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "file", "gpt2", "model.gguf", "not.gguf"]


def test_an_end_amid_the_work_leaves_nothing(tmp_path: Path, command: Any, monkeypatch: Any) -> None:
    def ends(error: BaseException) -> Any:
        def measure(*args: Any, **kwargs: Any) -> Any:
            assert (tmp_path / ".out.unfinished").is_dir()
            raise error

        monkeypatch.setattr("shearling.bench.measure_cells", measure)
        return command("bench", tiny_folder(tmp_path / "dense"), "--device", "cpu", "--out", tmp_path / "out")

    refused(ends(torch.OutOfMemoryError("CUDA out of memory")), "do not fit into the memory of cpu together")
    code, _, err = ends(KeyboardInterrupt())
    assert code == 130 and "nothing was written" in err
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


class Native:
    """A batch or options: fields that are set; arrays are as long as asked for."""

    def __init__(self, length: int = 0) -> None:
        for name in ("token", "pos", "n_seq_id", "logits"):
            setattr(self, name, [0] * length)
        self.seq_id = [[0] for _ in range(length)]
        self.n_tokens = 0


class FakeLlama(types.ModuleType):
    """llama.cpp for sequences of which each token's successor is the sum of all so far; keeps what is in its cache."""

    def __init__(self) -> None:
        super().__init__("llama_cpp")
        self.__spec__ = importlib.machinery.ModuleSpec("llama_cpp", None)
        self.cache: dict[int, list[int]] = {}
        self.fed: list[list[int]] = []
        self.open = 0
        self.options: list[Any] = []
        self.llama_log_callback = lambda function: function
        self.llama_log_set = lambda *_: None
        self.llama_supports_gpu_offload = lambda: False
        self.llama_model_default_params = self.llama_context_default_params = Native
        self.llama_model_load_from_file = lambda file, options: file if b"broken" not in file else None
        self.llama_model_n_params = lambda model: 1234
        self.llama_model_n_ctx_train = lambda model: 64
        self.llama_model_get_vocab = lambda model: model
        self.llama_vocab_n_tokens = lambda vocab: VOCAB
        self.llama_batch_init = lambda length, *_: Native(length)
        self.llama_batch_free = self.llama_synchronize = lambda _: None
        self.llama_get_memory = lambda context: self.cache

    def llama_model_desc(self, model: Any, buffer: Any, size: int) -> None:
        buffer.value = b"llama 1234 Q8_0"

    def llama_init_from_model(self, model: Any, options: Any) -> Any:
        self.open += 1
        self.options.append(options)
        return "context"

    def llama_free(self, context: Any) -> None:
        self.open -= 1

    def llama_memory_clear(self, memory: Any, data: bool) -> None:
        memory.clear()

    def llama_memory_seq_rm(self, memory: Any, row: int, start: int, end: int) -> bool:
        assert end == -1
        del memory[row][start:]
        return True

    def llama_decode(self, context: Any, batch: Any) -> int:
        self.fed.append(batch.token[: batch.n_tokens].copy())
        self.told = {}
        for place in range(batch.n_tokens):
            (row,), past = batch.seq_id[place], self.cache.setdefault(batch.seq_id[place][0], [])
            if batch.n_seq_id[place] != 1 or batch.pos[place] != len(past):
                return -1
            past.append(batch.token[place])
            if batch.logits[place]:
                self.told[place] = sum(self.cache[row]) % VOCAB
        return 0

    def llama_get_logits_ith(self, context: Any, place: int) -> Any:
        return np.eye(VOCAB, dtype=np.float32)[self.told[place]].ctypes.data_as(
            np.ctypeslib.ctypes.POINTER(np.ctypeslib.ctypes.c_float)
        )


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> FakeLlama:
    module = FakeLlama()
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    return module


def gguf(folder: Path, name: str = "model.gguf") -> Path:
    (folder / name).write_bytes(b"GGUF" + bytes(96))
    return folder / name


def test_llama_cpp_continues_every_row_from_the_end_of_its_prompt(tmp_path: Path, llama: FakeLlama) -> None:
    engine = LlamaCppEngine(gguf(tmp_path), torch.device("cpu"))
    assert (engine.parameters, engine.disk_bytes, engine.note) == (1234, 100, "llama 1234 Q8_0")
    engine.prepare(CELL)
    assert (llama.options[0].n_seq_max, llama.options[0].n_batch) == (2, 16)
    engine.prefill()
    prompts = {row: tokens.copy() for row, tokens in llama.cache.items()}
    assert [len(tokens) for tokens in prompts.values()] == [8, 8] and prompts[0] != prompts[1]
    for _ in range(2):
        del llama.fed[:]
        assert len(engine.decode()) == 3
        for row, prompt in prompts.items():
            expected = list(prompt)
            for _ in range(3):
                expected.append(sum(expected) % VOCAB)
            assert [step[row] for step in llama.fed] == expected[8:]
            assert llama.cache[row] == expected
    engine.release()
    assert llama.open == 0


def test_a_gguf_file_beside_a_model(tmp_path: Path, llama: FakeLlama) -> None:
    found = bench(
        [str(tiny_folder(tmp_path / "dense")), str(gguf(tmp_path))],
        contexts=[8], generate=2, repeats=1, device="cpu",
    )  # fmt: skip
    assert [subject.runner for subject in found.subjects] == ["transformers", "llama.cpp"]
    assert found.rows[0][1].decode_tokens_per_second > 0
    assert llama.open == 0


def test_what_llama_cpp_cannot_run(tmp_path: Path, llama: FakeLlama) -> None:
    engine = LlamaCppEngine(gguf(tmp_path), torch.device("cpu"))
    with pytest.raises(ShearlingError, match="65 tokens exceed its 64 positions"):
        engine.check(Cell(1, 60, 5))
    with pytest.raises(ShearlingError, match=r"built without GPU support; use --device cpu$"):
        LlamaCppEngine(gguf(tmp_path), torch.device("cuda"))
    with pytest.raises(ShearlingError, match=r"broken\.gguf: llama\.cpp cannot load it"):
        LlamaCppEngine(gguf(tmp_path, "broken.gguf"), torch.device("cpu"))


@pytest.mark.gpu
@torch.no_grad()
def test_replayed_steps_write_the_same_tokens_each_time() -> None:
    model = tiny_model("llama", tie_word_embeddings=False).cuda()
    engine = engine_of(model)
    engine.prepare(Cell(2, 12, 9))
    engine.prefill()
    expected = engine._ids_BT.cuda()
    for _ in range(10):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    for _ in range(2):
        times = engine.decode()
        assert len(times) == 9 and min(times) > 0
        assert torch.equal(engine._last_B1, expected[:, -1:])
    engine.release()
    with pytest.raises(ShearlingError, match="pass the sliding window of 16"):
        engine_of(tiny_model("gemma2").cuda()).prepare(Cell(1, 14, 9))
