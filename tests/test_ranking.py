"""Cuts to exact shapes: scores against float64 references and closed forms, and what the cuts make of a model."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shearling.methods.ranking as ranking
from shearling.anatomy import BlockShape, anatomy_of, expressible
from shearling.errors import RecipeError, ShearlingError
from shearling.methods.hard_concrete import most_open
from shearling.methods.ranking import Scores, drawn, heads_of_groups, highest, plan_ranked, swept, unit_scores
from shearling.methods.sheared_llama import gate_shapes, structure_of
from shearling.methods.stages import plan_stage, preview_recipe
from shearling.plan import Structure, target_anatomy
from shearling.recipe import Ranked, Recipe, Target, parse_recipe
from shearling.surgery import cut_
from shearling.sweep import Angles, Magnitudes, Store, Walk
from tests.tiny import FAMILIES, tiny_config, tiny_model, tiny_tokens

#: norms that read the residual stream, by the names the stock classes give them
STREAM_NORMS = {
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm"),
    "gemma3_text": ("input_layernorm", "pre_feedforward_layernorm"),
    "gpt2": ("ln_1", "ln_2"),
    "opt": ("self_attn_layer_norm", "final_layer_norm"),
}
LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")


def ranked(method: str, **target: int) -> Ranked:
    return Ranked(method=method, target=Target(**target))  # pyrefly: ignore


def kept_of(outcome: Any) -> dict[str, tuple[int, ...]]:
    (edit,) = outcome.edits
    assert isinstance(edit, Structure)
    return dict(edit.kept)


def captured(model: Any, tokens: Tensor) -> dict[str, list[Tensor]]:
    """Outputs of norms, inputs of output projections and states around blocks, of one plain pass, float64 [B, T, D]."""
    family = anatomy_of(model.config).family
    seen: dict[str, list[Tensor]] = {name: [] for name in ("norm", "heads", "ffn", "in", "out")}

    def keep(kind: str, value: Tensor) -> None:
        seen[kind].append(value.double().view(*tokens.shape, -1))

    blocks = model.get_submodule(family.blocks)
    norms = [b.get_submodule(name) for b in blocks for name in STREAM_NORMS.get(family.model_type, LLAMA_NORMS)]
    handles = [
        norm.register_forward_hook(lambda m, args, y: keep("norm", y))
        for norm in (*norms, model.get_submodule(family.final_norm))
    ]
    for block in blocks:
        for kind, name in (("heads", family.attention_output), ("ffn", family.ffn_output)):
            linear = block.get_submodule(name)
            handles.append(linear.register_forward_pre_hook(lambda m, args, kind=kind: keep(kind, args[0])))
        handles.append(block.register_forward_pre_hook(lambda m, args: keep("in", args[0])))
        handles.append(block.register_forward_hook(lambda m, args, y: keep("out", y)))
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def activation(x_BTU: Tensor) -> Tensor:
    """Minitron's mean over the sequence of sizes, L2 over the batch."""
    return x_BTU.abs().mean(1).square().sum(0).sqrt()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [2, 5])
def test_scores_are_those_of_a_plain_pass(family: str, batch: int) -> None:
    model, tokens = tiny_model(family, seed=1), tiny_tokens(5, 12, seed=2)
    seen, scores = captured(model, tokens), swept(Walk(model, tokens, batch=batch))
    assert len(seen["norm"]) == 7
    torch.testing.assert_close(scores.hidden, sum(map(activation, seen["norm"])), rtol=1e-5, atol=0)
    for layer in range(3):
        heads = torch.linalg.vector_norm(seen["heads"][layer].unflatten(-1, (4, 8)), dim=-1)
        torch.testing.assert_close(scores.heads[layer], activation(heads), rtol=1e-5, atol=0)
        torch.testing.assert_close(scores.ffn[layer], activation(seen["ffn"][layer]), rtol=1e-5, atol=1e-9)
        cosine = torch.nn.functional.cosine_similarity(seen["in"][layer], seen["out"][layer], dim=-1)
        assert scores.layers[layer].item() == pytest.approx(1 - cosine.mean().item(), rel=1e-5)


