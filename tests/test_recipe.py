"""Recipes: what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shearling.errors import RecipeError
from shearling.methods.stages import in_shape
from shearling.recipe import CFSP, RANKED, Budget, Ranked, Target, load_recipe, parse_recipe, schema

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
    assert load_recipe(file).first is not None
    assert file.read_text().startswith("# ")


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
        ({"documents": "apart", "capture": True}, "capture = True: leave documents together"),
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
        (BASE["stages"][::-1], "of which any may be left out; got recover, prune"),
        ([BASE["stages"][1]] * 2, "of which any may be left out; got recover, recover"),
        ([{"stage": "recover", "method": "ast"}], "needs the masks of a sparsify stage; alone it must be lora or full"),
        ([{"stage": "recover", "method": "lora", "ranks": "damaged"}], "ranks = damaged needs a prune stage"),
        ([BASE["stages"][0]] * 2, "must be prune, sparsify, denoise or shear, then recover, then quantise"),
        ([{"stage": "sparsify"}, BASE["stages"][1]], "after sparsify, recover.method must be ast or spp"),
        (
            [BASE["stages"][0], {"stage": "recover", "method": "ast"}],
            "after prune, recover.method must be lora or full",
        ),
        (["prune"], "stages.0"),
        ([{"stage": "adapt"}], r"be followed by prune, sparsify, .* \(a recipe that only trains has recover alone\)"),
        ([{"stage": "adapt"}, BASE["stages"][1]], "followed by prune, .*; got adapt, recover"),
        ([{"stage": "adapt"}, {"stage": "quantise"}], "followed by prune, .*; got adapt, quantise"),
        ([BASE["stages"][0], {"stage": "adapt"}], "adapt must stand once, at the start, .*; got prune, adapt"),
        ([*[{"stage": "adapt"}] * 2, BASE["stages"][0]], "adapt must stand once, .*; got adapt, adapt, prune"),
        ([{"stage": "adapt"}, *[BASE["stages"][0]] * 2], "must be prune, .*; got prune, prune"),
        ([{"stage": "adapt", "tokns": 1}, BASE["stages"][0]], "adapt.tokns: unknown key; did you mean tokens?"),
        (
            [{"stage": "adapt"}, BASE["stages"][0], {**BASE["stages"][1], "distill": 1, "teacher_cache": "c"}],
            "recover.teacher_cache needs a teacher by name after adapt",
        ),
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


def test_recipes_that_adapt_first(recipe_file: Path, tmp_path: Path) -> None:
    plain = load_recipe(recipe_file)
    recipe = parse_recipe({**BASE, "stages": [{"stage": "adapt", "tokens": 64}, *BASE["stages"]]})
    assert plain.adapt is None and recipe.adapt is recipe.stages[0] is recipe.trained[0]
    assert (recipe.first, recipe.recover) == (plain.first, plain.recover)
    (tmp_path / "again.yaml").write_text(recipe.dump())
    assert load_recipe(tmp_path / "again.yaml", ["adapt.tokens=64"]) == recipe


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
    for method in (
        "cfsp",
        "cfsp-reference",
        "shearling",
        "wanda-sp",
        "flap",
        "magnitude",
        "random",
        *RANKED,
        "lora",
        "full",
    ):
        assert f"'{method}'" in text


# --- targets


def with_target(target: object, method: str = "sheared-llama") -> dict[str, object]:
    stage = {"stage": "shear" if method == "sheared-llama" else "prune", "method": method, "target": target}
    return {**BASE, "stages": [stage]}


@pytest.mark.parametrize("method", ["sheared-llama", "minitron"])
@pytest.mark.parametrize(
    ("target", "what"),
    [
        ({"layers": 3, "parameters": 0.5}, "has layers of a shape and parameters of a budget; give one or the other"),
        ({"layers": 3, "profile": "deeper"}, "has layers of a shape and profile of a budget"),
        ({"parameters": 0.5, "bytes": 10}, "needs one of parameters, bytes, flops, latency, and no other of them"),
        ({"profile": "deeper"}, "needs one of parameters, bytes, flops, latency, and no other of them"),
        ({"parametrs": 0.5}, "target.parametrs: unknown key; did you mean parameters?"),
        ({"flops": 0.5, "profil": "deeper"}, "target.profil: unknown key; did you mean profile?"),
        ({"flops": 0}, "target.flops = 0: must be greater than 0"),
        ({"flops": float("inf")}, "target.flops = inf: must be a finite number"),
        ({"flops": "half"}, "target.flops = 'half': must be a valid number"),
        ({"latency": 0.5, "context": 0}, "target.context = 0: must be greater than or equal to 1"),
        ({"bytes": 0.5, "context": 64, "batch": 2}, "has batch, context, which only a latency is measured by"),
        ({"layers": 3, "latency": 0.5}, "has layers of a shape and latency of a budget"),
        (
            {"flops": 0.5, "profile": "deep"},
            "profile = 'deep': must be 'balanced', 'deeper', 'shallower', 'stream' or 'depth'",
        ),
        ({}, "target = {}: needs at least one of layers, hidden, heads, kv_heads, ffn"),
        (0.5, "target = 0.5: must be"),
    ],
)
def test_targets_that_are_neither_a_shape_nor_a_budget(method: str, target: object, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(with_target(target, method))
    assert what in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "bound"),
    [
        ({"parameters": 0.5}, ("parameters", 0.5)),
        ({"parameters": 70000000, "profile": "deeper"}, ("parameters", 70000000)),
        ({"bytes": "2e8"}, ("bytes", 2e8)),
        ({"flops": 0.5, "profile": "shallower"}, ("flops_per_token", 0.5)),
        ({"bytes": 0.5, "profile": "depth"}, ("bytes", 0.5)),
        ({"latency": 12.5, "phase": "prefill", "batch": 4}, ("milliseconds", 12.5)),
    ],
)
def test_budgets(target: dict[str, object], bound: tuple[str, float], tmp_path: Path) -> None:
    recipe = parse_recipe(with_target(target, "minitron"))
    assert isinstance(recipe.first, Ranked) and isinstance(recipe.first.target, Budget)
    assert (recipe.first.target.of, recipe.first.target.amount) == bound
    assert recipe.first.target.profile == target.get("profile", "balanced")
    (tmp_path / "again.yaml").write_text(recipe.dump())
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert Ranked(method="minitron", target=recipe.first.target) == recipe.first


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"target_warmup": 0.9, "binary": 0.2}, "binary = 0.2: gates would be 0 or 1 before the targets have risen"),
        ({"target_warmup": 1.0}, "target_warmup = 1.0: must be less than 1"),
        ({"target_schedule": "cosine"}, "target_schedule = 'cosine': must be 'linear' or 'cubic'"),
        ({"gate_start": "closed"}, "gate_start = 'closed': must be 'open' or 'ranked'"),
        ({"multiplier_learning_rate": 0}, "multiplier_learning_rate = 0: must be greater than 0"),
    ],
)
def test_settings_of_gates_that_make_no_sense(changes: dict[str, object], what: str) -> None:
    content = with_target({"parameters": 0.5})
    content["stages"][0].update(changes)
    with pytest.raises(RecipeError, match=f"^recipe: shear.{what}[^\n]*$"):
        parse_recipe(content)


def test_shortgpt_has_budgets_for_whole_blocks_alone() -> None:
    with pytest.raises(RecipeError, match="shortgpt drops whole blocks; name layers alone, or give a budget profile"):
        parse_recipe(with_target({"parameters": 0.5}, "shortgpt"))
    recipe = parse_recipe(with_target({"parameters": 0.5, "profile": "depth"}, "shortgpt"))
    assert in_shape(recipe).first.target == Target(layers=11)
    # as a run records it
    assert parse_recipe(yaml.safe_load(in_shape(recipe).dump())) == in_shape(recipe)


# --- domains

WEB = {"text": "a", "validation": "b"}
CODE = {"text": "c", "validation": "d"}


def with_domains(**changes: object) -> dict[str, object]:
    recover = {"stage": "recover", "method": "full", "domains": {"web": WEB, "code": CODE}, **changes}
    return {**BASE, "stages": [BASE["stages"][0], recover]}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"text": "x"}, "recover.text = 'x': leave it out; domains name texts of their own"),
        ({"validation": "x"}, "recover.validation = 'x': leave it out; domains name validation texts of their own"),
        ({"domains": {}}, "recover.domains = {}: needs at least one domain"),
        ({"domains": {"web": {"weight": 1}}}, "recover.domains.web.text: is missing"),
        ({"domains": {"web": "x"}}, "recover.domains.web = 'x': must be"),
        ({"domains": {"web": {**WEB, "wight": 1}}}, "recover.domains.web.wight: unknown key; did you mean weight?"),
        (
            {"domains": {"web": {**WEB, "weight": -1}}},
            "recover.domains.web.weight = -1: must be greater than or equal to 0",
        ),
        ({"domains": {"web": {**WEB, "weight": float("nan")}}}, "recover.domains.web.weight = nan: must be"),
        ({"domains": {"web": {**WEB, "weight": 0}}}, "needs a domain whose weight is above 0"),
        (
            {"domains": {"web": WEB, "code": {**CODE, "weight": 3}}},
            "domain 'web' has no weight; all must have one, or none",
        ),
        ({"domains": {"web": WEB, "code": {"text": "c"}}}, "domain 'code' has no validation text; all must have one"),
        ({"validation_windows": 0}, "recover.validation_windows = 0: must be a number above 0, or auto"),
        ({"validation_windows": "all"}, "recover.validation_windows = 'all': must be a number above 0, or auto"),
        ({"domains": None, "loading": {"reference": "source"}}, "needs domains with a validation text each"),
        (
            {"domains": {"web": {"text": "a"}}, "loading": {"reference": "source"}},
            "needs domains with a validation text",
        ),
        ({"domains": {"web": {"text": "a"}}, "keep": "best"}, "keep = 'best' needs a validation text"),
        ({"loading": {}}, "recover.loading.reference: is missing"),
        ({"loading": {"reference": "source", "flor": 0.1}}, "recover.loading.flor: unknown key; did you mean floor?"),
        ({"loading": {"reference": "source", "floor": 0.6}}, "floor = 0.6; must be at most 1/2, or weights exceed 1"),
        ({"loading": {"reference": "source", "eta": 0}}, "recover.loading.eta = 0: must be greater than 0"),
        ({"loading": {"reference": {"web": 2}}}, "reference: misses the domain 'code'"),
        (
            {"loading": {"reference": {"web": 2, "code": 1, "c4": 2}}},
            "reference: unknown domain 'c4'; must be one of web, code",
        ),
        ({"loading": {"reference": {"web": 2, "code": "low"}}}, "domain 'code': loss = 'low'; must be a finite number"),
        ({"loading": {"reference": {"web": 2, "code": -1}}}, "domain 'code': loss = -1; must be a finite number"),
        (
            {"loading": {"reference": {"web": 2, "code": {7e9: 2}}}},
            "domain 'code': 1 models; a scaling law needs at least 3",
        ),
        (
            {"loading": {"reference": {"web": 2, "code": {0: 3, 1: 2, 2: 1}}}},
            "domain 'code': parameters = 0; must be above 0",
        ),
        ({"loading": {"reference": 3}}, "recover.loading.reference = 3: must be a table of losses by domain"),
    ],
)
def test_domains_that_do_not_fit_are_named(changes: dict[str, object], what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(with_domains(**changes))
    assert what in str(caught.value) and "\n" not in str(caught.value)


def test_domains_that_fit(tmp_path: Path) -> None:
    family = {"web": 2, "code": {"7e9": 2.0, 13e9: 1.9, 70e9: 1.7}}
    for changes in (
        {},
        {"keep": "best", "validation_windows": "auto"},
        {"loading": {"reference": "source", "clamp": False, "floor": 0.5}},
        {"loading": {"reference": family}},
    ):
        recipe = parse_recipe(with_domains(**changes))
        assert recipe.recover is not None and recipe.recover.text is None
        again = tmp_path / "again.yaml"
        again.write_text(recipe.dump())
        assert load_recipe(again) == recipe
    assert recipe.recover.loading is not None
    assert recipe.recover.loading.reference == {"web": 2.0, "code": {7e9: 2.0, 13e9: 1.9, 70e9: 1.7}}
    plain = parse_recipe(BASE).recover
    assert plain is not None and plain.text == "stdlib:recovery"
