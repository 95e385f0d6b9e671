"""Codes in compressed-tensors' formats, loaded by transformers and that package without Shearling."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from shearling.export import save_model
from shearling.methods.quantise import plan_quantised
from shearling.recipe import Quantise
from shearling.surgery import cut_
from tests.engines.reference import PROMPTS, difference, logits

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed; make engines")


@pytest.mark.parametrize(
    ("form", "group", "dequantize"),
    # without groups the running model would round states too
    [("int4", 32, False), ("uint4", 64, False), ("int8", None, True), ("float8_e4m3", None, True)],
)
def test_a_real_model_after_a_cut(
    form: Any, group: int | None, dequantize: bool, cut_smollm2: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = copy.deepcopy(cut_smollm2[0]), cut_smollm2[1]
    prompts = [torch.tensor(tokenizer(PROMPTS[0])["input_ids"])]
    wish = Quantise(method="rtn", format=form, group=group, scales="covering")
    (quant,) = plan_quantised(model, prompts[0][None], wish)
    cut_(model, [quant])
    save_model(model, tokenizer, tmp_path / "model", provenance={}, quant=quant)
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, **options).eval()
    assert difference(logits(again, prompts), logits(model, prompts)) < 1e-4
    assert difference(logits(again, prompts), logits(cut_smollm2[0], prompts)) > 1e-3
