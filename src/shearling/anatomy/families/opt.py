"""OPT: LayerNorm, biases, learned positions, multi-head attention of width hidden."""

from shearling.anatomy.spec import Family

_LINEARS = {
    "self_attn.q_proj": "query, hidden",
    "self_attn.k_proj": "kv, hidden",
    "self_attn.v_proj": "kv, hidden",
    "self_attn.out_proj": "hidden, query",
    "fc1": "ffn, hidden",
    "fc2": "hidden, ffn",
}
_NORMS = ("self_attn_layer_norm", "final_layer_norm")

FAMILY = Family(
    model_type="opt",
    blocks="model.decoder.layers",
    block={
        **{f"{name}.weight": layout for name, layout in _LINEARS.items()},
        **{f"{name}.bias": layout.split(",")[0] for name, layout in _LINEARS.items()},
        **{f"{name}.{part}": "hidden" for name in _NORMS for part in ("weight", "bias")},
    },
    outside={
        "model.decoder.embed_tokens.weight": "fixed, hidden",
        "model.decoder.embed_positions.weight": "fixed, hidden",
        "model.decoder.final_layer_norm.weight": "hidden",
        "model.decoder.final_layer_norm.bias": "hidden",
        "lm_head.weight": "fixed, hidden",
    },
    config={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "ffn": "ffn_dim",
        "query_heads": "num_attention_heads",
    },
    ffn_inputs=("fc1",),
    ffn_output="fc2",
    attention_inputs=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_output="self_attn.out_proj",
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    final_norm="model.decoder.final_layer_norm",
    norm="layer",
    attributes={
        "embed_dim": "hidden",
        "self_attn.embed_dim": "query_width",
        "self_attn.num_heads": "query_heads",
        "self_attn.head_dim": "head_dim",
        "self_attn.scaling": "head_scale",
    },
    config_copies={"word_embed_proj_dim": "hidden"},
    requires={"do_layer_norm_before": (True, "OPT-350m normalises after each half and projects its embedding")},
)
