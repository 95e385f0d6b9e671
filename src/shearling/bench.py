"""Models by name, on what runs them, side by side; results as a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch

from shearling.card import versions
from shearling.commands import device_of, load
from shearling.errors import ShearlingError
from shearling.evaluate.bench import Bench, Cell, Engine, Subject, check_sizes, measure_cells
from shearling.evaluate.energy import energy_counter
from shearling.evaluate.llama_cpp_engine import LlamaCppEngine, check_gguf
from shearling.evaluate.speed import device_name
from shearling.evaluate.torch_engine import TorchEngine
from shearling.events import OnEvent
from shearling.export.compact import COMPACT
from shearling.export.compressed import load_codes
from shearling.files import beside, write_whole
from shearling.models import load_config, resolve
from shearling.plan import Quant
from shearling.report.bench import bench_page
from shearling.runtime.accelerate import accelerate_, linears_24, takes_codes

DTYPES = ("float32", "bfloat16", "float16")


def bench(
    models: Sequence[str],
    *,
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] = (128, 1024),
    generate: int = 32,
    repeats: int = 5,
    device: str = "auto",
    dtype: str = "float32",
    accelerate: bool = False,
    out: Path | None = None,
    on_event: OnEvent | None = None,
) -> Bench:
    """Measure models one after another in every round; all of them stay in memory until the end.

    A model is a name as ``load_model`` takes it, or a GGUF file, which llama.cpp runs in the types it holds. With
    ``accelerate`` 2:4 linears take the fastest way for as many tokens as they get. ``out`` becomes a folder of
    ``bench.json`` and ``bench.html``. Raises ShearlingError for sizes below 1, a model that cannot be loaded or run at
    these sizes, models that do not fit into memory together, and a folder that exists or cannot be written.
    """
    cells = [Cell(batch, context, generate) for batch, context in product(batches, contexts)]
    check_sizes(cells, repeats)
    if dtype not in DTYPES:
        raise ShearlingError(f"bench: dtype {dtype!r} must be one of {', '.join(DTYPES)}")
    for name in models:
        _check_model(name)
    target = device_of(device)
    # made before the work, so that an hour of it is not lost to a place that cannot be written
    with nullcontext() if out is None else beside(out) as folder, _on(target):
        engines = [_engine(name, target, dtype, cells if accelerate else (), on_event) for name in models]
        counter = energy_counter(target)
        rows = measure_cells(engines, cells, repeats=repeats, energy=counter, on_event=on_event)
        found = Bench(
            subjects=[Subject(e.name, e.runner, e.parameters, e.disk_bytes, e.note) for e in engines],
            cells=cells,
            rows=rows,
            repeats=repeats,
            device=device_name(target),
            dtype=dtype,
            energy=None if counter is None else counter.source,
            versions=versions(),
        )
        if folder is not None:
            write_whole(folder / "bench.json", json.dumps(found.to_json(), indent=2) + "\n")
            write_whole(folder / "bench.html", bench_page(found.to_json()))
    return found


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def _check_model(name: str) -> None:
    if _is_gguf(name):
        check_gguf(Path(name).expanduser())
    else:
        resolve(name)


def _engine(
    name: str, device: torch.device, dtype: str, accelerated: Sequence[Cell], on_event: OnEvent | None
) -> Engine:
    """A loaded model; its 2:4 linears are replaced for the numbers of tokens of those cells."""
    if on_event is not None:
        on_event({"stage": "load", "model": name})
    if _is_gguf(name):
        return LlamaCppEngine(Path(name).expanduser(), device)
    model, _ = load(name, str(device), dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    held = sum(parameter.nbytes for parameter in model.parameters())
    notes = ["stored as codes, run as the weights they stand for"] if _has_codes(name) else []
    if accelerated:
        note, saved = _accelerated_(model, accelerated, _codes_24(name))
        notes.append(note)
        held -= saved
    return TorchEngine(name, model, parameters, _disk_bytes(name), held, "; ".join(notes))


def _has_codes(name: str) -> bool:
    return getattr(load_config(name), "quantization_config", None) is not None


def _codes_24(name: str) -> Quant | None:
    """The codes of a folder, where the runtime has kernels for them."""
    folder = resolve(name)
    if isinstance(folder, str) or not _has_codes(name):
        return None
    quant = load_codes(folder)
    return quant if takes_codes(quant) else None


def _accelerated_(model: Any, cells: Sequence[Cell], codes: Quant | None) -> tuple[str, int]:
    """What was done to the model's 2:4 linears, and how many bytes less they hold."""
    sparse = linears_24(model)
    if not sparse:
        return "no 2:4 weights, run as it is", 0
    tokens = {cell.batch for cell in cells} | {cell.batch * cell.context for cell in cells}
    done = accelerate_(model, int4=codes, tokens=sorted(tokens))
    values = "" if codes is None else " with 4-bit values"
    return f"{len(done.routes)} 2:4 linears{values} by the fastest way", done.dense_bytes - done.bytes


def _disk_bytes(name: str) -> int:
    """Of the weight files; those of a hub id are in its cache."""
    folder = resolve(name)
    if isinstance(folder, str):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(folder, local_files_only=True))
    files = (file for file in folder.rglob("*.safetensors") if file.name != COMPACT)
    return sum(file.stat().st_size for file in files)


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Graphs and memory statistics belong to the current device; what does not fit on it is one line."""
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    except torch.OutOfMemoryError as error:
        raise ShearlingError(
            f"bench: the models do not fit into the memory of {device} together; bench fewer, or smaller cells"
        ) from error
