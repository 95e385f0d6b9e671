"""Gemma 3, text: Gemma 2's norms, q/k norms, and local and global layers with a rotary base each."""

from shearling.anatomy.families._llama_like import BLOCK, LLAMA_LIKE, QK_NORMS, SANDWICH_NORMS, SCALED_EMBEDDING
from shearling.anatomy.spec import Family

FAMILY = Family(
    model_type="gemma3_text",
    gguf="gemma3",
    per_layer=("layer_types",),
    norm_one_plus=True,
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    embedding_scaled=True,
    outside_attributes=SCALED_EMBEDDING,
    heads_divide_hidden=True,
    **{**LLAMA_LIKE, "block": {**BLOCK, **QK_NORMS, **SANDWICH_NORMS}},
)
