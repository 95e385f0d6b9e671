"""DeciLM folders: what their published readers make of the config, and the model that transformers loads from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from shearling.anatomy import BlockShape
from shearling.export import export_deci
from shearling.export.deci import Padding, deci_config
from shearling.plan import Structure
from shearling.surgery import cut_
from tests.engines.reference import PROMPTS, greedy
from tests.tiny import tiny_config, tiny_model, tiny_tokens

PER_LAYER = Structure({"layers": (0, 2), "ffn.2": tuple(range(32)), "kv_group.0": (0,)})


def find_multiple(n: int, k: int) -> int:
    """As both readers round; see vLLM's model_executor/models/nemotron_nas.py and llama.cpp's conversion/deci.py."""
    return n if n % k == 0 else n + k - (n % k)


def vllm_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    """The linears that vLLM's DeciLMDecoderLayer makes of one of block_configs."""
    block = config["block_configs"][layer]
    # `_is_no_op_attention`, `_is_no_op_ffn`
    assert block["attention"]["no_op"] is False and block["ffn"]["no_op"] is False
    kv_heads = config["num_attention_heads"] // block["attention"]["n_heads_in_group"]
    # `_ffn_mult_to_intermediate_size`
    channels = find_multiple(int(2 * block["ffn"]["ffn_mult"] * config["hidden_size"] / 3), 256)
    hidden = config["hidden_size"]
    # LlamaAttention takes head_dim from the config, or else the division
    width = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries = config["num_attention_heads"] * width
    shapes = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (kv_heads * width, hidden),
        "self_attn.v_proj.weight": (kv_heads * width, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (channels, hidden),
        "mlp.up_proj.weight": (channels, hidden),
        "mlp.down_proj.weight": (hidden, channels),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    # `attention_bias` gives all four projections one, `mlp_bias` all three
    assert config["mlp_bias"] is False
    if config["attention_bias"]:
        parts = ("q", "k", "v", "o")
        shapes |= {f"self_attn.{p}_proj.bias": shapes[f"self_attn.{p}_proj.weight"][:1] for p in parts}
    return shapes


def check_fields(config: dict[str, Any], like: Any) -> None:
    """Every field that vLLM's DeciModel or llama.cpp's DeciModel reads, against the model's own config."""
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas"
    # llama.cpp: `assert self.block_count == len(_block_configs)`; vLLM: make_layers(config.num_hidden_layers)
    assert config["num_hidden_layers"] == len(config["block_configs"]) == like.num_hidden_layers
    for field in ("hidden_size", "vocab_size", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"):
        assert config[field] == getattr(like, field), field
    # LlamaMLP has no other
    assert config["hidden_act"] == "silu"
    for field in ("bos_token_id", "eos_token_id"):
        assert config[field] == getattr(like, field), field
    # llama.cpp writes hidden / heads as the width of keys and values
    assert config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    # vLLM: config.rope_parameters; llama.cpp: rope_parameters["rope_theta"]; releases before: rope_theta, rope_scaling
    assert config["rope_parameters"] == like.rope_parameters
    assert config["rope_theta"] == like.rope_parameters["rope_theta"]
    plain = like.rope_parameters["rope_type"] == "default"
    assert config["rope_scaling"] == (None if plain else like.rope_parameters)
    for block in config["block_configs"]:
        # llama.cpp: `isinstance(_ffn_multipliers[0], float)`, and None of these means no attention
        assert isinstance(block["ffn"]["ffn_mult"], float)
        assert isinstance(block["attention"]["n_heads_in_group"], int)
        assert block["attention"]["replace_with_linear"] is False and block["ffn"]["replace_with_linear"] is False
        assert config["num_attention_heads"] % block["attention"]["n_heads_in_group"] == 0


def check_folder(folder: Path, model: Any) -> dict[str, Any]:
    """Config and tensors as the readers want them; returns the config."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    check_fields(config, model.config)
    wanted = {
        "model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"]),
        "model.norm.weight": (config["hidden_size"],),
    }
    if not config["tie_word_embeddings"]:
        wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
    for layer in range(config["num_hidden_layers"]):
        wanted |= {f"model.layers.{layer}.{name}": shape for name, shape in vllm_shapes(config, layer).items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == wanted
    return config


@torch.no_grad()
def check_logits(folder: Path, model: Any, ids_BT: torch.Tensor) -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(loaded).__module__.startswith("transformers_modules.")
    torch.testing.assert_close(loaded(ids_BT).logits, model(ids_BT).logits, rtol=1e-4, atol=1e-4)
    return loaded


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_readers_find_what_they_look_for(family: str, cut: bool, tmp_path: Path) -> None:
    model = tiny_model(family)
    cut_(model, [PER_LAYER] * cut)
    export_deci(model, None, tmp_path / "deci", provenance={})
    config = check_folder(tmp_path / "deci", model)
    assert config["attention_bias"] is (family == "qwen2")
    check_logits(tmp_path / "deci", model, tiny_tokens(2, 40))


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_rotary_embeddings(kind: str, tmp_path: Path) -> None:
    bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    rotary = {"rope_type": kind, "rope_theta": 10000.0, "factor": 8.0, **(bounds if kind == "llama3" else {})}
    model = tiny_model("llama", rope_parameters=rotary)
    cut_(model, [PER_LAYER])
    export_deci(model, None, tmp_path / "deci", provenance={})
    check_folder(tmp_path / "deci", model)
    check_logits(tmp_path / "deci", model, tiny_tokens(2, 40))


@pytest.mark.parametrize("hidden", [192, 576, 2048, 3072, 4096, 5120, 8192])
def test_every_width_of_the_grid_is_read_as_itself(hidden: int) -> None:
    """ffn_mult is a fraction that the readers take the whole part of."""
    widths = range(256, 4 * hidden + 1, 256)
    padding = Padding(4, tuple(BlockShape(width, 4, 4) for width in widths), 0)
    content = deci_config(tiny_config("llama", hidden_size=hidden, head_dim=None), padding, attention_bias=False)
    config = json.loads(json.dumps(content))
    read = [vllm_shapes(config, layer)["mlp.down_proj.weight"] for layer in range(len(widths))]
    assert read == [(hidden, width) for width in widths]


def test_a_real_model_with_widths_of_its_own(per_layer_smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = per_layer_smollm2
    record = export_deci(model, tokenizer, tmp_path / "deci", provenance={})
    config = check_folder(tmp_path / "deci", model)
    assert record["added_bytes"] > 0
    assert {shape % 256 for shape in record["ffn"]} == {0}
    assert config["dtype"] == "float32"
    ids = tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    loaded = check_logits(tmp_path / "deci", model, ids)
    again = AutoTokenizer.from_pretrained(tmp_path / "deci")
    assert greedy(loaded, again, PROMPTS[0], 16) == greedy(model, tokenizer, PROMPTS[0], 16)
