"""What the page says about using the result: engines, code that loads it, versions."""

from __future__ import annotations

from shearling.report.files import RunFiles, record, records
from shearling.report.numbers import DASH, words


def engines(run: RunFiles) -> list[tuple[str, str, str, str]]:
    """Which engines load the result, what of it makes them faster, and the command, which names this run's model."""
    return [
        (
            words(engine.get("engine")),
            {"True": "yes", "False": "no"}.get(str(engine.get("loads")), DASH),
            words(engine.get("faster")),
            # as export/engines.py writes it, which would bring torch along
            words(engine.get("how")).replace("MODEL", str(run.directory / "model")),
        )
        for engine in records(run.plan.get("engines"))
    ]


def loading(run: RunFiles) -> dict[str, str | bool] | None:
    """Python that loads the model of this run, or None where there is none yet."""
    folder = run.directory / "model"
    if not folder.is_dir():
        return None
    per_layer, branches = run.plan.get("stock") is False, "branches" in run.plan
    if branches:
        lines = ["import shearling", "", f"folder = {str(folder)!r}"]
        lines += ["model, tokenizer = shearling.load_model(folder), shearling.load_tokenizer(folder)"]
    else:
        lines = ["import shearling  # registers the class with per-layer widths"] if per_layer else []
        lines += [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"folder = {str(folder)!r}",
            "model = AutoModelForCausalLM.from_pretrained(folder)",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
        ]
    lines += [
        'inputs = tokenizer("Sheep are", return_tensors="pt")',
        "tokens = model.generate(**inputs, max_new_tokens=40)",
        "print(tokenizer.decode(tokens[0]))",
    ]
    return {"per_layer": per_layer, "branches": branches, "code": "\n".join(lines)}


def versions(run: RunFiles) -> list[tuple[str, str]]:
    """The versions that made the run, by name."""
    given = record(run.metrics.get("versions"))
    return [(name, words(value)) for name, value in sorted(given.items())]
