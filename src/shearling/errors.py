"""The errors a user may see: one line that says what, where and what would be valid."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class ShearlingError(ValueError):
    """A user's mistake or an unusable input; the command prints it on one line and exits with 2."""


class RecipeError(ShearlingError):
    """A recipe that cannot be run, named by field, value and what would be valid."""


def unwritable(path: Path, error: Exception) -> ShearlingError:
    """The error for a place that cannot be written."""
    reason = getattr(error, "strerror", None) or error
    return ShearlingError(f"{path}: cannot be written ({reason}); free space or give another folder")


def check_domains(what: str, named: Iterable[str], domains: Iterable[str]) -> None:
    """Raise ShearlingError unless the names that ``what`` gives are those of the domains, all and no others."""
    named, domains = list(named), list(domains)
    for name in domains:
        if name not in named:
            raise ShearlingError(f"{what}: misses the domain {name!r}")
    for name in named:
        if name not in domains:
            raise ShearlingError(f"{what}: unknown domain {name!r}; must be one of {', '.join(domains)}")
