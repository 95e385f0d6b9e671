"""The real model, loaded once."""

from __future__ import annotations

from typing import Any

import pytest

from shearling.models import load_model, load_tokenizer


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer; not to be changed."""
    pytest.importorskip("gguf")
    return load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
