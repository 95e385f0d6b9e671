"""Setting tensors in modules, and making modules and configs say what the tensors are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shearling.anatomy import Anatomy, config_updates
from shearling.errors import ShearlingError


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Make ``value`` the parameter of that name, keeping its trainability, and the module's sizes true.

    A Parameter is put there as it is, so that several names may share it.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf, None)
    if not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=True if old is None else old.requires_grad)
    setattr(module, leaf, value)
    refresh_sizes(module)


def refresh_sizes(module: nn.Module) -> None:
    """Copy the sizes of a module's weight into the attributes that repeat them."""
    match module:
        case nn.Linear():
            module.out_features, module.in_features = module.weight.shape
        case Conv1D():
            module.nx, module.nf = module.weight.shape
        case nn.LayerNorm():
            module.normalized_shape = tuple(module.weight.shape)
        case nn.Embedding():
            module.num_embeddings, module.embedding_dim = module.weight.shape
        case _:
            pass


def conform_(model: Any, anatomy: Anatomy) -> None:
    """Make every attribute and config field that copies a size agree with ``anatomy``.

    ``model`` is a causal language model whose tensors already have the anatomy's shapes.
    """
    blocks = model.get_submodule(anatomy.family.blocks)
    for layer, block in enumerate(blocks):
        conform_block(block, anatomy, layer)
    if anatomy.family.final_norm is not None:
        _conform_norm(model.get_submodule(anatomy.family.final_norm), anatomy)
    outside = {"hidden": anatomy.hidden, "embedding_scale": anatomy.hidden**0.5}
    for path, quantity in anatomy.family.outside_attributes.items():
        owner, _, leaf = path.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(getattr(module, leaf, None), Tensor):
            getattr(module, leaf).fill_(outside[quantity])
        elif hasattr(module, leaf):
            setattr(module, leaf, outside[quantity])
    for config in {id(c): c for c in (model.config, getattr(model.base_model, "config", model.config))}.values():
        _conform_config(config, anatomy)


def check_config(config: Any, after: Anatomy, layers: Sequence[int]) -> None:
    """Raise ShearlingError where the config class refuses what a cut that keeps ``layers`` would write into it.

    Otherwise it would refuse when the checkpoint is saved.
    """
    try:
        probe = config_after(config, after, layers)
        if hasattr(probe, "validate"):
            probe.validate()
    except StrictDataclassError as error:
        why = " ".join(str(error).split())
        raise ShearlingError(f"{after.family.model_type}: its config cannot state the cut model: {why}") from error


def config_after(config: Any, after: Anatomy, layers: Sequence[int]) -> Any:
    """The config of a model of that anatomy, whose blocks are like those of ``layers`` in the model of ``config``."""
    made = copy.deepcopy(config)
    gather_layers(made, after, layers)
    _conform_config(made, after)
    return made


def gather_layers(config: Any, anatomy: Anatomy, layers: Sequence[int]) -> None:
    """Keep, of config lists with one entry a layer, the entries of ``layers``."""
    for name in anatomy.family.per_layer:
        entries = getattr(config, name, None)
        if entries is not None:
            setattr(config, name, [entries[layer] for layer in layers])


def _conform_config(config: Any, anatomy: Anatomy) -> None:
    updates = config_updates(anatomy)
    for name, value in updates.items():
        setattr(config, name, value)
    if "shearling" not in updates and hasattr(config, "shearling"):
        delattr(config, "shearling")


def conform_block(block: nn.Module, anatomy: Anatomy, layer: int) -> None:
    """The part of ``conform_`` that lies inside one block."""
    shape = anatomy.shapes[layer]
    quantities = {
        "ffn": shape.ffn,
        "hidden": anatomy.hidden,
        "query_heads": shape.query_heads,
        "kv_heads": shape.kv_heads,
        "queries_per_kv": shape.query_heads // shape.kv_heads,
        "query_width": shape.query_heads * anatomy.head_dim,
        "head_dim": anatomy.head_dim,
        "head_scale": anatomy.head_dim**-0.5,
    }
    for path, quantity in anatomy.family.attributes.items():
        owner, _, leaf = path.rpartition(".")
        module = block.get_submodule(owner)
        if hasattr(module, leaf):
            setattr(module, leaf, quantities[quantity])
    for path in anatomy.family.norms:
        _conform_norm(block.get_submodule(path), anatomy)
    for module in block.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = layer  # pyrefly: ignore[bad-argument-type]
    for path in anatomy.family.reads_config:
        # the stock code asks its config for head counts at run time, and all blocks share one config
        module: Any = block.get_submodule(path)
        fields = anatomy.family.config
        own = copy.copy(module.config)
        own.__dict__.update({fields["query_heads"]: shape.query_heads, fields["kv_heads"]: shape.kv_heads})
        module.config = own


def _conform_norm(norm: nn.Module, anatomy: Anatomy) -> None:
    if isinstance(norm, nn.LayerNorm):
        # one without weights has nothing that was cut
        norm.normalized_shape = (anatomy.hidden,)


def add_bias_(model: nn.Module, anatomy: Anatomy, linear: str) -> None:
    """Give the linear of that inner name a zero bias in every block that lacks one."""
    for layer in range(anatomy.num_layers):
        module: Any = model.get_submodule(anatomy.path(layer, linear))
        if module.bias is None:
            weight = module.weight
            module.bias = nn.Parameter(torch.zeros(anatomy.hidden, dtype=weight.dtype, device=weight.device))
