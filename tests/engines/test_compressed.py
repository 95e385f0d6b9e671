"""Codes in compressed-tensors' formats, loaded by transformers and that package without Shearling."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shearling.export import save_model
from shearling.methods.quantise import plan_quantised
from shearling.recipe import Quantise
from shearling.surgery import cut_
from tests.engines.reference import PROMPTS, difference, logits

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed; make engines")


@pytest.mark.parametrize(
    ("form", "group", "gap"),
    # where activations are rounded too, an answer is near and not the same
    [("int4", 32, 1e-4), ("uint4", 64, 1e-4), ("int8", 64, 1e-4), ("int8", None, 0.1), ("float8_e4m3", None, 0.2)],
)
def test_a_real_model_after_a_cut(
    form: Any, group: int | None, gap: float, cut_smollm2: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = copy.deepcopy(cut_smollm2[0]), cut_smollm2[1]
    prompts = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    (quant,) = plan_quantised(model, prompts[0][None], Quantise(method="rtn", format=form, group=group))
    cut_(model, [quant])
    save_model(model, tokenizer, tmp_path / "model", provenance={}, quant=quant)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert again.config.quantization_config.quant_method == "compressed-tensors"
    assert difference(logits(again, prompts), logits(model, prompts)) < gap
