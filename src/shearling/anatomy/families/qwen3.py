"""Qwen3: RMS norms over each head of q and k."""

from shearling.anatomy.families._llama_like import BLOCK, LLAMA_LIKE, QK_NORMS
from shearling.anatomy.spec import Family

FAMILY = Family(
    model_type="qwen3", gguf="qwen3", per_layer=("layer_types",), **{**LLAMA_LIKE, "block": {**BLOCK, **QK_NORMS}}
)
