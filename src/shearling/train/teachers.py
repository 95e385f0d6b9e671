"""A teacher: a model that a trained one follows, run once for everything that is taken from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shearling.errors import ShearlingError
from shearling.train.flops import forward_flops
from shearling.train.head import Head, blocks_of, hidden_states, output_head


class Taught(NamedTuple):
    """What a teacher says of a micro-batch: ``hidden`` [B, T, D] before its head, ``blocks`` after the asked blocks."""

    hidden: Tensor
    blocks: dict[int, Tensor]


class Teacher:
    """A causal language model, run once a micro-batch for all policies that hold this object.

    It is put into evaluation mode and never changed. It runs on its own device, or ``offloaded`` on the one that is
    given here; ``compiled`` around the training makes it faster, ``in_dtype`` makes a copy in another precision.
    """

    def __init__(self, model: Any, *, device: torch.device | None = None) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device if device is None else device
        self._blocks: set[int] = set()
        self._users = self._served = 0
        self._ids: Tensor | None = None
        self._taught: Taught | None = None

    def follow(self, student: Any, blocks: Iterable[int] = ()) -> None:
        """Make ready to teach one more policy, which asks for the outputs of ``blocks``.

        Raises ShearlingError where the student is the teacher itself or has the larger vocabulary.
        """
        if self.model is student:
            raise ShearlingError("teacher: is the model itself; load a second copy")
        own, theirs = output_head(student).weight.shape[0], output_head(self.model).weight.shape[0]
        if own > theirs:
            raise ShearlingError(
                f"teacher: vocabulary of {theirs}, the model's is {own}; it must be the same or begin with the model's"
            )
        self._users += 1
        self._blocks.update(blocks)

    def leave(self) -> None:
        """One policy less; the last one leaves nothing behind."""
        self._users -= 1
        if not self._users:
            self._blocks.clear()
            self._ids = self._taught = None

    @torch.no_grad()
    def states(self, ids: Tensor, position_ids: Tensor | None = None) -> Taught:
        """What the teacher says of ``ids`` [B, T]; the same tensor object is run once, until all policies have read.

        ``position_ids`` as in ``hidden_states``.
        """
        if self._ids is not ids or self._taught is None:
            # what is left of a micro-batch that was given up goes before the next one comes
            self._ids, self._taught, self._served = ids, None, 0
            wanted = {}
            if self._blocks:
                modules = blocks_of(self.model)
                wanted = {layer: modules[layer] for layer in self._blocks}
            with outputs_of(wanted) as outputs:
                self._taught = Taught(hidden_states(self.model, ids, position_ids), outputs)
        taught = self._taught
        self._served += 1
        if self._served >= self._users:
            self._ids = self._taught = None
        return taught

    @property
    def resident(self) -> bool:
        """Whether its weights lie where it runs."""
        return all(p.device == self.device for p in self.model.parameters())

    def flops_per_token(self, length: int) -> float:
        """What one of the policies adds by it, so that all together count its forward pass once."""
        return forward_flops(self.model, length) / self._users

    def head(self) -> Head:
        """The output head, on the teacher's device."""
        weight, bias, softcap = output_head(self.model)
        # an offloaded head visits; any other is there already
        weight = weight.detach().to(self.device, non_blocking=True)
        return Head(weight, None if bias is None else bias.detach().to(self.device, non_blocking=True), softcap)


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model with its parameters in ``dtype``: itself, or a copy; buffers keep their precision."""
    if all(p.dtype == dtype for p in model.parameters()):
        return model
    # buffers stay, because rotary frequencies in bfloat16 put far positions elsewhere
    return copied(model, lambda weight: weight.to(dtype, copy=True))


def copied(model: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of the model whose parameters, frozen, are what ``change`` makes of its own."""
    # deepcopy takes what it finds in the memo, so that no weight is copied as it is
    memo: dict[int, Any] = {id(p): nn.Parameter(change(p.detach()), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


@contextmanager
def outputs_of(blocks: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Within, every forward pass leaves the states [B, T, D] after these blocks in the dictionary."""
    outputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[layer] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [block.register_forward_hook(keep(layer)) for layer, block in blocks.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
