"""Target shapes: what fits a model, and what a budget proposes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from shearling.anatomy import BlockShape, anatomy_of, expressible
from shearling.errors import ShearlingError
from shearling.plan import (
    HEADINGS,
    Width,
    inventory_after,
    inventory_of,
    leading,
    propose_shapes,
    resolve_target,
    shape_after,
    sizes,
    target_anatomy,
    widths,
)
from shearling.recipe import Budget, Target
from tests.tiny import FAMILIES, tiny_config, tiny_model


def on_meta(family: str, **overrides: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family, **overrides))


SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
LLAMA2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


# --- targets


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        ({"layers": 1}, (1, 32, 4, 2, 48)),
        ({"hidden": 24}, (3, 24, 4, 2, 48)),
        ({"ffn": 7}, (3, 32, 4, 2, 7)),
        ({"heads": 2}, (3, 32, 2, 2, 48)),
        ({"kv_heads": 1}, (3, 32, 2, 1, 48)),
        ({"heads": 1, "kv_heads": 1}, (3, 32, 1, 1, 48)),
        ({"layers": 2, "hidden": 8, "heads": 2, "kv_heads": 2, "ffn": 16}, (2, 8, 2, 2, 16)),
    ],
)
def test_what_is_not_named_stays_or_follows(target: dict[str, int], shape: tuple[int, ...]) -> None:
    after = target_anatomy(anatomy_of(tiny_config("llama")), Target(**target))
    layers, hidden, heads, kv_heads, ffn = shape
    assert (after.num_layers, after.hidden) == (layers, hidden)
    assert after.shapes == (BlockShape(ffn=ffn, query_heads=heads, kv_heads=kv_heads),) * layers
    assert after.head_dim == 8


@pytest.mark.parametrize(
    ("family", "target", "what"),
    [
        ("llama", {"layers": 4}, "target.layers = 4: the model has 3"),
        ("llama", {"hidden": 40}, "target.hidden = 40: the model has 32"),
        ("llama", {"ffn": 49}, "target.ffn = 49: the model has 48"),
        ("llama", {"heads": 6}, "target.heads = 6: the model has 4"),
        ("llama", {"kv_heads": 4}, "target.kv_heads = 4: the model has 2"),
        ("llama", {"heads": 3}, "target.heads = 3: must be a multiple of kv_heads, which are 2"),
        ("llama", {"heads": 4, "kv_heads": 1}, "target.heads = 4: 4 to each of 1 KV heads, and the model has 2"),
        ("gpt2", {"heads": 2, "kv_heads": 1}, "the model has 1; choose at most 1"),
        (
            "gpt2",
            {"hidden": 24},
            "target.hidden = 24: the config of gpt2 cannot state it with 4 query heads of 8; choose 32",
        ),
        (
            "opt",
            {"heads": 3},
            "target.hidden = 32: the config of opt cannot state it with 3 query heads of 8; choose 24",
        ),
    ],
)
def test_what_does_not_fit(family: str, target: dict[str, int], what: str) -> None:
    with pytest.raises(ShearlingError, match=f"^[^\n]*{what}[^\n]*$"):
        target_anatomy(anatomy_of(tiny_config(family)), Target(**target))


def test_widths_per_block_are_refused() -> None:
    anatomy = anatomy_of(tiny_config("llama"))
    shapes = (replace(anatomy.shapes[0], ffn=40), *anatomy.shapes[1:])
    for other in (replace(anatomy, shapes=shapes), replace(anatomy, biases=("mlp.down_proj",))):
        with pytest.raises(ShearlingError, match=r"^target: the model has widths per block[^\n]*$"):
            target_anatomy(other, Target(layers=2))


def test_without_a_head_dim_hidden_and_heads_go_together() -> None:
    after = target_anatomy(anatomy_of(tiny_config("gpt2")), Target(hidden=24, heads=3))
    assert after.shapes[0] == BlockShape(ffn=48, query_heads=3, kv_heads=3)


@given(
    family=st.sampled_from(FAMILIES),
    layers=st.none() | st.integers(1, 5),
    hidden=st.none() | st.sampled_from((8, 16, 20, 24, 32, 40)),
    heads=st.none() | st.integers(1, 6),
    kv_heads=st.none() | st.integers(1, 5),
    ffn=st.none() | st.integers(1, 60),
)
@settings(max_examples=300, deadline=None)
def test_a_target_fits_or_is_refused_in_one_line(family: str, **wish: int | None) -> None:
    anatomy = anatomy_of(tiny_config(family))
    named = {name: size for name, size in wish.items() if size is not None}
    assume(named)
    multi_head, kv_before = family in ("opt", "gpt2"), anatomy.shapes[0].kv_heads
    kv = named.get("kv_heads", named.get("heads", kv_before) if multi_head else kv_before)
    made = {"layers": 3, "hidden": 32, "kv_heads": kv, "heads": kv * 4 // kv_before, "ffn": 48} | named
    fits = (
        (made["layers"] <= 3 and made["hidden"] <= 32 and made["ffn"] <= 48 and kv <= kv_before)
        and made["heads"] in range(kv, 4 // kv_before * kv + 1, kv)
        and (not multi_head or made["hidden"] == 8 * made["heads"])
    )
    if not fits:
        with pytest.raises(ShearlingError, match=r"\Atarget\.[^\n]*\Z"):
            target_anatomy(anatomy, Target(**wish))
        return
    after = target_anatomy(anatomy, Target(**wish))
    shape = BlockShape(ffn=made["ffn"], query_heads=made["heads"], kv_heads=kv)
    assert after.shapes == (shape,) * made["layers"]
    assert after.hidden == made["hidden"]
    assert expressible(after)
    if after.hidden == anatomy.hidden:
        # what surgery is told makes that very shape
        assert shape_after(anatomy, leading(anatomy, after, range(after.num_layers))) == after


def test_leading_units_of_blocks_that_differ() -> None:
    before = anatomy_of(tiny_config("llama"))
    shapes = (BlockShape(ffn=5, query_heads=2, kv_heads=2), BlockShape(ffn=48, query_heads=2, kv_heads=1))
    after = replace(before, shapes=shapes)
    cut = leading(before, after, (0, 2))
    assert cut.kept == {
        "layers": (0, 2),
        "ffn.0": (0, 1, 2, 3, 4),
        "query_head.0": (0, 2),
        "query_head.2": (0, 1),
    }
    assert shape_after(before, cut) == after
    assert leading(before, replace(before, hidden=3), range(3)).kept == {"hidden": (0, 1, 2)}


# --- proposals


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.75])
@pytest.mark.parametrize("of", ["parameters", "flops_per_token"])
@pytest.mark.parametrize("size", [SMOLLM2, LLAMA2_7B], ids=["smollm2", "llama2-7b"])
def test_proposals_use_a_budget_to_one_percent(size: dict[str, Any], of: Any, budget: float) -> None:
    model = on_meta("llama", **size)
    anatomy, inventory = anatomy_of(model.config), inventory_of(model)
    found = propose_shapes(anatomy, inventory, budget, of)
    named = {proposal.name: proposal.target for proposal in found}
    # where little of the small model goes the full stream has the shape of another profile
    same = size is SMOLLM2 and budget == 0.75
    assert [*named] == ["balanced", "deeper", "shallower", *([] if same else ["stream"]), "depth"]
    balanced, deeper, shallower = (named[name] for name in ("balanced", "deeper", "shallower"))
    assert deeper.layers >= balanced.layers > shallower.layers
    # a step of 64 channels is 2 % of the small model
    assert size is SMOLLM2 or shallower.hidden > balanced.hidden > deeper.hidden
    for proposal in found[:-1]:
        assert budget * (0.98 if size is SMOLLM2 else 0.99) <= proposal.share <= budget
        assert proposal.target.hidden % 64 == 0
        assert proposal.target.ffn % 64 == 0
    assert found == propose_shapes(anatomy, inventory, budget, of)


def test_rows_of_a_proposal_are_those_of_the_built_model() -> None:
    source = on_meta("llama", **LLAMA2_7B)
    found = propose_shapes(anatomy_of(source.config), inventory_of(source), 2_700_000_000)
    for proposal in found:
        target = proposal.target
        # whole layers leave up to one of 202 million unused
        least = 2_700_000_000 * (0.92 if proposal.name == "depth" else 0.99)
        built = on_meta(
            "llama",
            **{
                **LLAMA2_7B,
                "num_hidden_layers": target.layers,
                "hidden_size": target.hidden,
                "num_attention_heads": target.heads,
                "num_key_value_heads": target.kv_heads,
                "intermediate_size": target.ffn,
            },
        )
        parameters = sum(p.numel() for p in built.parameters())
        assert proposal.sizes.parameters == parameters
        assert least <= parameters <= 2_700_000_000
        row = dict(zip(HEADINGS, proposal.row(), strict=True))
        assert row["parameters"] == f"{parameters:,}"
        assert row["layers"] == str(target.layers)


@given(
    family=st.sampled_from(("llama", "qwen3", "gemma2", "gpt2", "opt", "phi3")),
    layers=st.integers(1, 6),
    ffn=st.integers(4, 12),
    heads=st.sampled_from(((4, 4), (4, 2), (4, 1), (6, 3), (5, 5), (8, 2))),
    budget=st.floats(0.02, 0.999),
    of=st.sampled_from(("parameters", "bytes", "flops_per_token")),
)
@settings(max_examples=60, deadline=None)
def test_no_proposal_exceeds_its_budget(
    family: str, layers: int, ffn: int, heads: tuple[int, int], budget: float, of: Any
) -> None:
    query, kv = heads
    names = anatomy_of(tiny_config(family)).family.config
    wish = {"layers": layers, "ffn": 8 * ffn, "query_heads": query, "kv_heads": kv, "hidden": 8 * query}
    fields = {names[size]: number for size, number in wish.items() if size in names}
    if family == "opt":
        fields["word_embed_proj_dim"] = 8 * query
    model = on_meta(family, **fields)
    anatomy, inventory = anatomy_of(model.config), inventory_of(model)
    whole = getattr(sizes(inventory, anatomy), of)
    # one KV group alone, or one query head of each; as wide as the heads where no head_dim is stated
    narrow = [(1, 1)] if family in ("gpt2", "opt") else [(query // kv, 1), (kv, kv)]
    smallest = [
        replace(anatomy, hidden=hidden, shapes=(BlockShape(ffn=8, query_heads=h, kv_heads=k),))
        for h, k in narrow
        for hidden in range(8, anatomy.hidden + 1, 8)
    ]
    fewest = [
        getattr(sizes(inventory_after(inventory, anatomy, least, (0,)), least), of)
        for least in smallest
        if expressible(least)
    ]
    if min(fewest) > budget * whole:
        with pytest.raises(ShearlingError, match=r"\A[^\n]*budget[^\n]*\Z"):
            propose_shapes(anatomy, inventory, budget, of, hidden_multiple=8, ffn_multiple=8)
        return
    found = propose_shapes(anatomy, inventory, budget, of, hidden_multiple=8, ffn_multiple=8)
    assert len({proposal.target for proposal in found}) == len(found)
    for proposal in found:
        assert 0 < getattr(proposal.sizes, of) <= budget * whole
        after = target_anatomy(anatomy, proposal.target)
        assert expressible(after)
        shape, source = after.shapes[0], anatomy.shapes[0]
        groups_whole = shape.query_heads * source.kv_heads == shape.kv_heads * source.query_heads
        assert groups_whole or shape.kv_heads == source.kv_heads
        assert after.hidden % 8 == 0
        assert shape.ffn % 8 == 0


@pytest.mark.parametrize(
    ("budget", "what"),
    [
        (0.0, "budget = 0 parameters: must be above 0"),
        (-3.0, "budget = -3 parameters: must be above 0"),
        (10**9, "must be above 0 and below the"),
        (float("nan"), "must be above 0"),
        (float("inf"), "must be above 0"),
        (40, "the smallest shape of this grid has"),
    ],
)
def test_budgets_that_no_shape_meets(budget: float, what: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ShearlingError, match=f"^[^\n]*{what}[^\n]*$"):
        propose_shapes(anatomy_of(model.config), inventory_of(model), budget, hidden_multiple=8, ffn_multiple=8)


def test_a_budget_means_the_shape_that_is_proposed_for_its_profile() -> None:
    model = on_meta("llama", **SMOLLM2)
    anatomy, inventory = anatomy_of(model.config), inventory_of(model)
    found = {proposal.name: proposal for proposal in propose_shapes(anatomy, inventory, 0.5)}
    assert resolve_target(anatomy, inventory, Budget(parameters=0.5)) == found["balanced"].target
    for profile in ("deeper", "shallower"):
        named = Budget(parameters=0.5 * 134515008, profile=profile)
        assert resolve_target(anatomy, inventory, named) == found[profile].target
    # 30 layers of 3,539,520 parameters and 28,329,408 others
    whole = Budget(parameters=0.5, profile="depth")
    assert resolve_target(anatomy, inventory, whole) == Target(layers=11) and found["depth"].target.layers == 11
    exact = Target(layers=20)
    assert resolve_target(anatomy, inventory, exact) is exact
    written = found["deeper"].to_json()
    assert Target(**written["target"]) == found["deeper"].target
    assert written["sizes"]["parameters"] == found["deeper"].sizes.parameters


def test_whole_layers_go_under_whatever_name_the_shape_has() -> None:
    """Where all shapes of as many layers take as long, the widest is every profile's."""
    model = on_meta("llama", **SMOLLM2)
    anatomy, inventory = anatomy_of(model.config), inventory_of(model)
    measured = dict.fromkeys(widths(anatomy), lambda layers, ffn: 1.0 * layers)
    assert "depth" not in [p.name for p in propose_shapes(anatomy, inventory, 0.84, "milliseconds", measured=measured)]
    budget = Budget(latency=0.84, profile="depth")
    assert resolve_target(anatomy, inventory, budget, measured) == Target(layers=25)


