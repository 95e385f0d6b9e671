"""One self-contained HTML page about a run."""

from __future__ import annotations

from shearling.report.names import model_names, reference_of
from shearling.report.page import write_report

__all__ = ["model_names", "reference_of", "write_report"]
