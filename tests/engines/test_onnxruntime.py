"""ONNX graphs run by onnxruntime."""

from __future__ import annotations

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


@pytest.mark.parametrize("family", FAMILIES)
def test_any_batch_and_length(family: str, tmp_path: Path) -> None:
    """The graph was traced with 2 rows of 7 tokens; a mask hides padding on either side; windows are shorter."""
    model = tiny_model(family)
    record = export_onnx(model, None, tmp_path / "onnx", provenance={})
    assert record["verified"][0]["reader"] == "onnxruntime" and record["verified"][0]["agreement"] == 1.0
    for batch, length in [(1, 1), (1, 40), (3, 24)]:
        check(model, tmp_path / "onnx", tiny_tokens(batch, length))
    mask = torch.ones(3, 24, dtype=torch.int64)
    mask[0, :9], mask[1, 20:] = 0, 0
    check(model, tmp_path / "onnx", tiny_tokens(3, 24), mask)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "opt"])
def test_widths_of_their_own_per_layer(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    cut_(model, [Structure({"ffn.0": tuple(range(32)), "ffn.2": (0, 5, 7), "kv_group.1": (1,)})])
    export_onnx(model, None, tmp_path / "onnx", provenance={})
    check(model, tmp_path / "onnx", tiny_tokens(2, 30))


def test_a_real_model_after_a_cut(cut_smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = cut_smollm2
    record = export_onnx(model, tokenizer, tmp_path / "onnx", provenance={})
    assert record["verified"][0]["relative"] < 1e-3
    asked = tokenizer(
        ["A short one", "A prompt of more tokens than the other has"], padding=True, padding_side="left"
    ).convert_to_tensors("pt")
    check(model, tmp_path / "onnx", asked["input_ids"], asked["attention_mask"])
