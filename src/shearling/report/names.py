"""What the models of a run are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_names(*, trained: bool) -> dict[str, str]:
    """Key in ``metrics.json`` -> the word for that model, in the order of the work; ``trained``: nothing was pruned.

    What such a run started from may have been pruned before, so it is not called dense.
    """
    if trained:
        return {"dense": "original", "recovered": "trained", "quantised": "quantised"}
    return {key: key for key in ("dense", "adapted", "pruned", "recovered", "quantised")}


def reference_of(measured: Mapping[str, Any]) -> str:
    """Key of the model that others are compared with: the last one before anything was pruned."""
    return "adapted" if "adapted" in measured else "dense"
