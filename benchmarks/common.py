"""What the benchmarks share: their arguments, their texts, their rows."""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.data import corpus_tokens, windows
from shearling.evaluate import evaluate_tasks, perplexity

Row = dict[str, Any]
WIKITEXT = "wikitext2.test"
TASKS = ("arc_easy", "piqa", "hellaswag", "winogrande", "boolq", "openbookqa", "lambada_openai")


def arguments(description: str) -> argparse.ArgumentParser:
    """``--data``, ``--json``, ``--quick``, ``--device`` and ``--model``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder with calibration/, corpus/ and eval/")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--quick", action="store_true", help="a smaller comparison, under two minutes on two cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder or a hub id")
    return parser


class Rows:
    """Rows of a benchmark: printed as they come, and written as a JSON list."""

    def __init__(self, columns: Sequence[str], file: Path | None) -> None:
        self.columns, self.file = columns, file
        self.rows: list[Row] = []
        print(" | ".join(columns), flush=True)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print(" | ".join(_text(row.get(column)) for column in self.columns), flush=True)
        if self.file is not None:
            self.file.write_text(json.dumps(self.rows, indent=1))


def device_name(device: str | torch.device) -> str:
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def calibration(data: Path, tokenizer: Any, sequences: int, length: int) -> Tensor:
    """The first windows of the C4 calibration text."""
    source = data / "calibration" / "c4_calib.jsonl.zst"
    return windows(corpus_tokens(source, tokenizer, max_tokens=sequences * length), sequences, length)


def held_out(data: Path, tokenizer: Any, max_tokens: int, domains: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Tokens by corpus: WikiText-2 test (rows joined by two newlines) and every (or each named) ``corpus/*.val``."""
    files = {WIKITEXT: data / "eval" / "wikitext2" / "hf_rows.test.jsonl"}
    for file in sorted((data / "corpus").glob("*.val.jsonl.zst")):
        if domains is None or file.name.partition(".")[0] in domains:
            files[file.name.removesuffix(".jsonl.zst")] = file
    return {name: corpus_tokens(file, tokenizer, whole=True, max_tokens=max_tokens) for name, file in files.items()}


def wikitext_valid(data: Path, tokenizer: Any, max_tokens: int) -> Tensor:
    """Tokens that settings are chosen on."""
    return corpus_tokens(
        data / "eval" / "wikitext2" / "hf_rows.valid.jsonl", tokenizer, whole=True, max_tokens=max_tokens
    )


def domain_windows(data: Path, tokenizer: Any, part: str, length: int, tokens: int | None) -> dict[str, Tensor]:
    """Windows [n, length] of the ``train`` or ``val`` part of every domain, by its name."""
    files = sorted((data / "corpus").glob(f"*.{part}.jsonl.zst"))
    found = {file.name.partition(".")[0]: corpus_tokens(file, tokenizer, max_tokens=tokens) for file in files}
    return {name: windows(ids, None, length) for name, ids in found.items()}


def mixture(data: Path, tokenizer: Any, budget: int, length: int) -> Tensor:
    """Training windows [n, length]: equal parts of the ``corpus/*.train`` domains, less where a domain has less."""
    files = sorted((data / "corpus").glob("*.train.jsonl.zst"))
    share = math.ceil(budget / len(files) / length) * length
    parts = [windows(corpus_tokens(file, tokenizer, max_tokens=share), None, length) for file in files]
    return torch.cat(parts)


def score(model: Any, texts: dict[str, Tensor], context: int, batch: int) -> dict[str, tuple[float, int]]:
    """(perplexity, tokens scored) by corpus."""
    found = {}
    for name, tokens in texts.items():
        result = perplexity(model, tokens, context=context, stride=context, batch=batch)
        found[name] = (result.value, result.tokens)
    return found


def report_quality(rows: Rows, found: dict[str, tuple[float, int]], **common: Any) -> None:
    """A row a corpus, and one for the mean perplexity of all corpora but WikiText-2."""
    for corpus, (value, count) in found.items():
        rows.add(**common, corpus=corpus, perplexity=value, tokens=count)
    others = [pair for corpus, pair in found.items() if corpus != WIKITEXT]
    if len(others) > 1:
        mean = sum(value for value, _ in others) / len(others)
        rows.add(**common, corpus="mean of corpora", perplexity=mean, tokens=sum(count for _, count in others))


def report_model(rows: Rows, bench: Any, variant: str, model: Any, **row: Any) -> None:
    """All rows of a model: its perplexities, and where ``bench.tasks`` are wanted its zero-shot accuracies."""
    found = score(model, bench.texts, bench.context, 4 if bench.gpu else 1)
    report_quality(rows, found, variant=variant, context=bench.context, **row)
    if bench.tasks is not None:
        limit, batch = (4, 4) if bench.small else (None, 32)
        answers = evaluate_tasks(model, bench.tokenizer, TASKS, data=bench.tasks, limit=limit, batch=batch)
        for task, answer in answers.items():
            rows.add(variant=variant, corpus=task, accuracy=answer["accuracy"], stderr=answer["stderr"], **row)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
