"""Recipes: what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shearling.errors import RecipeError
from shearling.recipe import CFSP, load_recipe, parse_recipe, schema

BASE = {
    "model": "smollm2-135m",
    "stages": [{"stage": "prune", "method": "cfsp", "sparsity": 0.2}, {"stage": "recover", "method": "lora"}],
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(BASE))
    return file


def message(file: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("file", sorted(Path("recipes").glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_recipes_are_valid(file: Path) -> None:
    assert load_recipe(file).first.sparsity > 0


def test_a_dumped_recipe_loads_back_equal(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.dump())
    assert load_recipe(again) == recipe


@pytest.mark.parametrize("value", ["0", "1", "1.5", ".nan", "-0.1", ".inf"])
def test_sparsity_outside_0_to_1_is_refused(recipe_file: Path, value: str) -> None:
    text = message(recipe_file, f"prune.sparsity={value}")
    assert "prune.sparsity" in text
    assert "above 0 and below 1" in text


@given(st.floats(min_value=0.0, max_value=1.0, exclude_min=True, exclude_max=True))
def test_every_share_between_is_accepted(value: float) -> None:
    assert CFSP(sparsity=value).sparsity == value


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("prune.method=cfps", ["prune.method", "'cfps'", "did you mean cfsp?", "wanda-sp"]),
        ("prune.sparsty=0.3", ["prune.sparsty", "unknown key", "did you mean sparsity?"]),
        ("recover.mean_rnk=4", ["recover.mean_rnk", "did you mean mean_rank?"]),
        ("evaluate.contxt=512", ["evaluate.contxt", "did you mean context?"]),
        ("calibraton.length=512", ["calibraton", "the recipe has prune, recover"]),
        ("modle=x", ["modle", "did you mean model?"]),
        ("prune.sparsity=abc", ["prune.sparsity = 'abc'", "must be a valid number"]),
        ("prune.sparsity=", ["prune.sparsity = None", "must be a valid number"]),
        ("prune.sparsity.deep=1", ["prune.sparsity", "must be a valid number"]),
        ("prune.round_to=0", ["prune.round_to = 0", "greater than or equal to 1"]),
        ("recover.method=ful", ["recover.method = 'ful'", "lora, full, ast, spp", "did you mean full?"]),
        ("prune.stage=prunes", ["'prunes'", "did you mean prune?"]),
        ("prune.sparsity", ["--set prune.sparsity", "stage.field=value"]),
        ("calibration.length=1", ["calibration.length = 1", "greater than or equal to 2"]),
        ("dtype=float8", ["dtype = 'float8'", "float32"]),
        ("track=wandb", ["track = 'wandb'", "'tensorboard' or 'trackio'"]),
        ("stages=[]", ["stages", "at least 1"]),
        ("recover.teacher=smollm2-135m", ["recover.teacher = 'smollm2-135m'", "needs distill or layerwise above 0"]),
        ("recover.teacher_offload=true", ["recover.teacher_offload = True", "needs distill or layerwise"]),
        ("recover.teacher_dtype=bfloat16", ["recover.teacher_dtype = 'bfloat16'", "needs distill or layerwise"]),
        ("recover.teacher_top_k=8", ["recover.teacher_top_k = 8", "needs teacher_cache"]),
        ("recover.layerwise=-1", ["recover.layerwise = -1", "greater than or equal to 0"]),
    ],
)
def test_mistakes_are_named_with_a_remedy(recipe_file: Path, override: str, parts: list[str]) -> None:
    text = message(recipe_file, override)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"distill": 1, "divergence": "reverse", "teacher_cache": "c"},
            "teacher_cache = 'c': needs divergence = forward",
        ),
        ({"distill": 1, "temperature": 2, "teacher_cache": "c"}, "and temperature = 1"),
        ({"distill": 1, "layerwise": 1, "teacher_cache": "c"}, "a cache holds no block outputs"),
        ({"layerwise": 1, "teacher_cache": "c"}, "a cache holds no block outputs"),
        ({"distill": 1, "teacher_offload": True, "teacher_compile": True}, "leave teacher_offload off"),
        ({"recompute": True, "capture": True}, "capture = True: leave recompute off"),
        ({"distill": 1, "teacher_cache": "c", "capture": True}, "capture = True: leave teacher_cache off"),
    ],
)
def test_options_of_a_teacher_that_do_not_go_together(recipe_file: Path, changes: dict[str, object], what: str) -> None:
    assert what in message(recipe_file, *(f"recover.{name}={value}" for name, value in changes.items()))


def test_options_of_a_teacher_that_do(recipe_file: Path, tmp_path: Path) -> None:
    for changes in (
        ["distill=1", "layerwise=1", "teacher=other", "teacher_dtype=bfloat16", "teacher_offload=true"],
        ["distill=1", "teacher_compile=true", "teacher_cache=c", "teacher_top_k=8"],
    ):
        recipe = load_recipe(recipe_file, [f"recover.{change}" for change in changes])
        again = tmp_path / "again.yaml"
        again.write_text(recipe.dump())
        assert load_recipe(again) == recipe


def test_overrides_reach_stages_and_sections(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["prune.sparsity=0.5", "evaluate.context=64", "seed=3", "recover.mean_rank=2"])
    assert (recipe.first.sparsity, recipe.evaluate.context, recipe.seed) == (0.5, 64, 3)
    assert recipe.recover is not None
    assert recipe.recover.model_dump()["mean_rank"] == 2


@pytest.mark.parametrize(
    ("stages", "what"),
    [
        (BASE["stages"][::-1], "or recover alone; got recover, prune"),
        ([BASE["stages"][1]] * 2, "or recover alone; got recover, recover"),
        ([{"stage": "recover", "method": "ast"}], "needs the masks of a sparsify stage; alone it must be lora or full"),
        ([{"stage": "recover", "method": "lora", "ranks": "damaged"}], "ranks = damaged needs a prune stage"),
        ([BASE["stages"][0]] * 2, "must be prune or sparsify, and recover after either"),
        ([{"stage": "sparsify"}, BASE["stages"][1]], "after sparsify, recover.method must be ast or spp"),
        (
            [BASE["stages"][0], {"stage": "recover", "method": "ast"}],
            "after prune, recover.method must be lora or full",
        ),
        (["prune"], "stages.0"),
    ],
)
def test_order_of_stages(stages: list[object], what: str) -> None:
    with pytest.raises(RecipeError, match=f"^[^\n]*{what}[^\n]*$"):
        parse_recipe({**BASE, "stages": stages})


@pytest.mark.parametrize("method", ["lora", "full"])
def test_recipes_that_only_train(method: str, tmp_path: Path) -> None:
    recipe = parse_recipe({**BASE, "stages": [{"stage": "recover", "method": method, "distill": 1}]})
    assert recipe.first is None
    assert recipe.recover is not None and recipe.recover.method == method
    (tmp_path / "again.yaml").write_text(recipe.dump())
    assert load_recipe(tmp_path / "again.yaml", ["recover.teacher=other"]).recover == recipe.recover.model_copy(
        update={"teacher": "other"}
    )


def test_recipes_that_only_prune() -> None:
    recipe = parse_recipe({**BASE, "stages": BASE["stages"][:1]})
    assert recipe.recover is None and recipe.first is recipe.stages[0]


@pytest.mark.parametrize(
    ("content", "what"),
    [("", "must be a mapping"), ("a: [", "no YAML"), ("- 1", "must be a mapping"), ("stages: []", "model: is missing")],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: str, what: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(content)
    assert what in message(file)


def test_a_missing_file(tmp_path: Path) -> None:
    assert "cannot be read" in message(tmp_path / "none.yaml")


def test_schema_names_every_method() -> None:
    text = str(schema())
    for method in ("cfsp", "cfsp-reference", "shearling", "wanda-sp", "flap", "magnitude", "random", "lora", "full"):
        assert f"'{method}'" in text
