"""The engine that the bench runs GGUF files with, on llama.cpp itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shearling.evaluate.bench import Cell
from shearling.evaluate.llama_cpp_engine import LlamaCppEngine
from shearling.models import _packaged_gguf

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; make engines")


@torch.no_grad()
def test_rows_are_read_as_transformers_reads_them(smollm2: tuple[Any, Any]) -> None:
    engine = LlamaCppEngine(_packaged_gguf(), torch.device("cpu"))
    model, _ = smollm2
    assert engine.parameters == sum(parameter.numel() for parameter in model.parameters())
    engine.prepare(Cell(2, 16, 1))
    engine.prefill()
    prompts = torch.randint(engine._words, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        engine.decode()
        fed = torch.tensor([[engine._next.token[row]] for row in range(2)])
        expected = model(torch.cat([prompts, fed], 1)).logits[:, -1]
        pointers = (engine._api.llama_get_logits_ith(engine._context, row) for row in range(2))
        found = torch.stack([torch.tensor(pointer[: engine._words]) for pointer in pointers])
        # it rounds states to 8 bits before products with rounded weights
        alike = torch.corrcoef(torch.cat([found, expected]))[:2, 2:]
        assert alike.diag().min() > 0.99 > alike.fliplr().diag().max()
    engine.release()
