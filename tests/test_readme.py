"""What the README tells people to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

import shearling
from shearling.cli import app
from shearling.recipe import parse_recipe

README = Path("README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (shearling .*?)(?:  #.*)?$", README, re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line: str) -> None:
    group = typer.main.get_command(app)
    name, command, rest = group.resolve_command(typer.Context(group), shlex.split(line)[1:])  # type: ignore[attr-defined]
    command.make_context(name, list(rest))
    for word in rest:
        if word.startswith("recipes/"):
            assert Path(word).exists()


def test_the_readme_shows_commands_and_targets_that_exist() -> None:
    assert len(COMMANDS) >= 5
    targets = re.findall(r"^    make (\w+)", README, re.MULTILINE)
    makefile = Path("Makefile").read_text(encoding="utf-8")
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_the_stages_it_shows_are_valid() -> None:
    shown = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert shown
    for stages in shown:
        content = yaml.safe_load(stages)
        before = {"stage": "prune", "method": "cfsp", "sparsity": 0.2}
        first = [before] if content[0]["stage"] == "recover" else []
        parse_recipe({"model": "smollm2-135m", "stages": [*first, *content]})


def test_the_python_example_names_the_public_api() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    compile(example, "README.md", "exec")
    names = set(re.findall(r"shearling\.(\w+)", example))
    assert names and names <= set(shearling.__all__)
