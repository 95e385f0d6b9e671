"""Text that every machine with Python has: the standard library's sources and documentation topics."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from shearling.errors import ShearlingError

#: part -> share of all documents
PARTS = {"calibration": 25, "recovery": 60, "evaluation": 15}
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "turtledemo"}


def stdlib_texts(part: str) -> Iterator[str]:
    """Documents of one part; the parts share none. The same Python gives the same documents in the same order.

    A module's prose (its docstrings) and the topics of the language reference come as documents of their own, so that
    the text is not code alone. Raises ShearlingError when the standard library's sources are not installed.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = {
        str(path.relative_to(root)): path
        for path in root.rglob("*.py")
        if not _SKIPPED.intersection(path.relative_to(root).parts) and path.stat().st_size > 400
    }
    if len(modules) < 50:
        raise ShearlingError(f"stdlib text: no sources under {root}; give a text file instead")
    names = sorted([*modules, *(f"topic:{name}" for name in topics)], key=_hash)
    for name in names:
        if _part(name) != part:
            continue
        if name in modules:
            source = modules[name].read_text(encoding="utf-8", errors="replace")
            prose = _docstrings(source)
            if len(prose) > 400:
                yield prose
            yield source
        else:
            yield topics[name.removeprefix("topic:")]


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _part(name: str) -> str:
    place = int(_hash("part:" + name)[:8], 16) % sum(PARTS.values())
    for part, share in PARTS.items():
        if place < share:
            return part
        place -= share
    raise AssertionError(place)


def _docstrings(source: str) -> str:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners))
    return "\n\n".join(text for text in found if text)
