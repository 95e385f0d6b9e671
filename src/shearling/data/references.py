"""Losses of domains, from a file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from shearling.errors import ShearlingError, check_domains
from shearling.recipe import reference_table


def read_references(file: str, domains: Iterable[str]) -> dict[str, float | dict[float, float]]:
    """The table (see ``reference_table``) that a YAML or JSON file has for these domains.

    Raises ShearlingError for a file that cannot be read, is no such table, or has other domains.
    """
    what = f"reference {file!r}"
    try:
        table = reference_table(yaml.safe_load(Path(file).read_text(encoding="utf-8")))
    except OSError as error:
        raise ShearlingError(f"{what}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ShearlingError(f"{what}: is neither YAML nor JSON") from error
    except ValueError as error:
        raise ShearlingError(f"{what}: {error}") from error
    check_domains(what, table, domains)
    return table
