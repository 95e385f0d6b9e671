"""A model as an ONNX graph: token ids and attention mask in, logits out, any batch and length, any widths."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shearling.errors import ShearlingError

#: name of the graph in its folder; its weights lie beside it
GRAPH = "model.onnx"


class _Logits(nn.Module):
    """Only tensors go in and out of a graph."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def check_packages() -> None:
    """Raise ShearlingError where a package that writes or reads ONNX is absent."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if not find_spec(package):
            raise ShearlingError(f"onnx: needs the package {package}; pip install 'shearling[onnx]'")


def write_onnx(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write ``model.onnx`` with its weights, config and tokenizer into an existing folder.

    The graph has no key/value cache. Raises ShearlingError where the packages are absent or torch cannot trace the
    model.
    """
    check_packages()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    # sizes of 1 would be taken for constants
    ids_BT = torch.zeros(2, 7, dtype=torch.int64)
    # a mask of ones alone might be left out of the graph
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :2] = 0
    axes = {0: batch, 1: length}
    try:
        torch.onnx.export(
            _Logits(model).eval(),
            (ids_BT, mask_BT),
            str(folder / GRAPH),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": axes, "attention_mask": axes},
            dynamo=True,
            external_data=True,
            verbose=False,
        )
    except Exception as error:  # torch.export fails in many ways
        reason = " ".join(str(error).split())
        raise ShearlingError(f"onnx: torch cannot trace {type(model).__name__} ({reason[:300]})") from error
    model.config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def onnx_logits(folder: Path, prompts: list[Tensor]) -> list[Tensor]:
    """Logits [T, V] of each prompt by onnxruntime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / GRAPH), providers=["CPUExecutionProvider"])
    found = []
    for ids in prompts:
        ids_BT = ids[None].numpy()
        feed = {"input_ids": ids_BT, "attention_mask": ids[None].new_ones(ids_BT.shape).numpy()}
        found.append(torch.from_numpy(session.run(["logits"], feed)[0][0]).float())
    return found
