"""What a person sees while a run works, and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from shearling.plan import HEADINGS, Proposal
from shearling.report import model_names, reference_of
from shearling.report.bench import by_cell, cell_title, milliseconds, short_name, speeds
from shearling.report.numbers import decimal, size


class Narrator:
    """Turns the events of a run into progress bars on a terminal, and into a few plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: Any = None
        self._what = ""
        self._said = -1

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """One event of a run."""
        stage = event.get("stage", "")
        if "warning" in event:
            self.say(f"{stage}: {event['warning']}")
        elif event.get("finished"):
            found = event.get("perplexity")
            self._what = ""
            self.say(f"{stage}: done" if found is None else f"{stage}: perplexity {found:.3f}")
        elif stage == "load":
            self.say(f"loading {event['model']}")
        elif "blocks" in event:
            self._step(stage, event["block"] + 1, event["blocks"], _error(event))
        elif "total" in event:
            self._step(stage, event["done"], event["total"], "")
        elif "loss" in event:
            speed = f"loss {event['loss']:.3f}  lr {event['learning_rate']:.1e}  {event['tokens_per_second']:.0f} tok/s"
            if "flops_utilisation" in event:
                speed += f" ({event['flops_utilisation']:.0%} of FLOPs)"
            self._step(stage, event["step"], event["steps"], speed)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _step(self, what: str, done: int, total: int, state: str) -> None:
        if self._live:
            if what != self._what:
                if self._task is not None:
                    self._progress.remove_task(self._task)
                self._task = self._progress.add_task(what, total=total, state=state)
                self._what = what
            self._progress.update(self._task, completed=done, state=state)
            return
        tenth = 10 * done // total
        if what != self._what or tenth != self._said:
            self._what, self._said = what, tenth
            self.say(f"{what}: {done}/{total}  {state}".rstrip())


def _error(event: dict[str, Any]) -> str:
    return f"error {event['error']:.4f}" if "error" in event else ""


def plan_table(rows: list[tuple[str, str, str, str]], title: str) -> Table:
    """The before => after table."""
    table = Table(title=title)
    table.add_column("")
    for name in ("before", "after", "after / before"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def engines_table(engines: Sequence[Mapping[str, Any]]) -> Table:
    """Engines, one a row, as ``plan.json`` has them."""
    table = Table(title="engines for the result in the folder MODEL", show_lines=True)
    for heading in ("engine", "loads", "faster by", "command, or why not"):
        table.add_column(heading, overflow="fold")
    for row in engines:
        table.add_row(row["engine"], "yes" if row["loads"] else "no", row["faster"], row["how"])
    return table


def shapes_table(proposals: Sequence[Proposal], title: str) -> Table:
    """Proposed shapes, one a row."""
    table = Table(title=title)
    measured = any(proposal.milliseconds is not None for proposal in proposals)
    for heading in (*HEADINGS, *(["milliseconds"] if measured else [])):
        table.add_column(heading.replace("_", " "), justify="right" if heading else "left")
    for proposal in proposals:
        table.add_row(*proposal.row())
    return table


def result_table(metrics: dict[str, Any]) -> Table:
    """Perplexity, divergence and size of each model of a run."""
    names = model_names(trained="pruned" not in metrics)
    table = Table(title=f"{metrics['model']} on {metrics['dense']['corpus']}, {metrics['dense']['tokens']} tokens")
    table.add_column("")
    for heading in ("perplexity", f"KL from {names[reference_of(metrics)]}", "agreement", "parameters", "MiB"):
        table.add_column(heading, justify="right")
    for key, name in names.items():
        row = metrics.get(key)
        if row is not None:
            moved = (f"{row['kl']:.4f}", f"{row['agreement']:.1%}") if "kl" in row else ("", "")
            size = f"{row['bytes'] / 2**20:.1f}"
            table.add_row(name, f"{row['perplexity']:.3f}", *moved, f"{row['parameters']:,}", size)
    return table


def bench_tables(found: dict[str, Any]) -> list[Table]:
    """What was benched, then speeds and latencies cell by cell, from what ``bench.json`` holds."""
    models = Table(title=f"{found['device']}, {found['dtype']}, {found['repeats']} repeats; ratios to the first model")
    for heading in ("", "run by", "parameters", "on disk", "note"):
        models.add_column(heading, justify="right" if heading in ("parameters", "on disk") else "left")
    for model in found["models"]:
        row = (model["runner"], decimal(model["parameters"]), size(model["disk_bytes"]), model["note"])
        models.add_row(short_name(model["name"]), *row)
    return [models, *(_cell_table(rows) for rows in by_cell(found))]


def _cell_table(rows: Sequence[Any]) -> Table:
    table = Table(title=f"{cell_title(rows[0])}; latencies in ms at p50 / p90 / p99")
    table.add_column("")
    for heading in ("prefill tok/s", "decode tok/s", "peak", "J/token", "prefill", "first token", "decode step"):
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = [f"{number}\n{ratio}" for number, ratio in speeds(row)]
        times = milliseconds(row)
        latencies = ["\n".join(times[start : start + 3]) for start in (0, 3, 6)]
        table.add_row(short_name(row["name"]), *numbers, *latencies)
    return table
