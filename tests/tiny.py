"""Tiny random models of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 97
_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 16},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 16},
    "phi3": {"original_max_position_embeddings": 128},
}
_MULTI_HEAD: dict[str, dict[str, Any]] = {
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dropout": 0.0,
    },
    "gpt2": {
        "n_embd": 32,
        "n_inner": 48,
        "n_layer": 3,
        "n_head": 4,
        "vocab_size": VOCAB,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
FAMILIES = (*_OWN, *_MULTI_HEAD)
#: that llama.cpp has an architecture for
GGUF_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2")
#: Llama 3's rotary frequencies
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """Config of a three-layer model, four query heads of 8 (two KV heads where the family can), 48 channels."""
    fields = _MULTI_HEAD.get(model_type) or {**_COMMON, **_OWN[model_type]}
    return AutoConfig.for_model(model_type, **{**fields, **overrides})


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """A float32 model in evaluation mode whose weights, norms and biases are all random and matter."""
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * (1.0 if "embed" in name or "wte" in name else 0.2))
            else:
                parameter.copy_(parameter + 0.2 * noise)
    return model


def tiny_tokens(batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids, [batch, length]."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer() -> Any:
    """One token a printable character, the first ones special."""
    vocabulary = {name: index for index, name in enumerate(["<unk>", "<s>", "</s>"])}
    for code in range(32, 32 + VOCAB - len(vocabulary)):
        vocabulary[chr(code)] = len(vocabulary)
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = Split(Regex("."), "isolated")
    core.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def tiny_bpe() -> Any:
    """One token a byte and one of two, in the way of GPT-2, for which llama.cpp has rules; one of Qwen2's fits too."""
    tokens = ["<unk>", "<s>", "</s>", "Ġ", "Ċ", "in", *(chr(code) for code in range(33, 33 + VOCAB - 7))]
    core = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, [("i", "n")], unk_token="<unk>"))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def tiny_folder(folder: Path, model_type: str = "llama", **overrides: Any) -> Path:
    """A checkpoint of a tiny model with its tokenizer."""
    tiny_model(model_type, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
