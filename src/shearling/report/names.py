"""What the models of a run are called."""

from __future__ import annotations


def model_names(*, trained: bool) -> dict[str, str]:
    """Key in ``metrics.json`` -> the word for that model, in the order of the work; ``trained``: nothing was pruned.

    What such a run started from may have been pruned before, so it is not called dense.
    """
    if trained:
        return {"dense": "original", "recovered": "trained", "quantised": "quantised"}
    return {"dense": "dense", "pruned": "pruned", "recovered": "recovered", "quantised": "quantised"}
