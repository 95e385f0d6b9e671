"""Names to models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shearling.errors import ShearlingError
from shearling.models import check_finite, load_model, resolve
from tests.tiny import tiny_model


def test_embedded_model_speaks(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"


def test_saved_folder_loads(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ShearlingError, match="runs code"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_missing_folder(name: str) -> None:
    with pytest.raises(ShearlingError, match="no such folder"):
        resolve(name)


def test_hub_id_passes() -> None:
    assert resolve("org/model") == "org/model"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weight_is_named(bad: float) -> None:
    model = tiny_model("llama")
    check_finite(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = bad
    with pytest.raises(ShearlingError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        check_finite(model)
