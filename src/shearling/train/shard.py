"""Parameters shared out over the processes by FSDP2, and put together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from shearling.train.head import blocks_of
from shearling.train.world import World

#: what FSDP leaves on a module beside hooks
_MARKS = ("__composable_api", "_is_fsdp_managed_module", "_fsdp_use_orig_params")
_WITHIN = "_shearling_within"
Result = TypeVar("Result")


def within(model: nn.Module, work: Callable[[], Result]) -> Result:
    """Do a piece of work as part of the model's forward pass, so that whatever it reads of the model is whole."""
    entry: Callable[[Callable[[], Result]], Result] | None = getattr(model, _WITHIN, None)
    return work() if entry is None else entry(work)


class Sharding:
    """A model whose parameters are spread over the processes of a world; with one process nothing changes.

    Blocks are gathered one after the other as they run, the rest (embedding, last norm, head) for as long as
    ``within`` works. Parameters become DTensors, so whoever holds some must look them up anew. ``compute`` is the type
    in which blocks are gathered and run, None their own; gradients are averaged in float32.
    """

    def __init__(self, model: Any, world: World, compute: torch.dtype | None) -> None:
        self._model = model
        self._plain: dict[nn.Module, tuple[type, dict[str, Any]]] = {}
        if world.size == 1:
            return
        for module in model.modules():
            hooks = {key: dict(value) for key, value in vars(module).items() if key.endswith("_hooks")}
            self._plain[module] = (type(module), hooks)
        mesh = init_device_mesh(next(model.parameters()).device.type, (world.size,))
        precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, mp_policy=precision)
        fully_shard(model, mesh=mesh, mp_policy=precision)
        setattr(model, _WITHIN, lambda work: work())
        register_fsdp_forward_method(model, _WITHIN)

    @torch.no_grad()
    def undo(self) -> None:
        """Give every process the whole model again, stock as it was; optimizers over it are worth nothing then."""
        whole: dict[int, nn.Parameter] = {}
        for module in self._plain:
            for name, parameter in module._parameters.items():
                if isinstance(parameter, DTensor):
                    if id(parameter) not in whole:
                        whole[id(parameter)] = nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
                    module._parameters[name] = whole[id(parameter)]
        for module, (kind, hooks) in self._plain.items():
            module.__class__ = kind
            _module_state_mapping.pop(module, None)
            for key in [key for key in vars(module) if key.startswith(_MARKS)]:
                delattr(module, key)
            for key, content in hooks.items():
                # in place, since whoever holds a handle to a hook finds it in this very dictionary
                vars(module)[key].clear()
                vars(module)[key].update(content)
        if self._plain:
            delattr(self._model, _WITHIN)
        self._plain = {}
