"""ONNX graphs run by onnxruntime."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shearling.export import export_onnx
from shearling.plan import Structure
from shearling.surgery import cut_
from tests.tiny import FAMILIES, tiny_model, tiny_tokens

for package in ("onnx", "onnxscript"):
    pytest.importorskip(package, reason=f"{package} is not installed; make engines")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; make engines")


def run(folder: Path, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    feed = {"input_ids": ids_BT.numpy(), "attention_mask": mask_BT.numpy()}
    return torch.from_numpy(np.asarray(session.run(["logits"], feed)[0]))


@torch.no_grad()
def check(model: Any, folder: Path, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None = None) -> None:
    mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    expected = model(input_ids=ids_BT, attention_mask=mask_BT).logits
    seen = mask_BT.bool()
    torch.testing.assert_close(run(folder, ids_BT, mask_BT)[seen], expected[seen], rtol=1e-3, atol=1e-3)


def two_layers(family: str) -> Any:
    """Tracing takes seconds a layer."""
    return tiny_model(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 2})


@pytest.mark.parametrize("family", FAMILIES)
def test_any_batch_and_length(family: str, tmp_path: Path) -> None:
    """The graph was traced with 2 rows of 7 tokens; masks hide padding on either side; windows hold 16 tokens."""
    model = two_layers(family)
    record = export_onnx(model, None, tmp_path / "onnx", provenance={})
    assert record["verified"][0]["reader"] == "onnxruntime" and record["verified"][0]["agreement"] == 1.0
    for batch, length in [(1, 1), (1, 40), (3, 24)]:
        check(model, tmp_path / "onnx", tiny_tokens(batch, length))
    mask = torch.ones(3, 24, dtype=torch.int64)
    mask[0, :9], mask[1, 20:] = 0, 0
    check(model, tmp_path / "onnx", tiny_tokens(3, 24), mask)


@pytest.mark.parametrize("family", ["gemma3_text", "opt"])
def test_widths_of_their_own_per_layer(family: str, tmp_path: Path) -> None:
    model = two_layers(family)
    group = {} if family == "opt" else {"kv_group.1": (1,)}
    cut_(model, [Structure({"ffn.0": (0, 5, 7), "hidden": tuple(range(8, 32)), **group})])
    export_onnx(model, None, tmp_path / "onnx", provenance={}, check=False)
    check(model, tmp_path / "onnx", tiny_tokens(2, 30))


def test_a_real_model_after_a_cut(cut_smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = copy.deepcopy(cut_smollm2[0]), cut_smollm2[1]
    cut_(model, [Structure({"layers": (0, 1, 8, 17, 25, 29)})])
    record = export_onnx(model, tokenizer, tmp_path / "onnx", provenance={})
    assert record["verified"][0]["relative"] < 1e-3
    prompts = ["A short one", "A prompt of more tokens than the other has"]
    asked = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    check(model, tmp_path / "onnx", asked["input_ids"], asked["attention_mask"])
