"""Mistral."""

from shearling.anatomy.families._llama_like import LLAMA_LIKE
from shearling.anatomy.spec import Family

FAMILY = Family(model_type="mistral", gguf="llama", gguf_per_layer="deci", **LLAMA_LIKE)
