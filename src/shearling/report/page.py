"""The report page: sections of a run set in one HTML file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from shearling.files import write_whole
from shearling.report import sections, usage
from shearling.report.files import RunFiles, read_run

TEMPLATE = "page.html.j2"


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html, one page that needs no network, and return its path.

    Reads plan.json, metrics.json, metrics.jsonl and recipe.yaml; what a run does not have, its
    page does not show. Raises ShearlingError where the directory holds no run, a file of it cannot
    be read, or the page cannot be written.
    """
    run_dir = Path(run_dir)
    path = run_dir / "report.html"
    write_whole(path, render(read_run(run_dir)))
    return path


def render(run: RunFiles) -> str:
    """The page as text; everything that comes from the run is escaped."""
    return filled(
        TEMPLATE,
        overview=sections.overview(run),
        quality=sections.quality(run),
        sizes=sections.sizes(run),
        widths=sections.widths(run),
        training=sections.training(run),
        cost=sections.cost(run),
        samples=sections.samples(run),
        engines=usage.engines(run),
        loading=usage.loading(run),
        recipe=run.recipe.strip("\n"),
        versions=usage.versions(run),
    )


def filled(template: str, **values: Any) -> str:
    """A template of this package as text; every value is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def _source(template: str) -> str:
    return resources.files("shearling.report").joinpath(template).read_text(encoding="utf-8")
