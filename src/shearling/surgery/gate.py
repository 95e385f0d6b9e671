"""The edited but uncut model: removed units are silenced instead of taken away. It is what a cut must equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from shearling.anatomy import Anatomy, anatomy_of
from shearling.nn import HiddenGates
from shearling.plan import Delta, Edit, Structure, kept_elements, kept_layers, shape_after
from shearling.surgery.cut import cut_, write_values_
from shearling.surgery.scaling import embedding_factor, rescaled, scaled_parameters
from shearling.surgery.slicing import scatter_tensor


@torch.no_grad()
def gate_(model: Any, edits: Sequence[Edit]) -> None:
    """Apply edits in place without changing a shape.

    Removed channels and heads lose their columns in the projection that writes to the residual stream; removed
    layers lose that projection whole; removed hidden dimensions are closed by ``HiddenGates``, which stay. Values that
    follow a cut are put where the kept elements lie.
    """
    anatomy = anatomy_of(model.config)
    structure = Structure({})
    for edit in edits:
        if isinstance(edit, Structure):
            assert not structure.kept, "gating knows one structural cut"
            structure = edit
            _silence(model, anatomy, structure)
        elif isinstance(edit, Delta) and structure.kept:
            anatomy = write_values_(model, anatomy, _uncut(model, anatomy, structure, edit))
        else:
            cut_(model, [edit])


def _silence(model: Any, anatomy: Anatomy, structure: Structure) -> None:
    layers = set(kept_layers(anatomy, structure))
    hidden = kept_elements(anatomy, structure, "hidden", None)
    if hidden is not None:
        z = torch.zeros(anatomy.hidden, device=next(model.parameters()).device)
        z[hidden] = 1
        HiddenGates(model, z)
    for layer in range(anatomy.num_layers):
        for space, linear in (("ffn", anatomy.family.ffn_output), ("query", anatomy.family.attention_output)):
            module: nn.Module = model.get_submodule(anatomy.path(layer, linear))
            weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
            if layer not in layers:
                weight.zero_()
                if bias is not None:
                    bias.zero_()
                continue
            kept = kept_elements(anatomy, structure, space, layer)
            if kept is not None:
                layout = anatomy.layout(anatomy.path(layer, f"{linear}.weight"))
                axis = next(i for i, parts in enumerate(layout) if space in parts)
                gone = torch.ones(weight.shape[axis], dtype=torch.bool)
                gone[kept] = False
                weight.index_fill_(axis, gone.nonzero().flatten().to(weight.device), 0)


def _uncut(model: Any, anatomy: Anatomy, structure: Structure, delta: Delta) -> Delta:
    after = shape_after(anatomy, structure)
    layers = kept_layers(anatomy, structure)
    parameters = dict(model.named_parameters())
    factor = embedding_factor(model, anatomy, after)
    scaled = scaled_parameters(model, anatomy) if after.hidden != anatomy.hidden else []
    values = {}
    for name, value in delta.values.items():
        new = anatomy.layer_of(name)
        if new is not None:
            name = anatomy.path(layers[new], name.removeprefix(anatomy.path(new) + "."))
        if name in scaled:
            value = rescaled(value, name, anatomy, 1 / factor)
        if name in parameters:
            value = scatter_tensor(value, parameters[name], name, anatomy, structure)
        elif name.endswith(".bias"):
            # a bias that is about to be added
            kept = kept_elements(anatomy, structure, "hidden", None)
            whole = torch.zeros(anatomy.hidden, dtype=value.dtype, device=value.device)
            whole[slice(None) if kept is None else kept] = value
            value = whole
        values[name] = value
    return Delta(values)