def test_a_profile_without_a_shape_is_refused() -> None:
    model = on_meta("llama", **SMOLLM2)
    with pytest.raises(ShearlingError, match=r"^target.profile = 'depth': this budget has only balanced, .* of them$"):
        resolve_target(anatomy_of(model.config), inventory_of(model), Budget(parameters=0.22, profile="depth"))


def test_profiles_that_come_to_the_same_shape_all_have_it() -> None:
    model = tiny_model("llama")
    anatomy, inventory = anatomy_of(model.config), inventory_of(model)
    (first, *_) = propose_shapes(anatomy, inventory, 0.7)
    for profile in ("balanced", "deeper"):
        assert resolve_target(anatomy, inventory, Budget(parameters=0.7, profile=profile)) == first.target


# --- the full stream

#: parameters of SmolLM2: embeddings and the last norm; what of a block no channel adds; a channel of a block
OUTSIDE, BLOCK, CHANNEL = 49152 * 576 + 576, 2 * 576 * 576 + 2 * 576 * 192 + 2 * 576, 3 * 576


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.553])
def test_the_full_stream_gives_a_quarter_of_the_cut_to_channels(budget: float) -> None:
    model = on_meta("llama", **SMOLLM2)
    found = {p.name: p for p in propose_shapes(anatomy_of(model.config), inventory_of(model), budget)}
    target = found["stream"].target
    assert (target.hidden, target.heads, target.kv_heads) == (576, 9, 3)
    blocks = (budget * (OUTSIDE + 30 * (BLOCK + 1536 * CHANNEL)) - OUTSIDE) / (30 * (BLOCK + 1536 * CHANNEL))
    # the layers' share of the cut, by logarithms; the others go by halves of a layer and steps of 64 channels
    assert math.log(target.layers / 30) / math.log(blocks) == pytest.approx(0.75, abs=0.1)
    assert found["stream"].sizes.parameters == OUTSIDE + target.layers * (BLOCK + target.ffn * CHANNEL)


