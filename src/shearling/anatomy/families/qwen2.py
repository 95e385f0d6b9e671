"""Qwen2 and Qwen2.5: biases on q, k and v; optional sliding windows by layer."""

from shearling.anatomy.families._llama_like import LLAMA_LIKE
from shearling.anatomy.spec import Family

FAMILY = Family(model_type="qwen2", gguf="qwen2", gguf_per_layer="deci", per_layer=("layer_types",), **LLAMA_LIKE)
