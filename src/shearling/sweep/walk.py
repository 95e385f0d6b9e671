"""The block walk: hidden states of all sequences pass one block at a time, only that block on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from shearling.anatomy import Anatomy, anatomy_of
from shearling.errors import ShearlingError

#: reads the input [tokens, width] of a linear inside a block
Tap = Callable[[Tensor], None]
#: reads a block's input and output, both [B, T, hidden]
Watch = Callable[[Tensor, Tensor], None]


class Walk:
    """A model's blocks with everything a block needs besides its hidden states.

    A walk begins with ``enter``. Blocks may live anywhere; ``on_device`` brings one over and puts its own tensors back
    afterwards.
    """

    def __init__(self, model: Any, tokens: Tensor, *, batch: int, device: torch.device | str | None = None) -> None:
        self.model, self.tokens = model, tokens
        self.anatomy: Anatomy = anatomy_of(model.config)
        self.batch = min(batch, len(tokens))
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        self.blocks: list[nn.Module] = list(model.get_submodule(self.anatomy.family.blocks))
        self._arguments: dict[tuple[int, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}

    @torch.no_grad()
    def enter(self) -> Tensor:
        """States [num, T, hidden] that the first block reads, on ``device``; each call gives a tensor of its own.

        Runs everything before the first block, and keeps what every block is called with.
        """
        family = self.anatomy.family
        home = next(self.model.parameters()).device
        recorders = [_Recorder(block) for block in self.blocks]
        moved: dict[int, Any] = {}
        entry = None
        with (
            _replaced(self.model, family.blocks, nn.ModuleList(recorders)),
            _replaced(self.model, family.final_norm, nn.Identity()),
        ):
            for rows in self.slices():
                ids = self.tokens[rows].to(home)
                self.model.base_model(input_ids=ids, use_cache=False)
                first = recorders[0].states
                if entry is None:
                    shape = (len(self.tokens), *first.shape[1:])
                    entry = torch.empty(shape, dtype=first.dtype, device=self.device)
                entry[rows] = first.to(self.device)
                for layer, recorder in enumerate(recorders):
                    if (layer, len(ids)) not in self._arguments:
                        self._arguments[layer, len(ids)] = _to(recorder.arguments, self.device, moved)
        assert entry is not None
        return entry

    @torch.no_grad()
    def run(self, layer: int, x: Tensor, block: nn.Module | None = None) -> Tensor:
        """Output of a block (or of a stand-in for it) on states [B, T, hidden]; B must be a batch size of the walk."""
        return self.run_with_grad(layer, x, block)

    def run_with_grad(self, layer: int, x: Tensor, block: nn.Module | None = None) -> Tensor:
        """``run`` that records the graph."""
        args, kwargs = self._arguments[layer, len(x)]
        return (self.blocks[layer] if block is None else block)(x, *args, **kwargs)

    def slices(self) -> Iterator[slice]:
        """Rows of each batch in turn."""
        for start in range(0, len(self.tokens), self.batch):
            yield slice(start, min(start + self.batch, len(self.tokens)))

    def advance(
        self,
        layer: int,
        states: Tensor,
        *,
        block: nn.Module | None = None,
        taps: Mapping[str, Tap] | None = None,
        watch: Watch | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Pass all states [num, T, hidden] through a block, in place unless ``out`` is given.

        ``taps`` read the inputs of linears inside the block by inner name. Raises ShearlingError, naming the block,
        where an output is not finite.
        """
        out = states if out is None else out
        module = self.blocks[layer] if block is None else block
        with tapped(module, taps or {}):
            for rows in self.slices():
                x = states[rows]
                y = self.run(layer, x, module)
                if watch is not None:
                    watch(x, y)
                out[rows] = y
        # in float32: the sum of many finite half-precision numbers may overflow
        if not torch.isfinite(out.sum(dtype=torch.float32)):
            raise ShearlingError(
                f"{self.anatomy.path(layer)}: its output is not finite on the calibration text; "
                "look for NaN or overflow in its weights, or use dtype float32 or bfloat16"
            )
        return out

    def read(self, layer: int, states: Tensor, taps: Mapping[str, Tap], block: nn.Module | None = None) -> None:
        """Let taps read the inputs of linears inside a block; a pass ends with the last one, and no state changes."""
        module = self.blocks[layer] if block is None else block
        left: set[str] = set()

        def reading(name: str, tap: Tap) -> Tap:
            def read(x: Tensor) -> None:
                tap(x)
                left.discard(name)
                if not left:
                    raise _AllRead

            return read

        with tapped(module, {name: reading(name, tap) for name, tap in taps.items()}):
            for rows in self.slices():
                left.update(taps)
                with suppress(_AllRead):
                    self.run(layer, states[rows], module)

    @contextmanager
    def on_device(self, layer: int) -> Iterator[nn.Module]:
        """The block with its tensors on the device; its own come back unchanged."""
        block = self.blocks[layer]
        own = [(t, t.data) for t in (*block.parameters(), *block.buffers()) if t.device != self.device]
        try:
            for tensor, data in own:
                tensor.data = data.to(self.device, non_blocking=True)
            yield block
        finally:
            for tensor, data in own:
                tensor.data = data


class _AllRead(Exception):
    """Every tap has read what it wanted of a pass."""


@contextmanager
def tapped(block: nn.Module, taps: Mapping[str, Tap]) -> Iterator[None]:
    """Let taps read the inputs, flattened to [tokens, width], of linears inside a block."""

    def hook(tap: Tap) -> Callable[..., None]:
        return lambda module, args: tap(args[0].flatten(0, -2))

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(tap)) for name, tap in taps.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(nn.Module):
    """Stands in for a block: remembers what it is called with and passes the states through."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block
        self.states: Any = None
        self.arguments: Any = None

    def __getattr__(self, name: str) -> Any:
        # the stock loop asks blocks for facts such as their attention type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.states, self.arguments = states, (args, kwargs)
        return states


@contextmanager
def _replaced(model: nn.Module, path: str | None, module: nn.Module) -> Iterator[None]:
    if path is None:
        yield
        return
    parent, _, leaf = path.rpartition(".")
    owner = model.get_submodule(parent)
    original = getattr(owner, leaf)
    setattr(owner, leaf, module)
    try:
        yield
    finally:
        setattr(owner, leaf, original)


def _to(value: Any, device: torch.device, moved: dict[int, Any]) -> Any:
    """Nested arguments with every tensor on the device, each moved once."""
    match value:
        case Tensor():
            if id(value) not in moved:
                # the original is kept too, so that its id is not given to another tensor
                moved[id(value)] = (value, value.to(device))
            return moved[id(value)][1]
        case dict():
            return {key: _to(item, device, moved) for key, item in value.items()}
        case tuple() | list():
            return type(value)(_to(item, device, moved) for item in value)
        case _:
            return value
