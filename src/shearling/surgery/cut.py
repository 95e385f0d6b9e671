"""Carrying edits out: the one place that changes a model's shapes, values and config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shearling.anatomy import Anatomy, anatomy_of
from shearling.errors import ShearlingError
from shearling.plan import (
    Adapters,
    Delta,
    Edit,
    Masks,
    Quant,
    Structure,
    check_order,
    dequantise,
    kept_layers,
    shape_after,
)
from shearling.surgery.modules import (
    add_bias_,
    check_config,
    conform_,
    conform_block,
    gather_layers,
    set_parameter,
)
from shearling.surgery.scaling import embedding_factor, rescaled, scaled_parameters
from shearling.surgery.slicing import slice_tensor


@torch.no_grad()
def cut_(model: Any, edits: Sequence[Edit]) -> Anatomy:
    """Apply edits to a causal language model in place; returns its new anatomy.

    The result equals the edited but uncut model (``gate_``) to rounding. Raises ShearlingError, before anything is
    changed by that edit, for indices, names or shapes that do not fit the model.
    """
    check_order(edits)
    anatomy = anatomy_of(model.config)
    for edit in edits:
        match edit:
            case Structure():
                anatomy = _cut_structure(model, anatomy, edit)
            case Delta():
                anatomy = write_values_(model, anatomy, edit)
            case Masks():
                for name, mask in edit.kept.items():
                    weight = model.get_parameter(name)
                    _check_shape(name, mask, weight.shape)
                    # not a product: a pruned weight is +0.0, never -0.0
                    weight.copy_(torch.where(mask.to(weight.device), weight, torch.zeros_like(weight)))
            case Adapters():
                for path in edit.down:
                    module: Any = model.get_submodule(path)
                    product = edit.scale[path] * edit.up[path].double() @ edit.down[path].double()
                    stored = product.T if isinstance(module, Conv1D) else product
                    module.weight.copy_((module.weight.double().cpu() + stored.cpu()).to(module.weight))
            case Quant():
                for name, codes in edit.codes.items():
                    weight = model.get_parameter(name)
                    rounded = dequantise(codes, edit.scales[name], edit.zeros[name], weight.dtype)
                    if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D):
                        rounded = rounded.T
                    _check_shape(name, rounded, weight.shape)
                    weight.copy_(rounded.to(weight))
    return anatomy


def write_values_(model: Any, anatomy: Anatomy, delta: Delta) -> Anatomy:
    """Write a Delta's values; a bias that the model lacks is added to that linear in every block."""
    parameters = dict(model.named_parameters())
    added = sorted({_inner(anatomy, name).removesuffix(".bias") for name in delta.values if name not in parameters})
    if added:
        linears = (anatomy.family.ffn_output, anatomy.family.attention_output)
        for linear in added:
            if linear not in linears:
                raise ShearlingError(f"delta: the model has no {linear}; only {' and '.join(linears)} may gain a bias")
            add_bias_(model, anatomy, linear)
        anatomy = replace(anatomy, biases=tuple(sorted({*anatomy.biases, *added})))
        conform_(model, anatomy)
        parameters = dict(model.named_parameters())
    for name, value in delta.values.items():
        _check_shape(name, value, parameters[name].shape)
    for name, value in delta.values.items():
        parameters[name].copy_(value.to(parameters[name]))
    return anatomy


def _cut_structure(model: Any, anatomy: Anatomy, structure: Structure) -> Anatomy:
    after = shape_after(anatomy, structure)
    for name, _ in model.named_parameters():
        anatomy.layout(name)
    layers = kept_layers(anatomy, structure)
    check_config(model.config, after, layers)
    _slice_outside(model, anatomy, structure)
    for layer in range(anatomy.num_layers):
        _slice_block(model.get_submodule(anatomy.path(layer)), layer, anatomy, structure)
    if len(layers) < anatomy.num_layers:
        path, _, leaf = anatomy.family.blocks.rpartition(".")
        blocks = model.get_submodule(anatomy.family.blocks)
        setattr(model.get_submodule(path), leaf, nn.ModuleList(blocks[layer] for layer in layers))
        gather_layers(model.config, anatomy, layers)
    if after.hidden != anatomy.hidden:
        factor = embedding_factor(model, anatomy, after)
        for name in scaled_parameters(model, after):
            parameter = model.get_parameter(name)
            parameter.copy_(rescaled(parameter, name, after, factor))
    conform_(model, after)
    return after


@torch.no_grad()
def cut_block_(block: nn.Module, layer: int, anatomy: Anatomy, structure: Structure) -> Anatomy:
    """Cut one block apart from its model, in place; returns the anatomy of the model it would belong to."""
    after = shape_after(anatomy, structure)
    _slice_block(block, layer, anatomy, structure)
    conform_block(block, after, layer)
    return after


def _slice_outside(model: Any, anatomy: Anatomy, structure: Structure) -> None:
    cut: dict[int, nn.Parameter] = {}
    # a tied tensor is met under every name, and stays one
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if anatomy.layer_of(name) is not None:
            continue
        if id(parameter) not in cut:
            kept = slice_tensor(parameter.data, name, anatomy, structure)
            cut[id(parameter)] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
        if cut[id(parameter)].shape != parameter.shape:
            set_parameter(model, name, cut[id(parameter)])


def _slice_block(block: nn.Module, layer: int, anatomy: Anatomy, structure: Structure) -> None:
    for inner, parameter in list(block.named_parameters()):
        kept = slice_tensor(parameter.data, anatomy.path(layer, inner), anatomy, structure)
        if kept.shape != parameter.shape:
            set_parameter(block, inner, kept)


def _inner(anatomy: Anatomy, name: str) -> str:
    layer = anatomy.layer_of(name)
    if layer is None or layer >= anatomy.num_layers or not name.endswith(".bias"):
        raise ShearlingError(f"delta: the model has no tensor {name}")
    return name.removeprefix(anatomy.path(layer) + ".")


def _check_shape(name: str, value: Tensor, shape: torch.Size) -> None:
    if value.shape != shape:
        raise ShearlingError(f"{name}: the edit has shape {tuple(value.shape)}, the model {tuple(shape)}")
