"""Task names a user may mistype."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches

from shearling.errors import ShearlingError


def check_names(names: Iterable[str], known: Collection[str]) -> None:
    """ShearlingError for the first name that is not known, with the nearest one that is (or all, when few)."""
    for name in names:
        if name in known:
            continue
        near = get_close_matches(name, known, n=1, cutoff=0.5)
        advice = f"did you mean {near[0]}?" if near else f"there are {_some(sorted(known))}"
        raise ShearlingError(f"tasks: unknown task {name!r}; {advice}")


def _some(known: list[str], most: int = 12) -> str:
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")
