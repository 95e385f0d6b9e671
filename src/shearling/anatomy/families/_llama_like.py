"""The layout that Llama's descendants share."""

from __future__ import annotations

BLOCK = {
    "self_attn.q_proj.weight": "query, hidden",
    "self_attn.q_proj.bias": "query",
    "self_attn.k_proj.weight": "kv, hidden",
    "self_attn.k_proj.bias": "kv",
    "self_attn.v_proj.weight": "kv, hidden",
    "self_attn.v_proj.bias": "kv",
    "self_attn.o_proj.weight": "hidden, query",
    "self_attn.o_proj.bias": "hidden",
    "mlp.gate_proj.weight": "ffn, hidden",
    "mlp.gate_proj.bias": "ffn",
    "mlp.up_proj.weight": "ffn, hidden",
    "mlp.up_proj.bias": "ffn",
    "mlp.down_proj.weight": "hidden, ffn",
    "mlp.down_proj.bias": "hidden",
    "input_layernorm.weight": "hidden",
    "post_attention_layernorm.weight": "hidden",
}
QK_NORMS = {"self_attn.q_norm.weight": "head_dim", "self_attn.k_norm.weight": "head_dim"}
SANDWICH_NORMS = {"pre_feedforward_layernorm.weight": "hidden", "post_feedforward_layernorm.weight": "hidden"}

OUTSIDE = {
    "model.embed_tokens.weight": "fixed, hidden",
    "model.norm.weight": "hidden",
    "lm_head.weight": "fixed, hidden",
}
CONFIG = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "query_heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}
#: of an embedding that multiplies by sqrt(hidden)
SCALED_EMBEDDING = {
    "model.embed_tokens.scalar_embed_scale": "embedding_scale",
    "model.embed_tokens.embed_scale": "embedding_scale",
}
LLAMA_LIKE = {
    "blocks": "model.layers",
    "block": BLOCK,
    "outside": OUTSIDE,
    "config": CONFIG,
    "ffn_inputs": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn_output": "mlp.down_proj",
    "attention_inputs": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": "self_attn.o_proj",
    "embeddings": ("model.embed_tokens",),
    "final_norm": "model.norm",
    "attributes": {
        "hidden_size": "hidden",
        "mlp.hidden_size": "hidden",
        "mlp.intermediate_size": "ffn",
        "self_attn.num_key_value_groups": "queries_per_kv",
    },
    "stock": frozenset({"layers", "hidden", "ffn", "heads", "head_dim"}),
}
