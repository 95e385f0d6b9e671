"""Every family: plan, cut, save, reload gives the logits of the edited but uncut model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from shearling.anatomy import anatomy_of, expressible
from shearling.errors import ShearlingError
from shearling.export import register, save_model
from shearling.plan import Delta, Edit, Structure, inventory_after, inventory_of, load_edits, save_edits, sizes
from shearling.surgery import cut_, gate_
from tests.tiny import FAMILIES, tiny_config, tiny_model, tiny_tokens

register()
LAYERS, CHANNELS = 3, 48


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(tiny_tokens(), use_cache=False).logits.clone()


def kv_heads(family: str) -> int:
    return anatomy_of(tiny_config(family)).shapes[0].kv_heads


def check(family: str, edits: list[Edit], folder: Any) -> Any:
    """Cut, save and reload a tiny model; compare with the gated one and return the reloaded model."""
    dense = tiny_model(family)
    gated, cut = copy.deepcopy(dense), copy.deepcopy(dense)
    gate_(gated, edits)
    anatomy = cut_(cut, edits)
    expected = logits(gated)
    assert not torch.allclose(expected, logits(dense), atol=1e-3)
    torch.testing.assert_close(logits(cut), expected, atol=1e-4, rtol=0)
    save_model(cut, None, folder, provenance={})
    plain = "" if expressible(anatomy) else "Shearling"
    reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(reloaded).__name__.startswith("Shearling") == bool(plain)
    torch.testing.assert_close(logits(reloaded), expected, atol=1e-4, rtol=0)
    assert anatomy_of(reloaded.config) == anatomy
    return reloaded


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_ffn_loads_with_the_stock_class(family: str, tmp_path: Any) -> None:
    kept = {f"ffn.{layer}": tuple(range(layer, layer + 32)) for layer in range(LAYERS)}
    model = check(family, [Structure(kept)], tmp_path / "model")
    assert not type(model).__name__.startswith("Shearling")


@pytest.mark.parametrize("family", FAMILIES)
def test_per_layer_widths_load_with_the_registered_class(family: str, tmp_path: Any) -> None:
    kept = {"ffn.0": (0, 5, 7), "ffn.2": tuple(range(40)), "kv_group.1": (kv_heads(family) - 1,)}
    check(family, [Structure(kept)], tmp_path / "model")


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_values(family: str, tmp_path: Any) -> None:
    anatomy = anatomy_of(tiny_config(family))
    structure = Structure({"layers": (0, 2), "ffn.2": (1, 4, 9, 30), "kv_group.0": (0,)})
    linear = f"{anatomy.path(1, anatomy.family.ffn_output)}.weight"
    shape = (4, 32) if family == "gpt2" else (32, 4)
    bias = f"{anatomy.path(0, anatomy.family.attention_output)}.bias"
    check(family, [structure, Delta({linear: torch.randn(shape), bias: torch.randn(32)})], tmp_path / "model")


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_heads(family: str, tmp_path: Any) -> None:
    heads = {f"kv_group.{layer}": tuple(range(kv_heads(family) // 2)) for layer in range(LAYERS)}
    model = check(family, [Structure(heads)], tmp_path / "model")
    # only a family that states its head width apart from hidden / heads can say this in its stock config
    assert type(model).__name__.startswith("Shearling") == (family in ("opt", "gpt2"))


def subsets(size: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(0, size - 1), min_size=1).map(lambda chosen: tuple(sorted(chosen)))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_shape(family: str, data: st.DataObject) -> None:
    groups = kv_heads(family)
    kept: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        kept[f"ffn.{layer}"] = data.draw(subsets(CHANNELS))
        kept[f"kv_group.{layer}"] = data.draw(subsets(groups))
    if data.draw(st.booleans()):
        kept["layers"] = data.draw(subsets(LAYERS))
    dense = tiny_model(family)
    gated, cut = copy.deepcopy(dense), copy.deepcopy(dense)
    gate_(gated, [Structure(kept)])
    before, inventory = anatomy_of(dense.config), inventory_of(dense)
    after = cut_(cut, [Structure(kept)])
    expected = logits(gated)
    # a norm after a block that is left with one channel magnifies the rounding of sums in another order
    torch.testing.assert_close(logits(cut), expected, atol=1e-4 * max(1.0, float(expected.abs().max())), rtol=0)
    torch.testing.assert_close(logits(copy.deepcopy(cut).double()), logits(gated.double()), atol=1e-5, rtol=0)
    predicted = inventory_after(inventory, before, after, kept.get("layers"))
    assert predicted == inventory_of(cut)
    assert sizes(predicted, after).parameters == sum(p.numel() for p in cut.parameters())


def test_single_query_heads_of_a_group(tmp_path: Any) -> None:
    check("llama", [Structure({"query_head.1": (1, 2), "query_head.0": (0,)})], tmp_path / "model")


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        ({"ffn.0": ()}, "nothing would be left"),
        ({"ffn.0": (3, 2)}, "increase within"),
        ({"ffn.0": (0, 48)}, r"0\.\.47"),
        ({"ffn.9": (0,)}, "no space 'ffn.9'"),
        ({"hidden": (0,)}, "no space 'hidden'"),
        ({"query_head.0": (0, 1, 2)}, "equally many"),
    ],
)
def test_bad_structure_changes_nothing(kept: dict[str, tuple[int, ...]], says: str) -> None:
    model = tiny_model("llama")
    before = logits(model)
    with pytest.raises(ShearlingError, match=says):
        cut_(model, [Structure(kept)])
    assert torch.equal(logits(model), before)


def test_edits_survive_the_disk(tmp_path: Any) -> None:
    edits: list[Edit] = [Structure({"ffn.1": (1, 3)}), Delta({"a": torch.randn(2, 3)})]
    save_edits(edits, tmp_path)
    structure, delta = load_edits(tmp_path)
    assert structure == edits[0]
    assert isinstance(delta, Delta) and isinstance(edits[1], Delta)
    assert torch.equal(delta.values["a"], edits[1].values["a"])


def test_unknown_architecture_says_what_to_add() -> None:
    from transformers import BertConfig

    with pytest.raises(ShearlingError, match=r"anatomy/families/bert\.py"):
        anatomy_of(BertConfig())