def test_the_full_stream_of_the_log() -> None:
    model = on_meta("llama", **SMOLLM2)
    found = {p.name: p.target for p in propose_shapes(anatomy_of(model.config), inventory_of(model), 0.553)}
    assert found["stream"] == Target(layers=16, hidden=576, heads=9, kv_heads=3, ffn=1152)


# --- whole layers


def full_width(layers: int) -> Target:
    """SmolLM2 with fewer layers."""
    return Target(layers=layers, hidden=576, heads=9, kv_heads=3, ffn=1536)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.75, 28312128 + 7 * 3540096, 28312128 + 8 * 3540096 - 1])
def test_depth_keeps_all_widths_and_as_many_layers_as_fit(budget: float) -> None:
    model = on_meta("llama", **SMOLLM2)
    *_, last = propose_shapes(anatomy_of(model.config), inventory_of(model), budget)
    # embeddings and the last norm; a block of attention, feed-forward layer and two norms
    base, block = 49152 * 576 + 576, 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
    allowed = budget * (base + 30 * block) if budget < 1 else budget
    layers = math.floor((allowed - base) / block)
    assert (last.name, last.target) == ("depth", full_width(layers))
    assert last.sizes.parameters == base + layers * block <= allowed < last.sizes.parameters + block


@pytest.mark.parametrize(("layers", "budget"), [(1, 0.9), (3, 0.2)])
def test_depth_is_not_proposed_where_no_whole_layer_may_go_or_stay(layers: int, budget: float) -> None:
    model = tiny_model("llama", num_hidden_layers=layers, vocab_size=400)
    found = propose_shapes(anatomy_of(model.config), inventory_of(model), budget, hidden_multiple=8, ffn_multiple=8)
    assert "depth" not in {proposal.name for proposal in found}