def test_activation_by_hand() -> None:
    # two sequences of two tokens, two units of two channels
    x = torch.tensor([[3.0, 4, 0, 1], [0, -5, 0, -3], [6, 8, 0, 0], [0, 0, 2, 0]])
    channels, heads = Magnitudes(2), Magnitudes(2, 2)
    for sum_of in (channels, heads):
        sum_of(x[:2])
        sum_of(x[2:])
    # mean sizes 1.5, 4.5, 0, 2 and 3, 4, 1, 0
    expected = [math.hypot(1.5, 3), math.hypot(4.5, 4), 1.0, 2.0]
    torch.testing.assert_close(channels.result(), torch.tensor(expected, dtype=torch.float64))
    # sizes of heads: 5, 5 and 10, 0; 1, 3 and 0, 2
    expected = [math.hypot(5, 5), math.hypot(2, 1)]
    torch.testing.assert_close(heads.result(), torch.tensor(expected, dtype=torch.float64))


def test_influence_in_closed_form() -> None:
    x = torch.tensor([[[1.0, 0], [2, 0]], [[0, 3], [1, 1]]])
    y = torch.tensor([[[5.0, 0], [0, 1]], [[0, -2], [1, 0]]])
    angles = Angles()
    angles(x[:1], y[:1])
    angles(x[1:], y[1:])
    assert angles.influence == pytest.approx(1 - (1 + 0 - 1 + math.sqrt(0.5)) / 4, abs=1e-7)


def test_a_head_stays_for_its_rank_inside_its_group() -> None:
    score = torch.tensor([[9.0, 1, 8], [2, 4, 3], [7, 7, 7]])
    assert heads_of_groups(score, 3, 2) == (0, 2, 4, 5, 6, 7)
    # groups sum to 18, 9, 21
    assert heads_of_groups(score, 2, 3) == (0, 1, 2, 6, 7, 8)
    assert heads_of_groups(score, 1, 1) == (6,)


def test_the_cut_names_what_scores_highest() -> None:
    anatomy = anatomy_of(tiny_config("llama"))
    scores = Scores(
        torch.tensor([0.3, 0.1, 0.2]),
        torch.arange(32.0),
        [torch.tensor([1.0, 2, 4, 3]), torch.zeros(4), torch.tensor([5.0, 1, 1, 1])],
        [torch.arange(48.0), torch.zeros(48), -torch.arange(48.0)],
    )
    target = Target(layers=2, hidden=3, heads=1, kv_heads=1, ffn=2)
    assert highest(anatomy, target_anatomy(anatomy, target), scores).kept == {
        "layers": (0, 2),
        "hidden": (29, 30, 31),
        "ffn.0": (46, 47),
        "ffn.2": (0, 1),
        "query_head.0": (2,),
        "query_head.2": (0,),
    }
    assert highest(anatomy, anatomy, scores).kept == {}


SHAPES: list[dict[str, int]] = [
    {"layers": 2},
    {"ffn": 20},
    {"heads": 2},
    {"layers": 1, "ffn": 7},
    {"kv_heads": 1},
    {"layers": 2, "heads": 1, "kv_heads": 1, "ffn": 16},
]


CUTS = [
    pytest.param(family, method, target, id=f"{family}-{method}-{','.join(f'{k}={v}' for k, v in target.items())}")
    for family in FAMILIES
    for method in ("minitron", "shortgpt", "random-shape")
    for target in SHAPES
    # ShortGPT drops blocks alone, and where a config states no head_dim heads do not go alone
    if (method != "shortgpt" or set(target) == {"layers"})
    and (family not in ("opt", "gpt2") or not {"heads", "kv_heads"} & set(target))
]


