"""DeciLM (Nemotron-NAS), Llama with a width of its own in every block; travels with a checkpoint, without Shearling."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class DeciLMConfig(LlamaConfig):
    """A Llama config whose ``block_configs`` say, block by block, how many query heads share a KV head (None: no
    attention) and how wide the feed-forward layer is."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # engines read these by attribute
        self.block_configs = [_by_attribute(block) for block in block_configs]

    def to_dict(self) -> dict[str, Any]:
        content = super().to_dict()
        content["block_configs"] = [
            {part: dict(vars(value)) for part, value in vars(block).items()} for block in self.block_configs
        ]
        return content


class DeciLMForCausalLM(LlamaForCausalLM):
    """Llama's causal LM with the widths that its config states."""

    config_class = DeciLMConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer, block in zip(self.model.layers, config.block_configs, strict=True):
            attention, hidden = layer.self_attn, config.hidden_size
            group = block.attention.n_heads_in_group
            kv_width = config.num_attention_heads // group * attention.head_dim
            attention.num_key_value_groups = group
            attention.k_proj = nn.Linear(hidden, kv_width, bias=config.attention_bias)
            attention.v_proj = nn.Linear(hidden, kv_width, bias=config.attention_bias)
            width = intermediate_size(block.ffn.ffn_mult, hidden)
            layer.mlp.gate_proj = nn.Linear(hidden, width, bias=config.mlp_bias)
            layer.mlp.up_proj = nn.Linear(hidden, width, bias=config.mlp_bias)
            layer.mlp.down_proj = nn.Linear(width, hidden, bias=config.mlp_bias)
        self.post_init()


def intermediate_size(ffn_mult: float, hidden: int) -> int:
    """Channels of a feed-forward layer: two thirds of ``ffn_mult`` x hidden, rounded up to a multiple of 256."""
    channels = int(2 * ffn_mult * hidden / 3)
    return -(-channels // 256) * 256


def _by_attribute(block: Any) -> Any:
    return SimpleNamespace(**{part: SimpleNamespace(**fields) for part, fields in block.items()})