# --- milliseconds

#: of layers, width and channels
Time = Callable[[int, Width, int], float]


def in_milliseconds(time: Time, budget: float, size: dict[str, Any] = SMOLLM2) -> dict[str, Target]:
    model = on_meta("llama", **size)
    anatomy = anatomy_of(model.config)

    def at(width: Width, layers: int, ffn: int) -> float:
        return time(layers, width, ffn)

    measured = {width: partial(at, width) for width in widths(anatomy)}
    found = propose_shapes(anatomy, inventory_of(model), budget, "milliseconds", measured=measured)
    return {proposal.name: proposal.target for proposal in found}


def test_where_width_is_free_the_widest_wins() -> None:
    for budget, layers in ((18.0, 18), (18.7, 18), (1.0, 1)):
        assert in_milliseconds(lambda layers, *_: layers, budget) == {"balanced": full_width(layers)}
    # below one layer's time nothing is left to take
    with pytest.raises(ShearlingError, match="the smallest shape of this grid has 1; allow more"):
        in_milliseconds(lambda layers, *_: layers, 0.03)


def test_where_width_is_nearly_free_parameters_are_not_given_for_time() -> None:
    def nearly(layers: int, width: Width, ffn: int) -> float:
        return layers * (0.8 + 0.1 * width.hidden / 576 + 0.1 * ffn / 1536)

    # 20 layers, a third as wide, would take 18 milliseconds, too; and 18 of full width may leave some unused
    assert in_milliseconds(nearly, 18.0) == {"balanced": full_width(18)}
    assert in_milliseconds(nearly, 18.4) == {"balanced": full_width(18)}


