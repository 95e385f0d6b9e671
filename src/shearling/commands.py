"""What commands do with models by name, where no run directory is made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.anatomy import anatomy_of
from shearling.card import model_card, provenance, versions
from shearling.data import corpus_tokens, windows
from shearling.errors import ShearlingError
from shearling.evaluate import (
    Latency,
    Workload,
    divergence,
    evaluate_tasks,
    generate_samples,
    measure_latency,
    perplexity,
)
from shearling.events import OnEvent
from shearling.export import GGUF_TYPE, check_format, export_deci, export_gguf, export_onnx, plan_record, save_model
from shearling.files import check_new
from shearling.methods.stages import budget_of, in_shape, plan_stage
from shearling.models import check_finite, load_config, load_model, load_tokenizer, resolve
from shearling.plan import Cost, Outcome, Plan, Width, inventory_of, sizes
from shearling.recipe import Budget, Denoise, Evaluation, PruneStage, Recipe, Shear, Sparsify
from shearling.surgery import cut_

#: of a sample
NEW_TOKENS = 48


def device_of(name: str) -> torch.device:
    """The device a recipe names; ``auto`` is the GPU where there is one."""
    if name == "auto":
        # as torchrun numbers the processes of a machine
        number = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ShearlingError(f"device = {name!r}: must be auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ShearlingError(f"device = {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; use auto")
    return device


def load(name: str, device: str = "auto", dtype: str = "float32") -> tuple[Any, Any]:
    """A model, checked, and its tokenizer, as a recipe names them."""
    model = load_model(name, dtype=getattr(torch, dtype), device=device_of(device))
    check_finite(model)
    return model, load_tokenizer(name)


def evaluate_model(
    model: Any, tokenizer: Any, wish: Evaluation, *, reference: Any = None, on_event: OnEvent | None = None
) -> dict[str, Any]:
    """Perplexity, divergence from ``reference``, sizes and tasks of a model, as ``metrics.json`` has them."""
    tokens = corpus_tokens(wish.text, tokenizer, whole=True, max_tokens=wish.max_tokens)

    def progress(done: int, total: int) -> None:
        if on_event is not None:
            on_event({"stage": "evaluate", "done": done, "total": total})

    found = perplexity(model, tokens, context=wish.context, stride=wish.stride, batch=wish.batch, on_progress=progress)
    measured = sizes(inventory_of(model), anatomy_of(model.config))
    result: dict[str, Any] = {
        "perplexity": found.value,
        "corpus": wish.text,
        "context": found.context,
        "stride": found.stride,
        "tokens": found.tokens,
        "parameters": measured.parameters,
        "bytes": measured.bytes,
    }
    if reference is not None:
        moved = divergence(model, reference, tokens, context=wish.context, batch=wish.batch)
        result |= {"kl": moved.kl, "agreement": moved.agreement}
    if wish.tasks:
        folder = None if wish.data is None else Path(wish.data)
        result["tasks"] = evaluate_tasks(model, tokenizer, list(wish.tasks), data=folder)
    if wish.samples:
        result["samples"] = generate_samples(model, tokenizer, wish.samples, NEW_TOKENS)
    return result


def cut(recipe: Recipe, out: Path, *, on_event: OnEvent | None = None) -> Plan:
    """Only prune, and only save: the model of a recipe's first stage into a new folder ``out``."""
    recipe = in_shape(recipe, measured_costs(recipe, on_event))
    if recipe.first is None or isinstance(recipe.first, Shear) or recipe.adapt is not None:
        stage = recipe.stages[0].stage
        raise ShearlingError(f"stages: {stage} trains, and nothing is pruned at once; put prune or sparsify first")
    check_new(out)
    home = "cpu" if recipe.calibration.stream else recipe.device
    model, tokenizer = load(recipe.model, home, recipe.dtype)
    outcome = outcome_of(recipe, recipe.first, model, tokenizer, None, on_event)
    cut_(model, outcome.edits)
    made = provenance(recipe, plan_record(outcome.plan, model.config))
    save_model(model, tokenizer, out, provenance=made, card=model_card(recipe, outcome.plan, {}))
    return outcome.plan


def export(name: str, out: Path, *, to: str, kind: str | None = None, check: bool = True) -> dict[str, Any]:
    """Write a named model in another format (``export.FORMATS``); returns what its ``shearling.json`` says of it.

    ``kind`` is GGUF's type, f16 by default. With ``check`` other readers compare it with the model first. Raises
    ShearlingError, before weights are read where that can be known, for a format that cannot hold the model.
    """
    check_format(load_config(name), to, kind)
    check_new(out)
    model, tokenizer = load_model(name), load_tokenizer(name)
    check_finite(model)
    folder = resolve(name)
    record = folder / "shearling.json" if isinstance(folder, Path) else None
    if record is not None and record.is_file():
        made = json.loads(record.read_text())
    else:
        made = {"versions": versions(), "model": name}
    if to == "gguf":
        return export_gguf(model, tokenizer, out, kind=kind or GGUF_TYPE, provenance=made, check=check)
    write = {"deci": export_deci, "onnx": export_onnx}[to]
    return write(model, tokenizer, out, provenance=made, check=check)


def measured_costs(recipe: Recipe, on_event: OnEvent | None = None) -> Mapping[Width, Cost] | None:
    """What shapes of a recipe's model take on its device, where its budget is a latency; None elsewhere."""
    budget = budget_of(recipe)
    if budget is None or budget.latency is None:
        return None
    return latency_of(recipe.model, budget, recipe.device, recipe.dtype, on_event).costs()


def latency_of(
    model: str, budget: Budget, device: str = "auto", dtype: str = "float32", on_event: OnEvent | None = None
) -> Latency:
    """What a named model's shapes take, as a budget says it is measured; times are kept in the cache folder."""
    workload = Workload(budget.phase, budget.batch, budget.context)
    config, precision = load_config(model), getattr(torch, dtype)
    return measure_latency(config, workload, dtype=precision, device=device_of(device), on_event=on_event)


def outcome_of(
    recipe: Recipe,
    stage: PruneStage | Sparsify | Denoise,
    model: Any,
    tokenizer: Any,
    state: Path | None,
    on_event: OnEvent | None,
) -> Outcome:
    """Plan and edits of the stage that prunes, measured on the recipe's text; ``state`` keeps finished blocks."""
    wish = recipe.calibration
    return plan_stage(
        model,
        calibration_windows(recipe, tokenizer),
        stage,
        batch=wish.batch,
        seed=recipe.seed,
        device=device_of(recipe.device),
        state_dir=state,
        on_event=on_event,
        name=recipe.model,
    )


def calibration_windows(recipe: Recipe, tokenizer: Any) -> Tensor:
    """The text that a recipe measures on, [num, T]."""
    wish = recipe.calibration
    tokens = corpus_tokens(wish.text, tokenizer, max_tokens=wish.sequences * wish.length)
    return windows(tokens, wish.sequences, wish.length)
