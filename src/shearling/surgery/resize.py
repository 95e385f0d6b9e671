"""Giving an empty model the shapes of an anatomy, for loading a checkpoint into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shearling.anatomy import Anatomy
from shearling.plan.sizes import reshape_axis
from shearling.surgery.modules import add_bias_, conform_, set_parameter


@torch.no_grad()
def resize_(model: Any, anatomy: Anatomy) -> None:
    """Replace every tensor inside the blocks whose shape differs from the anatomy's by an initialised one."""
    for name, parameter in list(model.named_parameters()):
        layer = anatomy.layer_of(name)
        layout = anatomy.layout(name)
        shape = [reshape_axis(layout, axis, anatomy, layer, size) for axis, size in enumerate(parameter.shape)]
        if tuple(shape) != tuple(parameter.shape):
            set_parameter(model, name, torch.empty(shape, dtype=parameter.dtype, device=parameter.device))
            owner: nn.Module = model.get_submodule(name.rpartition(".")[0])
            model._init_weights(owner)
    for linear in anatomy.biases:
        add_bias_(model, anatomy, linear)
    conform_(model, anatomy)
