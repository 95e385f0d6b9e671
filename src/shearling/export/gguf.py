"""A model as one GGUF file, which llama.cpp and what is built on it load.

The ``gguf`` package names the tensors, rounds them and lays out the file. Widths of their own per block are held by
llama.cpp's ``deci`` architecture, whose file states heads and channels block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shearling.anatomy import Anatomy, anatomy_of, family_names, family_of, obstacle
from shearling.errors import ShearlingError
from shearling.export.gguf_vocabulary import add_vocabulary
from shearling.export.llama_quantize import K_QUANTS
from shearling.nn import plain_state
from shearling.surgery import adapters_of

#: stored types of the matrices, and of the embedding and the head; vectors stay float32
_STORED = {
    "f32": ("F32", "F32"),
    "f16": ("F16", "F16"),
    "bf16": ("BF16", "BF16"),
    "q8_0": ("Q8_0", "Q8_0"),
    "q4_0": ("Q4_0", "Q8_0"),
    "q4_1": ("Q4_1", "Q8_0"),
}
#: weights that share a scale in the rounded types
_BLOCK = 32
TYPES = (*_STORED, *K_QUANTS)


@dataclass(frozen=True)
class _Architecture:
    """What llama.cpp takes for granted of one of its architectures."""

    #: rotary embeddings turn neighbouring elements of a head, not elements half a head apart
    rotates_pairs: bool = False
    activation: str = "silu"
    #: query heads together are as wide as the residual stream
    square: bool = False
    #: it follows sliding windows
    windows: bool = False
    #: linears may have biases that the stock class has not
    any_bias: bool = False


_ARCHITECTURES = {
    "llama": _Architecture(rotates_pairs=True, any_bias=True),
    "deci": _Architecture(rotates_pairs=True, any_bias=True),
    "qwen2": _Architecture(square=True),
    "qwen3": _Architecture(),
    "phi3": _Architecture(square=True),
    "gemma2": _Architecture(activation="gelu_pytorch_tanh", windows=True),
    "gemma3": _Architecture(activation="gelu_pytorch_tanh", windows=True),
    "gpt2": _Architecture(activation="gelu_new", square=True),
}


def gguf_architecture(config: Any, kind: str) -> str:
    """llama.cpp's name for the architecture of a model with this config, to be written as GGUF of that type.

    Raises ShearlingError in one line where it has none: an unknown type or family, per-layer widths where llama.cpp
    takes none, a width that blocks of 32 do not divide.
    """
    if kind not in TYPES:
        raise ShearlingError(f"type {kind!r}: no GGUF type; must be one of {', '.join(TYPES)}")
    if not find_spec("gguf"):
        raise ShearlingError("GGUF: needs the package gguf; pip install 'shearling[gguf]'")
    anatomy = anatomy_of(config)
    name = architecture_of(anatomy, config)
    if kind not in ("f32", "f16", "bf16"):
        check_rows(anatomy, kind)
    return name


def write_gguf(model: Any, tokenizer: Any, file: Path, kind: str, name: str) -> None:
    """Write a model into a new GGUF file.

    ``kind`` is one of TYPES but for K-quants, which ``quantize_file`` makes of a file of type f32. A tokenizer of None
    writes none, and the file then takes token ids only. Raises ShearlingError as ``gguf_architecture`` does, for
    branches beside linears, and where llama.cpp has no rules for the tokenizer.
    """
    architecture = gguf_architecture(model.config, kind)
    if adapters_of(model).down:
        raise ShearlingError("GGUF: the model has branches beside its linears; merge them, or export onnx")
    from gguf import GGUFWriter, LlamaFileType

    anatomy = anatomy_of(model.config)
    writer = GGUFWriter(file, architecture)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[f"{'ALL' if kind == 'f32' else 'MOSTLY'}_{kind.upper()}"])
    writer.add_quantization_version(2)
    _add_sizes(writer, anatomy, architecture)
    _add_config(writer, model.config, anatomy, architecture)
    add_vocabulary(writer, tokenizer, anatomy.vocab)
    for tensor_name, array, stored in _tensors(model, anatomy, architecture, kind):
        writer.add_tensor(tensor_name, array, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def architecture_of(anatomy: Anatomy, config: Any) -> str:
    """llama.cpp's name of the architecture that holds an anatomy and a config; ShearlingError where it has none."""
    name = _name_of(anatomy)
    _check_config(config, anatomy, name)
    return name


