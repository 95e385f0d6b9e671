"""What the page says, as data: files of a run in, rows and captions out. None where there is none.

Plots are Markup (already escaped); everything else is plain text that the template escapes.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from markupsafe import Markup

from shearling.recipe import RECOVERIES
from shearling.report import plots
from shearling.report.files import Record, RunFiles, record, records
from shearling.report.names import model_names, reference_of
from shearling.report.numbers import (
    count,
    decimal,
    duration,
    finite,
    percent,
    ratio,
    significant,
    size,
    span,
    words,
)

#: what is drawn of training, by its name in the events
QUANTITIES = {
    "loss": "loss",
    "validation_loss": "validation loss",
    "flip_rate": "share of masks changed at the last refresh",
    "flips_from_start": "share of masks changed since the start",
    "decay": "decay of masked weights",
    "decay_ratio": "decay of masked weights over their mean gradients",
    "learning_rate": "learning rate",
}
#: what is drawn of training for every domain or space, by the part of its names in the events that comes before theirs
PARTED_QUANTITIES = {
    "weight": "weights of domains",
    "excess_loss": "losses of domains minus their references",
    "closed": "expected share of closed gates",
    "target": "share of gates that the target closes",
    "lambda1": "linear multipliers of the targets",
    "lambda2": "quadratic multipliers of the targets",
    "layer": "gates of layers",
}

Section = dict[str, Any]


def overview(run: RunFiles) -> Section:
    """Title, subtitle and the headline numbers."""
    method = run.plan.get("method")
    model = words(run.metrics.get("model") or run.plan.get("model"))
    done = "trained" if _only_trained(run) else "pruned" + (f" by {method}" if method else "")
    facts = [(key, run.metrics.get(key)) for key in ("family", "device")]
    return {
        "title": f"{model}, {done}",
        "lede": _lede(run),
        "facts": [f"{key} {value}" for key, value in facts if value],
        "numbers": [number for number in _headline_numbers(run) if number],
    }


def _only_trained(run: RunFiles) -> bool:
    return run.plan.get("method") in RECOVERIES


def _names(run: RunFiles) -> dict[str, str]:
    return model_names(trained=_only_trained(run))


def _measured(run: RunFiles) -> dict[str, Record]:
    models = {key: record(run.metrics.get(key)) for key in _names(run)}
    return {key: model for key, model in models.items() if model}


def _sizes(run: RunFiles) -> tuple[Record, Record]:
    """Sizes before and after: as planned, and as measured where a model was measured."""
    measured = _measured(run)
    last = next(reversed([row for key, row in measured.items() if key != "dense"]), {})
    known = ("parameters", "bytes")
    sizes = []
    for planned, model in (("before", measured.get("dense", {})), ("after", last)):
        counted = {key: model[key] for key in known if finite(model.get(key)) is not None}
        sizes.append(record(run.plan.get(planned)) | counted)
    return sizes[0], sizes[1]


def _lede(run: RunFiles) -> str:
    before, after = (finite(side.get("parameters")) for side in _sizes(run))
    if before is None or after is None or before <= 0:
        return ""
    if _only_trained(run):
        done = "Trained" if _measured(run) else "Planned: to train"
        return f"{done}; all {decimal(before)} parameters stay."
    done = "Removed" if _measured(run) else "Planned: to remove"
    gone = before - after
    return f"{done} {decimal(gone)} of {decimal(before)} parameters ({percent(gone / before)})."


def _headline_numbers(run: RunFiles) -> list[Section | None]:
    measured = _measured(run)
    before, after = _sizes(run)
    perplexity: Section | None = None
    if measured:
        names = _names(run)
        values = [(names[key], significant(row.get("perplexity"))) for key, row in measured.items()]
        perplexity = {"name": "Perplexity", "values": values, "note": _corpus(measured) or ""}
    shown = (
        ("Parameters", "parameters", decimal),
        ("Size", "bytes", size),
        ("FLOPs per token", "flops_per_token", decimal),
    )
    known = [row for row in shown if row[1] in before and row[1] in after]
    return [perplexity, *(_change(name, before[key], after[key], write) for name, key, write in known)]


def _change(name: str, before: Any, after: Any, write: Callable[[Any], str]) -> Section:
    if before == after:
        return {"name": name, "values": [("unchanged", write(before))], "note": ""}
    values = [("before", write(before)), ("after", write(after))]
    return {"name": name, "values": values, "note": ratio(after, before) + " of before"}


def _corpus(measured: dict[str, Record]) -> str | None:
    """The one text that every model was measured on, or None where they differ."""
    texts = {_corpus_of(row) for row in measured.values()}
    return texts.pop() if len(texts) == 1 else None


def _corpus_of(row: Record) -> str:
    return (
        f"{words(row.get('corpus'))}, {count(row.get('tokens'))} tokens, "
        f"context {count(row.get('context'))}, stride {count(row.get('stride'))}"
    )


def quality(run: RunFiles) -> Section | None:
    """Perplexity and distance from the model that was pruned or trained, one row a measured model."""
    measured = _measured(run)
    if not measured:
        return None
    reference = reference_of(measured)
    before = measured.get(reference, {}).get("perplexity")
    shared, names = _corpus(measured), _names(run)
    rows = []
    for key, row in measured.items():
        cells = [significant(row.get("perplexity")), ratio(row.get("perplexity"), before)]
        cells += [significant(row.get("kl"), 3), percent(row.get("agreement"))]
        rows.append({"name": names[key], "cells": cells, "corpus": None if shared else _corpus_of(row)})
    return {"rows": rows, "corpus": shared, "reference": names[reference]}


def sizes(run: RunFiles) -> Section | None:
    """Before => after, from the plan and from what was measured."""
    before, after = _sizes(run)
    shown = (
        ("Parameters", "parameters", count),
        ("of these in FFN", "ffn_parameters", count),
        ("Size of the weights", "bytes", size),
        ("KV cache per token", "kv_bytes_per_token", size),
        ("FLOPs per token", "flops_per_token", decimal),
    )
    rows = [
        (
            name,
            write(before.get(key)),
            write(after.get(key)),
            ratio(after.get(key), before.get(key)),
        )
        for name, key, write in shown
        if key in before or key in after
    ]
    return {"rows": _shapes(run) + rows} if rows else None


def _shapes(run: RunFiles) -> list[tuple[str, str, str, str]]:
    blocks = records(run.plan.get("blocks"))
    shown = (
        ("FFN channels a layer", "ffn"),
        ("Query heads a layer", "query_heads"),
        ("KV heads a layer", "kv_heads"),
    )
    rows = []
    for name, key in shown:
        pairs = [plots.finite_pair(block.get(key)) for block in blocks]
        before, after = ([pair[side] for pair in pairs] for side in (0, 1))
        if any(value is not None for value in before + after):
            sums = [sum(value for value in side if value is not None) for side in (after, before)]
            rows.append((name, span(before), span(after), ratio(*sums)))
    return rows


def widths(run: RunFiles) -> Section | None:
    """The plots of kept widths and the same numbers as a table; None where all stay as they are."""
    blocks = records(run.plan.get("blocks"))
    ffn = [plots.finite_pair(block.get("ffn")) for block in blocks]
    heads = [plots.finite_pair(block.get("kv_heads")) for block in blocks]
    importance = [finite(block.get("importance")) for block in blocks]
    if all(before == after for before, after in ffn + heads):
        return None
    rows = []
    for index, block in enumerate(blocks):
        queries = plots.finite_pair(block.get("query_heads"))
        cells = [count(value) for pair in (ffn[index], queries, heads[index]) for value in pair]
        layer = count(block.get("layer", index))
        rows.append({"layer": layer, "cells": [*cells, significant(importance[index], 3)]})
    return {
        "ffn": Markup(plots.width_plot("ffn", "FFN channels", ffn, importance)),
        "kv": Markup(plots.width_plot("kv", "KV heads", heads, height=150.0)),
        "importance": any(value is not None for value in importance),
        "rows": rows,
    }


def training(run: RunFiles) -> list[Section]:
    """The curves of every training stage, the loss first, with what that does not show as its caption."""
    stages: dict[str, dict[float, Record]] = {}
    for event in run.events:
        step = finite(event.get("step"))
        if step is not None and ("loss" in event or "validation_loss" in event):
            # A resumed run repeats the steps after its last checkpoint: the last one counts.
            by_step = stages.setdefault(words(event.get("stage")), {})
            by_step[step] = event if "loss" in event else {**by_step.get(step, {}), **event}
    curves = []
    for number, (stage, by_step) in enumerate(stages.items()):
        for key, what in QUANTITIES.items():
            steps = sorted(step for step, event in by_step.items() if key in event)
            points = [(step, finite(by_step[step][key])) for step in steps]
            # a quantity that one step alone tells is no curve
            if any(value is not None for _, value in points) and (len(points) > 1 or key == "loss"):
                events = [by_step[step] for step in steps]
                caption = (
                    _training_caption(stage, events) if key == "loss" else f"{what.capitalize()} of stage {stage}."
                )
                plot = Markup(plots.step_plot(f"{key.replace('_', '-')}-{number}", stage, points, what))
                legend = [("raw", f"logged {what}"), ("mean", "running mean")]
                curves.append({"stage": stage, "what": what, "plot": plot, "legend": legend, "caption": caption})
        for key, what in PARTED_QUANTITIES.items():
            domains = _of_domains(by_step, key)
            if domains:
                plot = Markup(plots.domain_plot(f"{key.replace('_', '-')}-{number}", stage, domains, what))
                legend = [(plots.domain_class(place), domain) for place, domain in enumerate(domains)]
                caption = f"{what.capitalize()} in stage {stage}."
                curves.append({"stage": stage, "what": what, "plot": plot, "legend": legend, "caption": caption})
    return curves


def _of_domains(by_step: dict[float, Record], key: str) -> dict[str, plots.Points]:
    """The points of every domain of which events tell the quantity at two steps or more."""
    found: dict[str, list[tuple[float, float | None]]] = {}
    for step, event in sorted(by_step.items(), key=lambda pair: pair[0]):
        for name, value in event.items():
            quantity, slash, domain = name.partition("/")
            if quantity == key and slash:
                found.setdefault(domain, []).append((step, finite(value)))
    return {
        domain: points
        for domain, points in found.items()
        if len(points) > 1 and any(value is not None for _, value in points)
    }


def _training_caption(stage: str, events: list[Record]) -> str:
    last = events[-1]
    speeds = [finite(event.get("tokens_per_second")) for event in events]
    known = [speed for speed in speeds if speed is not None]
    parts = [f"Loss of stage {stage} up to step {count(last.get('step'))}"]
    if finite(last.get("tokens")) is not None:
        parts.append(f"{count(last['tokens'])} tokens")
    if known:
        parts.append(f"{significant(median(known), 3)} tokens/s (median)")
    if finite(last.get("learning_rate")) is not None:
        parts.append(f"learning rate at the end {last['learning_rate']:.3g}")
    return ", ".join(parts) + "."


def cost(run: RunFiles) -> Section | None:
    """Wall time and peak memory of every stage, their total, and what the plan had estimated."""
    stages = records(run.metrics.get("stages"))
    estimate = record(run.plan.get("estimate"))
    if not stages and not estimate:
        return None
    seconds = [finite(stage.get("seconds")) for stage in stages]
    times = [value for value in seconds if value is not None]
    peaks = [finite(stage.get("peak_bytes")) for stage in stages]
    names = _names(run)
    rows = [
        {
            "name": names.get(words(stage.get("name")), words(stage.get("name"))),
            "seconds": duration(time),
            "bar": Markup(plots.share_bar(time, max(times, default=0.0))),
            "peak": size(peak),
        }
        for stage, time, peak in zip(stages, seconds, peaks, strict=True)
    ]
    expected = (duration(estimate.get("seconds")), size(estimate.get("peak_bytes")))
    return {
        "rows": rows,
        "total": (
            duration(sum(times) if times else None),
            size(max((peak for peak in peaks if peak is not None), default=None)),
        ),
        "estimate": f"{expected[0]}, {expected[1]} at the peak" if estimate else "",
    }


def samples(run: RunFiles) -> Section | None:
    """What the models wrote, prompt by prompt, one column a model."""
    given = records(run.metrics.get("samples"))
    models = {key: name for key, name in _names(run).items() if any(key in sample for sample in given)}
    if not models:
        return None
    rows = [
        {
            "prompt": words(sample.get("prompt")),
            "texts": [(name, words(sample.get(key))) for key, name in models.items()],
        }
        for sample in given
    ]
    return {"rows": rows, "columns": len(models)}
