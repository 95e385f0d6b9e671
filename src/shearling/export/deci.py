"""Per-layer widths as a DeciLM (Nemotron-NAS) checkpoint, which vLLM, SGLang, TensorRT-LLM and llama.cpp read.

Their config says of a block how many query heads share a KV head, of the same number of query heads everywhere, and an
``ffn_mult`` of which they make a width of 256 channels or a multiple. What a block lacks of such a shape is filled up
with zeros: heads and channels that add nothing to any logit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shearling.anatomy import Anatomy, BlockShape, anatomy_of
from shearling.errors import ShearlingError
from shearling.nn import plain_state
from shearling.surgery import adapters_of

#: the readers' feed-forward widths are multiples of this
GRID = 256
_MODULE = "modeling_decilm"
#: config fields of Llama that the readers use
_FIELDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "hidden_act",
    "initializer_range",
    "max_position_embeddings",
    "mlp_bias",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "vocab_size",
)


@dataclass(frozen=True)
class Padding:
    """The shapes that a DeciLM config can state for blocks, and the weights of linears that filling up adds."""

    query_heads: int
    shapes: tuple[BlockShape, ...]
    added_parameters: int


def pad_shapes(anatomy: Anatomy) -> Padding:
    """The smallest shapes that a DeciLM config states and that hold an anatomy's blocks.

    A block of k KV heads with g query heads each goes into k' >= k KV heads with g' >= g, of k' g' query heads in all,
    the same for every block. Raises ShearlingError where the architecture, the hidden size, or biases do not fit.
    """
    family, hidden, width = anatomy.family, anatomy.hidden, anatomy.head_dim
    # the architectures that llama.cpp's `deci` holds are those of this format
    if family.gguf_per_layer != "deci":
        raise ShearlingError(
            f"{family.model_type}: DeciLM is Llama with widths per layer; this is another architecture"
        )
    if anatomy.biases:
        raise ShearlingError(f"deci: biases of {', '.join(anatomy.biases)} have no place in it; export gguf or onnx")
    if hidden % width or any(shape.query_heads * width > hidden for shape in anatomy.shapes):
        raise ShearlingError(
            f"deci: hidden={hidden} is no multiple of the head width {width} that all query heads fit into; export gguf"
        )
    queries = hidden // width
    shapes = tuple(_pad(shape, queries) for shape in anatomy.shapes)
    added = sum(
        hidden
        * (3 * (new.ffn - old.ffn) + 2 * width * (new.query_heads + new.kv_heads - old.query_heads - old.kv_heads))
        for new, old in zip(shapes, anatomy.shapes, strict=True)
    )
    return Padding(queries, shapes, added)


def _pad(shape: BlockShape, queries: int) -> BlockShape:
    group = shape.query_heads // shape.kv_heads
    fitting = (n for n in range(shape.kv_heads, queries + 1) if queries % n == 0 and queries // n >= group)
    kv_heads = next(fitting, None)
    if kv_heads is None:
        raise ShearlingError(
            f"deci: {shape.kv_heads} KV heads of {group} query heads each fit no division of {queries} query heads; "
            "export gguf"
        )
    return BlockShape(-(-shape.ffn // GRID) * GRID, queries, kv_heads)


def deci_config(config: Any, padding: Padding, *, attention_bias: bool) -> dict[str, Any]:
    """The content of a DeciLM ``config.json`` for a model of these shapes."""
    content = {field: getattr(config, field, None) for field in _FIELDS}
    content["attention_bias"] = attention_bias
    content["mlp_bias"] = bool(content["mlp_bias"])
    hidden = config.hidden_size
    rotary = config.rope_parameters
    content |= {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{_MODULE}.DeciLMConfig", "AutoModelForCausalLM": f"{_MODULE}.DeciLMForCausalLM"},
        "model_type": "nemotron-nas",
        "hidden_size": hidden,
        "num_hidden_layers": len(padding.shapes),
        "num_attention_heads": padding.query_heads,
        # the readers go by block_configs; transformers wants numbers here
        "num_key_value_heads": max(shape.kv_heads for shape in padding.shapes),
        "intermediate_size": max(shape.ffn for shape in padding.shapes),
        "head_dim": hidden // padding.query_heads,
        # readers from before rope_parameters
        "rope_theta": rotary["rope_theta"],
        "rope_scaling": None if rotary.get("rope_type", "default") == "default" else rotary,
        "dtype": str(config.dtype).removeprefix("torch."),
        "block_configs": [_block(shape, hidden) for shape in padding.shapes],
    }
    return content


def _block(shape: BlockShape, hidden: int) -> dict[str, Any]:
    # the readers take the whole part of two thirds of it times hidden, the width or one less, and round up to the grid
    multiplier = 3 * shape.ffn / (2 * hidden)
    return {
        "attention": {
            "n_heads_in_group": shape.query_heads // shape.kv_heads,
            "no_op": False,
            "replace_with_linear": False,
        },
        "ffn": {"ffn_mult": multiplier, "no_op": False, "replace_with_linear": False},
    }


def write_deci(model: Any, tokenizer: Any, folder: Path) -> tuple[Padding, int]:
    """Write a DeciLM checkpoint into an existing folder, with the module that lets transformers load it.

    Returns the shapes of its blocks and the bytes of zeros that it has beyond the model.

    Raises ShearlingError as ``pad_shapes`` does, and for branches beside linears.
    """
    anatomy = anatomy_of(model.config)
    if adapters_of(model).down:
        raise ShearlingError("deci: the model has branches beside its linears; merge them, or export onnx")
    padding = pad_shapes(anatomy)
    attention_bias = any(name.endswith("self_attn.q_proj.bias") for name, _ in model.named_parameters())
    config = deci_config(model.config, padding, attention_bias=attention_bias)
    tensors = _padded(plain_state(model), model, anatomy, padding, attention_bias=attention_bias)
    if config["tie_word_embeddings"]:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = resources.files("shearling.export").joinpath("decilm_checkpoint.py").read_text(encoding="utf-8")
    (folder / f"{_MODULE}.py").write_text(source, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    before = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return padding, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) - before


def _padded(
    state: Mapping[str, Tensor], model: Any, anatomy: Anatomy, padding: Padding, *, attention_bias: bool
) -> dict[str, Tensor]:
    after = replace(anatomy, shapes=padding.shapes)
    padded: dict[str, Tensor] = {}
    for name, _ in model.named_parameters():
        tensor, layer = state[name].detach().cpu(), anatomy.layer_of(name)
        if layer is not None:
            for axis, spaces in enumerate(anatomy.layout(name)):
                tensor = _fill(tensor, axis, spaces[0], anatomy, after, layer)
        padded[name] = tensor.contiguous()
    if attention_bias:
        # the readers give all four projections a bias where they give any one
        for layer in range(anatomy.num_layers):
            weight = padded[anatomy.path(layer, "self_attn.o_proj.weight")]
            padded.setdefault(
                anatomy.path(layer, "self_attn.o_proj.bias"), torch.zeros(len(weight), dtype=weight.dtype)
            )
    return padded


def _fill(tensor: Tensor, axis: int, space: str, before: Anatomy, after: Anatomy, layer: int) -> Tensor:
    """Zeros along one axis where a block gets more heads or channels; query heads stay with their KV head."""
    if space not in ("ffn", "query", "kv") or before.shapes[layer] == after.shapes[layer]:
        return tensor
    old, new, width = before.shapes[layer], after.shapes[layer], before.head_dim
    if space == "ffn":
        places = torch.arange(old.ffn)
    else:
        old_group, new_group = (
            (old.query_heads // old.kv_heads, new.query_heads // new.kv_heads) if space == "query" else (1, 1)
        )
        heads = torch.arange(old.kv_heads)[:, None] * new_group + torch.arange(old_group)
        places = (heads.flatten()[:, None] * width + torch.arange(width)).flatten()
    shape = list(tensor.shape)
    shape[axis] = after.size(space, layer)
    return torch.zeros(shape, dtype=tensor.dtype).index_copy(axis, places, tensor)
