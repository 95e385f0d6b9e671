"""Phi-3: fused QKV and fused gate/up."""

from shearling.anatomy.families._llama_like import LLAMA_LIKE
from shearling.anatomy.spec import Family

FAMILY = Family(
    model_type="phi3",
    gguf="phi3",
    reads_config=("self_attn",),
    **{
        **LLAMA_LIKE,
        "block": {
            "self_attn.qkv_proj.weight": "query+kv+kv, hidden",
            "self_attn.o_proj.weight": "hidden, query",
            "mlp.gate_up_proj.weight": "ffn+ffn, hidden",
            "mlp.down_proj.weight": "hidden, ffn",
            "input_layernorm.weight": "hidden",
            "post_attention_layernorm.weight": "hidden",
        },
        "ffn_inputs": ("mlp.gate_up_proj",),
        "attention_inputs": ("self_attn.qkv_proj",),
        "attributes": {
            "hidden_size": "hidden",
            "self_attn.num_key_value_groups": "queries_per_kv",
            "self_attn.num_key_value_heads": "kv_heads",
        },
    },
)
