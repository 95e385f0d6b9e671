"""The errors a user may see: one line that says what, where and what would be valid."""

from __future__ import annotations


class ShearlingError(ValueError):
    """A user's mistake or an unusable input; the command prints it on one line and exits with 2."""


class RecipeError(ShearlingError):
    """A recipe that cannot be run, named by field, value and what would be valid."""
