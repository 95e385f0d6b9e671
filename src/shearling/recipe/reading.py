"""From a file or plain values to a recipe, and one line for what is wrong with them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from shearling.errors import RecipeError
from shearling.recipe.base import Strict
from shearling.recipe.domains import Domain, Loading
from shearling.recipe.masking import Denoise, Sparsify
from shearling.recipe.pruning import CFSP, Baseline, CFSPReference, Reconstruct, Shearling
from shearling.recipe.quantising import Quantise
from shearling.recipe.sections import Calibration, Evaluation
from shearling.recipe.shapes import Budget, Ranked, Target
from shearling.recipe.training import AST, SPP, Adapt, Full, LoRA, Shear, SLoRB
from shearling.recipe.whole import METHODS, RECOVERIES, STAGES, TAGS, Recipe

Section = TypeVar("Section", bound=Strict)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; ``overrides`` are ``stage.field=value`` or ``field=value``.

    Raises RecipeError, one line with file, field, value and what would be valid.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        raise RecipeError(
            f"{path}{line}: is no YAML ({getattr(error, 'problem', None) or 'cannot be parsed'})"
        ) from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: must be a mapping with the keys model and stages")
    for override in overrides:
        _override(content, override)
    return parse_recipe(content, str(path))


def parse_recipe(content: dict[str, Any], source: str = "recipe", kind: type[Section] = Recipe) -> Section:
    """A Recipe, or one of its sections, from plain values; RecipeError as ``load_recipe``."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_one_line(error, content)}") from error


def schema() -> dict[str, Any]:
    """JSON schema of recipes."""
    return TypeAdapter(Recipe).json_schema()


def _override(content: dict[str, Any], override: str) -> None:
    address, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"--set {override}: must look like stage.field=value")
    *path, leaf = address.split(".")
    target: Any = content
    for part in path:
        stages = content.get("stages")
        found = [s for s in stages or [] if isinstance(s, dict) and s.get("stage") == part] if target is content else []
        if found:
            target = found[0]
        elif isinstance(target.get(part), dict):
            target = target[part]
        elif target is content and part not in Recipe.model_fields:
            known = [s.get("stage") for s in stages or [] if isinstance(s, dict)]
            raise RecipeError(
                f"--set {override}: no stage or section {part!r}; the recipe has {', '.join(map(str, known))}"
            )
        else:
            target[part] = {}
            target = target[part]
    target[leaf] = yaml.safe_load(text)


def _one_line(error: ValidationError, content: dict[str, Any]) -> str:
    problem = error.errors()[0]
    location = [part for part in problem["loc"] if part not in TAGS]
    if location[:1] == ["stages"] and len(location) > 1:
        # as --set addresses it
        stage = content["stages"][location[1]]
        named = stage.get("stage") if isinstance(stage, dict) else None
        location[:2] = [named if named in STAGES else f"stages.{location[1]}"]
    field = ".".join(map(str, location))
    match problem["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(str(location[-1]), _names(problem["loc"]), 1, 0.4)
            return f"{field}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
        case "missing":
            return f"{field}: is missing"
        case "union_tag_invalid" | "union_tag_not_found":
            tag = problem.get("ctx", {}).get("discriminator", "'stage'").strip("'")
            valid = METHODS if tag == "method" and "recover" not in problem["loc"] else RECOVERIES
            valid = STAGES if tag == "stage" else valid
            given = problem["input"].get(tag) if isinstance(problem["input"], dict) else problem["input"]
            near = difflib.get_close_matches(str(given), valid, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f"{field}.{tag} = {given!r}: must be one of {', '.join(valid)}{hint}"
        case _:
            message = problem["msg"].removeprefix("Value error, ")
            message = message.replace("Input should be", "must be", 1)
            return f"{field} = {problem['input']!r}: {message}" if field else message


def _names(location: tuple[int | str, ...]) -> list[str]:
    """Field names that are valid where an unknown key stands."""
    tags = {str(part) for part in location}
    owners: list[type[BaseModel]] = [CFSP, CFSPReference, Shearling, Baseline, Ranked, LoRA, Full, AST, SPP]
    if "reconstruct" in tags:
        return list(Reconstruct.model_fields)
    if "target" in tags:
        return [*Target.model_fields, *Budget.model_fields]
    if "domains" in tags:
        return list(Domain.model_fields)
    if "loading" in tags:
        return list(Loading.model_fields)
    if "slorb" in tags:
        return list(SLoRB.model_fields)
    for stage in (Adapt, Sparsify, Denoise, Shear, Quantise):
        if stage.model_fields["stage"].default in tags:
            return list(stage.model_fields)
    for owner in owners:
        if tags.intersection(get_args(owner.model_fields["method"].annotation)):
            return list(owner.model_fields)
    section = {"calibration": Calibration, "evaluate": Evaluation}.get(str(location[0]), Recipe)
    return list(section.model_fields)