def test_depth_comes_last_of_a_latency() -> None:
    def time(layers: int, width: Width, ffn: int) -> float:
        return 2 + layers * (0.5 + 0.5 * width.hidden / 576 * (0.3 * width.heads / 9 + 0.7 * ffn / 1536))

    found = in_milliseconds(time, 20.5)
    names = ["balanced", "deeper", "shallower", "stream", "depth"]
    assert list(found) == [name for name in names if name in found]
    assert found["depth"] == full_width(18)


def test_where_time_goes_with_parameters_shapes_keep_their_proportions() -> None:
    def time(layers: int, width: Width, ffn: int) -> float:
        block = width.hidden * (128 * (2 * width.heads + 2 * width.kv_heads) + 3 * ffn + 2)
        return (width.hidden * (64000 + 1) + layers * block) / 1e6

    for budget in (0.3, 0.5, 0.75):
        model = on_meta("llama", **LLAMA2_7B)
        counted = propose_shapes(anatomy_of(model.config), inventory_of(model), budget)
        found = in_milliseconds(time, budget, LLAMA2_7B)
        assert found == {proposal.name: proposal.target for proposal in counted}


@given(
    seed=st.integers(0, 2**16),
    budget=st.floats(0.1, 0.9),
    channel=st.sampled_from((0.0, 0.001, 0.01)),
    stream=st.sampled_from((0.0, 0.5)),
    steps=st.sampled_from((1, 3)),
)
@settings(max_examples=40, deadline=None)
def test_no_shape_is_proposed_that_another_as_fast_has_all_of_and_more(
    seed: int, budget: float, channel: float, stream: float, steps: int
) -> None:
    draw = random.Random(seed)
    # few times, so that many widths take the same; they need not grow with the width
    noise = {width: draw.randrange(steps) / 4 for width in widths(anatomy_of(tiny_config("llama", **SMOLLM2)))}

    def time(layers: int, width: Width, ffn: int) -> float:
        return layers * (1 + stream * width.hidden / 576 + noise[width] + channel * ffn / 64)

    whole = time(30, Width(576, 9, 3), 1536)
    for target in in_milliseconds(time, budget, SMOLLM2).values():
        assert target.layers and target.hidden and target.heads and target.kv_heads and target.ffn
        own = (target.hidden, target.heads, target.kv_heads, target.ffn)
        took = time(target.layers, Width(*own[:3]), target.ffn)
        assert took <= budget * whole
        for width in noise:
            for ffn in range(64, 1537, 64):
                more = (*width, ffn)
                if more != own and all(a >= b for a, b in zip(more, own, strict=True)):
                    assert time(target.layers, width, ffn) > budget * whole
