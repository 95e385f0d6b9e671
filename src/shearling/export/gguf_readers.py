"""A GGUF file by readers of others: transformers' loader, llama.cpp, or the tensors as gguf dequantises them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.anatomy import anatomy_of, expressible
from shearling.errors import ShearlingError
from shearling.export.gguf import pair_up, stored_type
from shearling.export.llama_quantize import K_QUANTS
from shearling.export.verify import Verification, logits_of, prompt_ids, verify

#: relative difference of logits that arithmetic may cause: transformers computes in float32; llama.cpp keeps keys and
#: values in float16, and before products with rounded weights it rounds states to 8 bits
_EXACT, _LLAMA_CPP, _LLAMA_CPP_ROUNDED = 2e-3, 0.02, 0.4


def verify_gguf(model: Any, tokenizer: Any, file: Path, kind: str) -> list[Verification]:
    """Compare a GGUF file with the model that was written into it, by every reader at hand.

    transformers' own loader where it knows the architecture and the shape; llama.cpp where ``llama_cpp`` is installed;
    else gguf's dequantised tensors under their names, put into the model's class. What K-quants round to only llama.cpp
    knows: how far they are from the model is told, and nothing is refused. Raises ShearlingError as ``verify``.
    """
    anatomy = anatomy_of(model.config)
    prompts = prompt_ids(tokenizer, anatomy.vocab)
    expected = logits_of(model, prompts)
    rounded = expected if kind in K_QUANTS or kind == "f32" else logits_of(_rounded(model, kind), prompts)
    readers: dict[str, tuple[Callable[[list[Tensor]], list[Tensor]], float]] = {}
    if expressible(anatomy):
        readers["transformers"] = lambda prompts: logits_of(_by_transformers(model.config, file), prompts), _EXACT
    if find_spec("llama_cpp"):
        tolerance = _LLAMA_CPP if kind in ("f32", "f16", "bf16") else _LLAMA_CPP_ROUNDED
        readers["llama_cpp_python"] = lambda prompts: _by_llama_cpp(file, prompts, anatomy.vocab), tolerance
    if not readers:
        readers["gguf"] = lambda prompts: logits_of(_by_tensors(model, file), prompts), _EXACT
    return [
        verify(name, read, prompts, expected, rounded=rounded, tolerance=inf if kind in K_QUANTS else tolerance)
        for name, (read, tolerance) in readers.items()
    ]


@torch.no_grad()
def _rounded(model: Any, kind: str) -> Any:
    """A copy of the model in float32 whose matrices are on the grid of a type."""
    from gguf import GGMLQuantizationType, dequantize, quantize

    anatomy = anatomy_of(model.config)
    copied = copy.deepcopy(model).float()
    linears = tuple(f".{linear}.weight" for linear in anatomy.family.linears)
    for name, parameter in copied.named_parameters():
        stored = GGMLQuantizationType[stored_type(name, parameter.ndim, anatomy, kind)]
        # blocks lie along inputs
        turned = anatomy.family.input_first and name.endswith(linears)
        matrix = (parameter.T if turned else parameter).contiguous().numpy()
        back = torch.from_numpy(dequantize(quantize(matrix, stored), stored))
        parameter.copy_(back.T if turned else back)
    return copied


def _by_transformers(config: Any, file: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # what its loader takes from the file is taken from there; it passes over some fields, such as Gemma's soft caps
    read = copy.deepcopy(config)
    stated: dict[str, Any] = dict(load_gguf_checkpoint(str(file))["config"])
    if stated["model_type"] != read.model_type:
        # Mistral is Llama to llama.cpp
        fields = {name: value for name, value in read.to_dict().items() if name != "model_type"}
        read = AutoConfig.for_model(stated["model_type"], **fields)
    for field, value in stated.items():
        if field not in ("model_type", "_model_name_or_path", "rope_theta", "architectures"):
            setattr(read, field, value)
    if "rope_theta" in stated:
        parameters = read.rope_parameters
        (parameters.get("full_attention") or parameters)["rope_theta"] = stated["rope_theta"]
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=read, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def _by_llama_cpp(file: Path, prompts: list[Tensor], vocab: int) -> list[Tensor]:
    from llama_cpp import Llama

    longest = max(len(ids) for ids in prompts)
    threads = torch.get_num_threads()
    sizes = {"n_ctx": longest, "n_batch": longest, "n_threads": threads, "n_threads_batch": threads}
    engine = Llama(str(file), logits_all=True, verbose=False, **sizes)
    found = []
    for ids in prompts:
        engine.reset()
        engine.eval(ids.tolist())
        found.append(torch.tensor(engine.scores[: len(ids), :vocab].copy()))
    return found


def _by_tensors(model: Any, file: Path) -> Any:
    from gguf import MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map

    reader = GGUFReader(file)
    anatomy = anatomy_of(model.config)
    architecture = reader.fields["general.architecture"].contents()
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, anatomy.num_layers)
    found = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    copied = copy.deepcopy(model).float()
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if stored not in found:
                raise ShearlingError(f"the file lacks {name}")
            tensor = found[stored]
            rows = torch.arange(len(tensor))
            inner = name.rpartition(".")[0].removeprefix(f"{anatomy.family.blocks}.").partition(".")[2]
            if inner in anatomy.family.attention_inputs[:2]:
                tensor = tensor[pair_up(rows, anatomy.head_dim).argsort()]
            parameter.copy_(tensor)
    return copied