def _name_of(anatomy: Anatomy) -> str:
    family = anatomy.family
    if family.gguf is None:
        known = ", ".join(name for name in family_names() if family_of(name).gguf)
        raise ShearlingError(f"{family.model_type}: llama.cpp has no such architecture; GGUF works for {known}")
    plain = _ARCHITECTURES[family.gguf]
    query = anatomy.shapes[0].query_heads * anatomy.head_dim
    if anatomy.uniform and (plain.any_bias or not anatomy.biases) and (not plain.square or query == anatomy.hidden):
        return family.gguf
    if family.gguf_per_layer is None:
        able = ", ".join(name for name in family_names() if family_of(name).gguf_per_layer)
        why = obstacle(anatomy) or f"hidden={anatomy.hidden} with {query} elements of queries"
        raise ShearlingError(f"{family.model_type}: llama.cpp cannot hold this shape ({why}); it can for {able}")
    return family.gguf_per_layer


def _check_config(config: Any, anatomy: Anatomy, name: str) -> None:
    where = anatomy.family.model_type
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    activation = getattr(config, "activation_function", activation)
    needed = _ARCHITECTURES[name].activation
    if activation != needed:
        raise ShearlingError(f"{where}: llama.cpp computes {needed}, the config says {activation!r}; export onnx")
    scalar = getattr(config, "query_pre_attn_scalar", anatomy.head_dim)
    if scalar != anatomy.head_dim:
        raise ShearlingError(
            f"{where}: llama.cpp scales scores by the width of a head, {anatomy.head_dim}, the config by {scalar}; "
            "export onnx"
        )
    for parameters in _rotary(config).values():
        kind = parameters.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3"):
            raise ShearlingError(f"{where}: rope_type={kind!r} is not written as GGUF; default, linear and llama3 are")
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ShearlingError(f"{where}: partial rotary embeddings are not written as GGUF; export onnx")


def check_rows(anatomy: Anatomy, kind: str) -> None:
    """Raise ShearlingError where blocks of 32, which lie along the inputs of each matrix, do not fill one."""
    widths = [("hidden", anatomy.hidden)]
    for layer, shape in enumerate(anatomy.shapes):
        widths += [(f"ffn of layer {layer}", shape.ffn)]
        widths += [(f"query heads of layer {layer}", shape.query_heads * anatomy.head_dim)]
    for what, width in widths:
        if width % _BLOCK:
            raise ShearlingError(
                f"{kind}: {what} is {width}, no multiple of {_BLOCK}; prune with round_to: {_BLOCK}, or give f16"
            )


