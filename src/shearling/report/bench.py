"""The page of a bench: what was run, and tables and bars for every cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from markupsafe import Markup

from shearling.report import svg
from shearling.report.numbers import DASH, count, finite, ratio, significant, size
from shearling.report.page import filled
from shearling.report.plots import LEFT, RIGHT, TOP, WIDTH

#: key of a result -> what the bars show
SPEEDS = {"prefill_tokens_per_second": "prefill, tokens/s", "decode_tokens_per_second": "decode, tokens/s"}
#: of a letter of a label, about
LETTER = 7.0


def bench_page(found: Mapping[str, Any]) -> str:
    """The page as text, of what ``bench.json`` holds; it needs no network, and names are escaped."""
    names = [model["name"] for model in found["models"]]
    energy = "no energy counter" if found["energy"] is None else f"energy by {found['energy']}"
    return filled(
        "bench.html.j2",
        title=" against ".join(map(short_name, (names[0], *names[1:2]))) + (" and others" if len(names) > 2 else ""),
        facts=[found["device"], found["dtype"], f"{found['repeats']} repeats", energy],
        models=[_model(model, found["models"][0]) for model in found["models"]],
        cells=[_cell(number, rows) for number, rows in enumerate(by_cell(found))],
        repeats=found["repeats"],
        versions=sorted(found["versions"].items()),
    )


def by_cell(found: Mapping[str, Any]) -> list[list[Mapping[str, Any]]]:
    """The results of every cell, a list of one result a model."""
    models, results = len(found["models"]), found["results"]
    return [results[start : start + models] for start in range(0, len(results), models)]


def cell_title(row: Mapping[str, Any]) -> str:
    """What was run for a result."""
    return f"batch {row['batch']}, context {row['context']}, {row['generate']} steps"


def milliseconds(row: Mapping[str, Any]) -> list[str]:
    """p50, p90 and p99 of prefill, first token and decode step."""
    return [
        significant(1e3 * row[what][share], 3)
        for what in ("prefill", "first_token", "decode")
        for share in ("p50", "p90", "p99")
    ]


def speeds(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Speeds, peak memory and joules a token, each with its ratio to the first model's."""
    numbers = {
        **{key: significant(row[key]) for key in SPEEDS},
        "peak_bytes": size(row["peak_bytes"]),
        "joules_per_token": significant(row["joules_per_token"], 3),
    }
    return [(number, ratio(row["ratios"][key], 1)) for key, number in numbers.items()]


def short_name(name: str) -> str:
    """The last part of a path."""
    return PurePath(name).name or name


def _model(model: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, str]:
    return {
        "name": model["name"],
        "runner": model["runner"],
        "parameters": count(model["parameters"]),
        "parameters_ratio": ratio(model["parameters"], first["parameters"]),
        "disk": size(model["disk_bytes"]),
        "disk_ratio": ratio(model["disk_bytes"], first["disk_bytes"]),
        "note": model["note"] or DASH,
    }


def _cell(number: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = [row["name"] for row in rows]
    return {
        "title": cell_title(rows[0]).capitalize(),
        "plots": [
            {
                "label": f"Plot of {what}",
                "picture": Markup(bars(f"{key.replace('_', '-')}-{number}", what, names, [row[key] for row in rows])),
            }
            for key, what in SPEEDS.items()
        ],
        "rows": [{"name": row["name"], "speeds": speeds(row), "latencies": milliseconds(row)} for row in rows],
    }


def bars(name: str, what: str, names: Sequence[str], values: Sequence[float], *, height: float = 200.0) -> str:
    """A bar for each model, the first in another colour; `name` is unique on the page."""
    bottom = height - 26
    known = [finite(value) or 0.0 for value in values]
    ticks = svg.nice_ticks(0, max(known), 3)
    up = svg.Scale(ticks[0], ticks[-1], bottom, TOP)
    pitch = (RIGHT - LEFT) / len(names)
    wide = min(0.6 * pitch, 90.0)
    body = [svg.text(0, 14, what, "label", "start"), svg.axis_left(ticks, up, LEFT, RIGHT)]
    for number, (model, value) in enumerate(zip(names, known, strict=True)):
        middle = LEFT + (number + 0.5) * pitch
        css = "bar after" if number else "bar before"
        hint = f"{model}: {significant(value)}"
        body.append(svg.bar(middle - wide / 2, wide, up(value), bottom, css, hint))
        body.append(svg.text(middle, bottom + 18, _shortened(short_name(model), int(pitch / LETTER)), "tick"))
    told = ", ".join(f"{model} {significant(value)}" for model, value in zip(names, known, strict=True))
    return svg.picture(name, what.capitalize(), f"Bars: {told}.", (WIDTH, height), *body)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: max(1, most - 1)] + "\N{HORIZONTAL ELLIPSIS}"
