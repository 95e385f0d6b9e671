"""GPT-2: Conv1D weights stored [in, out], fused QKV, learned positions, multi-head attention of width hidden."""

from shearling.anatomy.spec import Family

_NORMS = ("ln_1", "ln_2")

FAMILY = Family(
    model_type="gpt2",
    gguf="gpt2",
    blocks="transformer.h",
    block={
        "attn.c_attn.weight": "hidden, query+kv+kv",
        "attn.c_attn.bias": "query+kv+kv",
        "attn.c_proj.weight": "query, hidden",
        "attn.c_proj.bias": "hidden",
        "mlp.c_fc.weight": "hidden, ffn",
        "mlp.c_fc.bias": "ffn",
        "mlp.c_proj.weight": "ffn, hidden",
        "mlp.c_proj.bias": "hidden",
        **{f"{name}.{part}": "hidden" for name in _NORMS for part in ("weight", "bias")},
    },
    outside={
        "transformer.wte.weight": "fixed, hidden",
        "transformer.wpe.weight": "fixed, hidden",
        "transformer.ln_f.weight": "hidden",
        "transformer.ln_f.bias": "hidden",
        "lm_head.weight": "fixed, hidden",
    },
    config={"layers": "n_layer", "hidden": "n_embd", "ffn": "n_inner", "query_heads": "n_head"},
    ffn_inputs=("mlp.c_fc",),
    ffn_output="mlp.c_proj",
    attention_inputs=("attn.c_attn",),
    attention_output="attn.c_proj",
    embeddings=("transformer.wte", "transformer.wpe"),
    final_norm="transformer.ln_f",
    norm="layer",
    attributes={
        "attn.embed_dim": "query_width",
        "attn.split_size": "query_width",
        "attn.num_heads": "query_heads",
        "attn.head_dim": "head_dim",
        "attn.scaling": "head_scale",
        "mlp.c_fc.nf": "ffn",
        "mlp.c_proj.nx": "ffn",
        "attn.c_proj.nx": "query_width",
    },
    outside_attributes={"transformer.embed_dim": "hidden"},
    requires={
        "add_cross_attention": (False, "cross-attention is not described"),
        "scale_attn_weights": (True, "attention is taken to be scaled by the width of a head"),
        "scale_attn_by_inverse_layer_idx": (False, "the scale depends on the layer index"),
    },
)