@pytest.mark.parametrize(("family", "method", "target"), CUTS)
def test_the_cut_has_exactly_the_target_shape(family: str, method: str, target: dict[str, int]) -> None:
    model, tokens = tiny_model(family), tiny_tokens(3, 10)
    anatomy = anatomy_of(model.config)
    before = copy.deepcopy(model.state_dict())
    outcome = plan_stage(model, tokens, ranked(method, **target), batch=2, seed=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    after = cut_(model, outcome.edits)
    assert after == outcome.plan.anatomy_after == target_anatomy(anatomy, Target(**target)) == anatomy_of(model.config)
    assert expressible(after)
    assert sum(p.numel() for p in model.parameters()) == outcome.plan.after.parameters
    assert torch.isfinite(model(tiny_tokens()).logits).all()
    stored = json.loads(json.dumps(outcome.plan.to_json()))
    assert len(stored["blocks"]) == after.num_layers
    assert bool(outcome.plan.importance) == (method != "random-shape")


def test_shortgpt_drops_the_blocks_of_least_influence() -> None:
    model, tokens = tiny_model("llama", num_hidden_layers=6), tiny_tokens(4, 16)
    outcome = plan_ranked(model, tokens, ranked("shortgpt", layers=4), batch=2)
    influence = outcome.plan.importance
    assert len(influence) == 6
    assert kept_of(outcome) == {"layers": tuple(sorted(sorted(range(6), key=lambda n: -influence[n])[:4]))}
    both = kept_of(plan_ranked(model, tokens, ranked("minitron", layers=4, ffn=8), batch=2))
    assert both["layers"] == kept_of(outcome)["layers"]
    assert {space.partition(".")[2] for space in both if space != "layers"} == set(map(str, both["layers"]))


def test_a_random_shape_reads_nothing_and_follows_its_seed() -> None:
    model = tiny_model("llama")
    settings = ranked("random-shape", layers=2, heads=2, ffn=20)
    draws = [kept_of(plan_ranked(model, torch.empty(0), settings, seed=seed)) for seed in range(8)]
    assert draws[3] == kept_of(plan_ranked(model, torch.empty(0), settings, seed=3))
    assert len({tuple(sorted(draw.items())) for draw in draws}) == 8
    assert all(a < b for draw in draws for indices in draw.values() for a, b in itertools.pairwise(indices))
    hidden = highest(
        anatomy := anatomy_of(model.config), target_anatomy(anatomy, Target(hidden=8)), drawn(anatomy, 1)
    ).kept["hidden"]
    assert len(set(hidden)) == 8 and max(hidden) < 32


def test_every_choice_of_a_random_shape_is_as_likely() -> None:
    anatomy = anatomy_of(tiny_config("llama"))
    after = target_anatomy(anatomy, Target(layers=1, kv_heads=1, heads=1))
    counts: dict[tuple[int, int], int] = {}
    for seed in range(600):
        kept = highest(anatomy, after, drawn(anatomy, seed)).kept
        (layer,) = kept["layers"]
        (head,) = kept[f"query_head.{layer}"]
        counts[layer, head] = counts.get((layer, head), 0) + 1
    # 12 choices, 50 expected of each, standard deviation 6.8
    assert len(counts) == 12
    assert all(20 <= count <= 80 for count in counts.values())


@pytest.mark.parametrize("method", ["minitron", "shortgpt"])
@pytest.mark.parametrize("lost", [0, 1, 3])
def test_finished_blocks_are_kept_for_any_target(
    tmp_path: Path, method: str, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(4, 12)
    told: list[dict[str, Any]] = []
    first, other = ranked(method, layers=2), ranked(method, layers=1)
    whole = plan_ranked(model, tokens, first, batch=2, state_dir=tmp_path, on_event=told.append)
    assert [event["block"] for event in told] == [0, 1, 2]
    assert {event["blocks"] for event in told} == {3}
    files = sorted(tmp_path.rglob("*.safetensors"))
    for file in files[len(files) - lost :]:
        file.unlink()
    if not lost:
        monkeypatch.setattr(ranking.Walk, "enter", lambda walk: pytest.fail("ran again"))
    again = plan_ranked(model, tokens, other, batch=2, state_dir=tmp_path)
    assert again.plan.importance == whole.plan.importance
    assert kept_of(plan_ranked(model, tokens, first, batch=2, state_dir=tmp_path)) == kept_of(whole)


def test_widths_of_a_resumed_sweep_are_the_same(tmp_path: Path) -> None:
    model, tokens = tiny_model("gemma2"), tiny_tokens(4, 12)
    whole = swept(Walk(model, tokens, batch=2), store=Store(tmp_path))
    for missing in ("block-0001", "final-norm"):
        (tmp_path / f"{missing}.safetensors").unlink()
        again = swept(Walk(model, tokens, batch=2), store=Store(tmp_path))
        assert torch.equal(again.hidden, whole.hidden)
        assert torch.equal(again.layers, whole.layers)
        assert all(map(torch.equal, again.ffn, whole.ffn))
        assert all(map(torch.equal, again.heads, whole.heads))


def test_a_target_that_does_not_fit_is_refused_before_the_sweep() -> None:
    with pytest.raises(ShearlingError, match=r"target.ffn = 49"):
        plan_ranked(tiny_model("llama"), torch.empty(0), ranked("minitron", ffn=49))


# --- recipes


def recipe_of(target: Any, method: str = "minitron", recover: dict[str, Any] | None = None) -> Recipe:
    stages = [{"stage": "prune", "method": method, "target": target}, *([] if recover is None else [recover])]
    return parse_recipe({"model": "m", "device": "cpu", "stages": stages})


@pytest.mark.parametrize(
    ("method", "target", "what"),
    [
        ("minitron", {}, r"prune.target = {}: needs at least one of layers, hidden, heads, kv_heads, ffn"),
        ("minitron", {"layers": 0}, r"prune.target.layers = 0: must be greater than or equal to 1"),
        ("minitron", {"fnn": 4}, r"prune.target.fnn: unknown key; did you mean ffn\?"),
        ("minitron", None, r"prune.target = None: must be a valid dictionary"),
        ("minitron", {"ffn": "wide"}, r"prune.target.ffn = 'wide': must be a valid integer"),
        ("shortgpt", {"ffn": 4}, r"prune.target = .*: shortgpt drops whole blocks; name layers alone"),
        ("shortgpt", {"layers": 2, "ffn": 4}, r"name layers alone"),
        ("minitorn", {"layers": 2}, r"prune.method = 'minitorn': must be one of .*; did you mean minitron\?"),
    ],
)
def test_recipes_with_mistakes(method: str, target: Any, what: str) -> None:
    with pytest.raises(RecipeError, match=f"^[^\n]*{what}[^\n]*$"):
        recipe_of(target, method)


def test_a_missing_target_and_ranks_that_a_target_leaves_alike() -> None:
    with pytest.raises(RecipeError, match=r"prune.target: is missing"):
        parse_recipe({"model": "m", "stages": [{"stage": "prune", "method": "minitron"}]})
    with pytest.raises(RecipeError, match=r"ranks = damaged: needs widths that differ by block"):
        recipe_of({"layers": 2}, recover={"stage": "recover", "method": "lora", "ranks": "damaged"})


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
@pytest.mark.parametrize("recover", [None, {"method": "lora"}, {"method": "full", "distill": 1}])
def test_a_recipe_is_previewed_from_shapes_alone(family: str, recover: dict[str, Any] | None) -> None:
    training = None if recover is None else {"stage": "recover", "batch": 1, "length": 8, **recover}
    recipe = recipe_of({"layers": 2, "heads": 2, "ffn": 20}, recover=training)
    with torch.device("meta"):
        planned = preview_recipe(recipe, tiny_model(family).to("meta"))
    assert planned.anatomy_after.shapes == (BlockShape(ffn=20, query_heads=2, kv_heads=2),) * 2
    rows = {name: cells for name, *cells in planned.rows()}
    assert rows["layers"][:2] == ["3", "2"]
    assert rows["query heads"][:2] == ["4", "2"]
    assert rows["ffn"][:2] == ["48", "20"]
    made = plan_stage(tiny_model(family), tiny_tokens(), recipe.first)
    assert planned.after == made.plan.after
    assert ("peak_bytes" in planned.estimate) == (recover is not None)


def test_the_memory_of_a_projection_is_told() -> None:
    def peak(hidden: int, **changes: float) -> int:
        training = {"stage": "recover", "method": "full", "batch": 1, "length": 8, "distill": 1, **changes}
        recipe = recipe_of({"hidden": hidden, "ffn": 20}, recover=training)
        with torch.device("meta"):
            return preview_recipe(recipe, tiny_model("llama").to("meta")).estimate["peak_bytes"]

    # itself, its gradient and two moments
    assert peak(16, layerwise=1) - peak(16) == 16 * 16 * 32
    assert peak(32, layerwise=1) == peak(32)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_of_units_lead_to_the_ranked_cut(family: str) -> None:
    model, tokens = tiny_model(family), tiny_tokens(4, 12)
    anatomy, scores = anatomy_of(model.config), unit_scores(model, tokens, batch=2)
    assert {space: tuple(score.shape) for space, score in scores.items()} == gate_shapes(anatomy)
    groups = anatomy.shapes[0].kv_heads // 2
    each = anatomy.shapes[0].query_heads // anatomy.shapes[0].kv_heads
    keep = {"layers": 2, "hidden": 16, "kv_group": groups, "query_head": each, "ffn": 20}
    stays = structure_of(anatomy, {space: most_open(scores[space], count) for space, count in keep.items()})
    heads = each * groups
    after = plan_ranked(model, tokens, ranked("minitron", layers=2, hidden=16, heads=heads, kv_heads=groups, ffn=20))
    assert dict(stays.kept).items() >= kept_of(after).items()
