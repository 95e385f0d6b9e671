"""The command that exports, and the table of engines that tells how to use it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import shearling
from shearling.anatomy import anatomy_of
from shearling.export import engines
from shearling.methods.stages import preview_recipe
from shearling.plan import Plan, Structure, inventory_of, plan_of, quantised_size
from shearling.plan.grids import Grid
from shearling.recipe import parse_recipe
from shearling.surgery import cut_
from tests.test_cli import command, refused  # noqa: F401
from tests.tiny import FAMILIES, tiny_bpe, tiny_folder, tiny_model

UNIFORM = Structure({f"ffn.{layer}": tuple(range(32)) for layer in range(3)})
PER_LAYER = Structure({"ffn.1": tuple(range(32))})


def planned(model: Any, structure: Structure) -> Plan:
    return plan_of("tiny", "test", anatomy_of(model.config), inventory_of(model), [structure])


def table(plan: Plan, config: Any) -> dict[str, Any]:
    return {row.engine: row for row in engines(plan, config)}


def saved(folder: Path, family: str = "llama", structure: Structure | None = None) -> Path:
    """A cut tiny model with a tokenizer that llama.cpp has rules for."""
    model = tiny_model(family)
    if structure is not None:
        cut_(model, [structure])
    shearling.save_model(model, tiny_bpe(), folder, provenance={"by": "us"})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("structure", [UNIFORM, PER_LAYER])
def test_a_model_becomes_what_the_table_says(
    family: str,
    structure: Structure,
    tmp_path: Path,
    command: Any,  # noqa: F811
) -> None:
    """Every command of ours in the table is carried out; where it says no, the command says no."""
    pytest.importorskip("gguf")
    model = tiny_model(family)
    rows = table(planned(model, structure), model.config)
    saved(tmp_path / "MODEL", family, structure)
    exported = {"llama.cpp": ("gguf", "MODEL.gguf")}
    if structure is PER_LAYER:
        exported["vLLM"] = ("deci", "MODEL-deci")
    for engine, (form, place) in exported.items():
        row = rows[engine]
        if row.loads:
            ours, _, theirs = row.how.partition(" && ")
            assert place in theirs
            words = [word.replace("MODEL", str(tmp_path / "MODEL")) for word in shlex.split(ours)]
            code, out, err = command(*words[1:])
            assert code == 0, err
            assert "read back by" in out
            assert (tmp_path / place).exists()
        else:
            refused(command("export", tmp_path / "MODEL", "--to", form, "--out", tmp_path / place), "")
            assert not list(tmp_path.glob("*deci*")) and not list(tmp_path.glob("*gguf*"))
    # what a stock class holds is read by any engine that reads transformers' folders
    assert rows["SGLang"].loads == (structure is UNIFORM)
    assert rows["vLLM"].loads or structure is PER_LAYER
    assert {row.faster for row in rows.values() if row.loads} == {"the cut"}


def test_widths_that_gpus_are_slow_at() -> None:
    model = tiny_model("llama")
    rows = {
        width: table(planned(model, Structure({f"ffn.{n}": tuple(range(width)) for n in range(2)})), model.config)
        for width in (40, 41)
    }
    assert rows[40]["vLLM"].faster == "the cut"
    assert "not on GPUs" in rows[41]["vLLM"].faster and "round_to: 64" in rows[41]["vLLM"].faster


def recipe_rows(model: Any, stages: list[Mapping[str, Any]]) -> dict[str, Any]:
    recipe = parse_recipe({"model": "tiny", "device": "cpu", "stages": stages})
    return table(preview_recipe(recipe, model), model.config)


def test_branches_go_where_adapters_go() -> None:
    model = tiny_model("llama")
    sparsify = {"stage": "sparsify", "method": "magnitude", "pattern": "2:4"}
    rows = recipe_rows(model, [sparsify, {"stage": "recover", "method": "ast", "slorb": {"size": 4}}])
    # down_proj has 48 inputs, so the largest rank is 12, and vLLM has room for 8, 16, 32, ...
    assert "--max-lora-rank 16 --lora-modules pruned=MODEL/adapter" in rows["vLLM"].how
    assert "--lora-paths pruned=MODEL/adapter" in rows["SGLang"].how
    assert rows["transformers"].how == 'shearling.load_model("MODEL")'
    assert not rows["llama.cpp"].loads
    # nobody but us makes use of zeros
    assert {name for name, row in rows.items() if row.faster} == {"shearling.runtime"}
    rows = recipe_rows(model, [sparsify])
    assert rows["llama.cpp"].loads and rows["vLLM"].how == "vllm serve MODEL"


@pytest.mark.parametrize(("form", "kind"), [("int4", "q4_0"), ("uint4", "q4_1"), ("int8", "q8_0")])
def test_codes_make_those_faster_who_multiply_by_them(form: str, kind: str) -> None:
    model = tiny_model("llama", intermediate_size=64)
    plan = planned(model, Structure({}))
    plan = replace(plan, quantised=quantised_size(inventory_of(model), plan.anatomy_after, Grid(form, 32)))
    rows = table(plan, model.config)
    assert rows["vLLM"].faster == form and rows["transformers"].faster == ""
    assert f"--type {kind}" in rows["llama.cpp"].how
    # blocks of 32 do not fill 48 channels
    narrow = tiny_model("llama")
    plan = replace(planned(narrow, Structure({})), quantised=plan.quantised)
    assert "round_to: 32" in table(plan, narrow.config)["llama.cpp"].how


def test_a_decilm_folder_computes_what_the_model_does(tmp_path: Path, command: Any) -> None:  # noqa: F811
    folder = saved(tmp_path / "model", structure=PER_LAYER)
    assert command("export", folder, "--to", "deci", "--out", tmp_path / "deci", "--no-verify")[0] == 0
    model = shearling.load_model(str(folder))
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "deci", trust_remote_code=True)
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    said = json.loads((tmp_path / "deci" / "shearling.json").read_text())
    # where the model came from is passed on
    assert said["by"] == "us"
    assert said["export"]["verified"] == []
    # 48, 32 and 48 channels in layers of 256, three matrices of 32 x 4 bytes a channel
    assert said["export"]["added_bytes"] == (208 + 224 + 208) * 3 * 32 * 4


@pytest.mark.parametrize(
    ("wish", "parts"),
    [
        (("--to", "ggml"), ("'ggml'", "gguf, deci, onnx")),
        (("--to", "gguf", "--type", "q9"), ("'q9'", "q8_0")),
        (("--to", "deci", "--type", "f16"), ("'f16'", "gguf")),
        (("--to", "gguf", "--type", "q8_0"), ("ffn of layer 0 is 48", "round_to: 32", "f16")),
    ],
)
def test_an_export_that_cannot_be_is_refused_before_weights_are_read(
    wish: tuple[str, ...],
    parts: tuple[str, ...],
    tmp_path: Path,
    command: Any,  # noqa: F811
) -> None:
    pytest.importorskip("gguf")
    folder = tiny_folder(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no weights")
    refused(command("export", folder, *wish, "--out", tmp_path / "out"), *parts)
    assert not (tmp_path / "out").exists()


def test_an_export_overwrites_nothing(tmp_path: Path, command: Any) -> None:  # noqa: F811
    folder, out = saved(tmp_path / "model"), tmp_path / "out"
    out.write_text("mine")
    refused(command("export", folder, "--to", "deci", "--out", out), "already exists")
    assert out.read_text() == "mine"
