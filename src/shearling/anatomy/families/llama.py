"""Llama 2, Llama 3, TinyLlama, SmolLM2."""

from shearling.anatomy.families._llama_like import LLAMA_LIKE
from shearling.anatomy.spec import Family

FAMILY = Family(model_type="llama", gguf="llama", gguf_per_layer="deci", heads_divide_hidden=True, **LLAMA_LIKE)
