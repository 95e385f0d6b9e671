"""Gemma 2: (1 + w) norms before and after both halves, soft-capping, scaled embedding."""

from shearling.anatomy.families._llama_like import BLOCK, LLAMA_LIKE, SANDWICH_NORMS, SCALED_EMBEDDING
from shearling.anatomy.spec import Family

FAMILY = Family(
    model_type="gemma2",
    gguf="gemma2",
    per_layer=("layer_types",),
    norm_one_plus=True,
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    embedding_scaled=True,
    outside_attributes=SCALED_EMBEDDING,
    heads_divide_hidden=True,
    **{**LLAMA_LIKE, "block": {**BLOCK, **SANDWICH_NORMS}},
)