def _rotary(config: Any) -> dict[str, dict[str, Any]]:
    """Rotary parameters by kind of layer; empty for learned positions."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    return nested or ({"full_attention": parameters} if parameters else {})


def _add_sizes(writer: Any, anatomy: Anatomy, architecture: str) -> None:
    shapes = anatomy.shapes
    writer.add_block_count(anatomy.num_layers)
    writer.add_embedding_length(anatomy.hidden)
    writer.add_vocab_size(anatomy.vocab)
    for add, widths in (
        (writer.add_feed_forward_length, [shape.ffn for shape in shapes]),
        (writer.add_head_count, [shape.query_heads for shape in shapes]),
        (writer.add_head_count_kv, [shape.kv_heads for shape in shapes]),
    ):
        add(widths if architecture == anatomy.family.gguf_per_layer else widths[0])
    writer.add_key_length(anatomy.head_dim)
    writer.add_value_length(anatomy.head_dim)


def _add_config(writer: Any, config: Any, anatomy: Anatomy, architecture: str) -> None:
    if anatomy.family.norm == "rms":
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    windowed = window is not None and (kinds is None or "sliding_attention" in kinds)
    context = config.max_position_embeddings
    if windowed and _ARCHITECTURES[architecture].windows:
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds or []])
    elif windowed:
        # llama.cpp lets these see everything, which is the same as long as the window holds it
        context = min(context, window)
    writer.add_context_length(context)
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, field, None)
        if value is not None:
            getattr(writer, f"add_{field}")(value)
    rotary = _rotary(config)
    if rotary:
        plain = rotary["full_attention"]
        writer.add_rope_dimension_count(anatomy.head_dim)
        writer.add_rope_freq_base(plain["rope_theta"])
        if "sliding_attention" in rotary:
            writer.add_rope_freq_base_swa(rotary["sliding_attention"]["rope_theta"])
        if plain.get("rope_type") == "linear":
            from gguf import RopeScalingType

            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(plain["factor"])


def _tensors(model: Any, anatomy: Anatomy, architecture: str, kind: str) -> Iterator[tuple[str, np.ndarray, Any]]:
    """Name, content and stored type of every tensor, a tied one once."""
    from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map, quantize

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, anatomy.num_layers)
    factors = _frequency_factors(model)
    if factors is not None:
        yield "rope_freqs.weight", factors, GGMLQuantizationType.F32
    state = plain_state(model)
    for name in dict(model.named_parameters()):
        stored_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored_name is not None, f"gguf has no name for {name}"
        array = _as_stored(state[name], name, anatomy, architecture).numpy()
        stored = GGMLQuantizationType[stored_type(name, array.ndim, anatomy, kind)]
        yield stored_name, quantize(array, stored), stored


def stored_type(name: str, ndim: int, anatomy: Anatomy, kind: str) -> str:
    """gguf's name of the type that a tensor is stored as in a file of type ``kind``."""
    # learned positions are added, not multiplied, and vectors cost nothing
    if ndim == 1 or name in [f"{table}.weight" for table in anatomy.family.embeddings[1:]]:
        return "F32"
    matrix, outer = _STORED[kind]
    return outer if anatomy.layer_of(name) is None else matrix


def _as_stored(weight: Tensor, name: str, anatomy: Anatomy, architecture: str) -> Tensor:
    """A tensor in float32 as llama.cpp multiplies by it: [out, in], rotary pairs side by side, norms as factors."""
    family = anatomy.family
    weight = weight.detach().float().cpu()
    inner = name.rpartition(".")[0].removeprefix(f"{family.blocks}.").partition(".")[2]
    if family.input_first and inner in family.linears and weight.ndim == 2:
        weight = weight.T
    if family.norm_one_plus and name.rpartition(".")[0].endswith("norm"):
        weight = weight + 1
    if _ARCHITECTURES[architecture].rotates_pairs and inner in family.attention_inputs[:2]:
        weight = pair_up(weight, anatomy.head_dim)
    return weight.contiguous()


def pair_up(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k heads so that the two elements which rotate together, half a head apart, become neighbours."""
    heads = weight.unflatten(0, (-1, 2, head_dim // 2))
    return heads.transpose(1, 2).reshape(weight.shape)


def _frequency_factors(model: Any) -> np.ndarray | None:
    """What llama.cpp divides rotary frequencies by, [head_dim / 2]; None where they are plain powers of the base."""
    parameters = _rotary(model.config).get("full_attention", {})
    if parameters.get("rope_type") != "llama3":
        return None
    scaled: Tensor = model.get_decoder().rotary_emb.inv_freq.double().cpu()
    powers = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    return (parameters["rope_theta"] ** -powers / scaled).float().numpy()
