"""A model whose weights lie in host memory and visit the device block by block while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shearling.train.head import blocks_of

#: bytes; what kernels may expect of an address, and what the views below need of an offset
_ALIGNMENT = 256


@contextmanager
def offloaded(model: Any, device: torch.device | str) -> Iterator[None]:
    """Within, a causal language model runs on a device (forward only) that holds two of its blocks at a time.

    Its weights lie in host memory, pinned for CUDA; while one block computes, the next one is copied on a stream of
    its own. Embeddings are looked up on the host; the output head stays there for its reader to move. Afterwards every
    tensor is back where it was. Not for a model under torch.compile.
    """
    device = torch.device(device)
    blocks = blocks_of(model)
    tensors = [*model.parameters(), *model.buffers()]
    homes = [(tensor, tensor.device) for tensor in tensors]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    lookups = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    on_host = {id(t) for module in (*lookups, model.get_output_embeddings()) for t in _tensors(module)}
    in_blocks = {id(t) for block in blocks for t in _tensors(block)}
    with ExitStack() as stack:
        stack.callback(_put_back, homes)
        # autocast would keep a cast copy of every weight that asks for a gradient
        for parameter, flag in flags:
            stack.callback(parameter.requires_grad_, flag)
            parameter.requires_grad_(False)
        for tensor in tensors:
            if id(tensor) in on_host:
                tensor.data = _pinned(tensor.data.cpu(), device)
            elif id(tensor) not in in_blocks:
                tensor.data = tensor.data.to(device)
        visits = _Visits([_Packed(block, device) for block in blocks], device)
        stack.callback(visits.end)
        for module in lookups:
            stack.callback(module.register_forward_pre_hook(_to_host, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(lambda module, args, output: output.to(device)).remove)
        for layer, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(visits.before(layer)).remove)
            # also after an error, so that no block is left on the device
            stack.callback(block.register_forward_hook(visits.after(layer), always_call=True).remove)
        yield


class _Packed:
    """A block's tensors, one after the other in one buffer of host memory, so that a single copy moves them."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self._tensors = _tensors(block)
        self._layout: list[tuple[int, int, torch.dtype, torch.Size]] = []
        self.size = 0
        for tensor in self._tensors:
            length = tensor.numel() * tensor.element_size()
            self._layout.append((self.size, length, tensor.dtype, tensor.shape))
            self.size += -(-length // _ALIGNMENT) * _ALIGNMENT
        self.host = torch.empty(self.size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for tensor, view in zip(self._tensors, self._views(self.host), strict=True):
            view.copy_(tensor.data)
        self.bind(self.host)

    def bind(self, buffer: Tensor) -> None:
        """Let the block's tensors be those in a buffer."""
        for tensor, view in zip(self._tensors, self._views(buffer), strict=True):
            tensor.data = view

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [buffer[start : start + length].view(dtype).view(shape) for start, length, dtype, shape in self._layout]


class _Visits:
    """Two places on the device, and who is in them: blocks with an even number use the first, others the second."""

    def __init__(self, blocks: list[_Packed], device: torch.device) -> None:
        self._blocks, self._device = blocks, device
        # of a fixed size: the host runs ahead, and would fill the device with blocks that are not yet due
        self._places = [torch.empty(max(b.size for b in blocks), dtype=torch.uint8, device=device) for _ in range(2)]
        self._guests = [-1, -1]
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def before(self, layer: int) -> Any:
        """A hook that brings a block over, and sends for the next."""

        def hook(module: nn.Module, args: Any) -> None:
            self._fetch(layer)
            if self._side is not None:
                # up to here the side stream has only this block's copy to do
                torch.cuda.current_stream(self._device).wait_stream(self._side)
            self._blocks[layer].bind(self._places[layer % 2])
            if layer + 1 < len(self._blocks):
                self._fetch(layer + 1)

        return hook

    def after(self, layer: int) -> Any:
        """A hook that leaves a block in host memory."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._blocks[layer].bind(self._blocks[layer].host)

        return hook

    def end(self) -> None:
        """Wait for copies under way, before their memory goes."""
        if self._side is not None:
            torch.cuda.synchronize(self._device)

    def _fetch(self, layer: int) -> None:
        place = layer % 2
        if self._guests[place] == layer:
            return
        self._guests[place] = layer
        packed = self._blocks[layer]
        there = self._places[place][: packed.size]
        if self._side is None:
            there.copy_(packed.host)
            return
        # whoever was in this place has been launched by now, and the block that runs meanwhile has not
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            there.copy_(packed.host, non_blocking=True)


def _to_host(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    def moved(value: Any) -> Any:
        return value.cpu() if isinstance(value, Tensor) else value

    return tuple(map(moved, args)), {name: moved(value) for name, value in kwargs.items()}


def _put_back(homes: list[tuple[Tensor, torch.device]]) -> None:
    for tensor, device in homes:
        # a copy, so that the buffer that a whole block shares is given up
        tensor.data = tensor.data.to(device, copy=True)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
