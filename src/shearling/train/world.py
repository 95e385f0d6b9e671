"""The processes that train together: one on a laptop, as many as ``torchrun`` starts elsewhere."""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

#: what one process does alone (measuring, scoring) may take this long while the others wait
PATIENCE = timedelta(hours=12)

#: what a launcher tells its processes
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process is number ``rank`` of ``size``.

    ``talk`` and ``files`` are groups on the CPU for what is said beside training; checkpoints have one of their own,
    because they may be written by another thread at the same time.
    """

    rank: int = 0
    size: int = 1
    talk: dist.ProcessGroup | None = None
    files: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process' equal part of the rows of a batch."""
        return rows.tensor_split(self.size)[self.rank]

    def sum_(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean_(self, values: Tensor) -> Tensor:
        """The mean over all processes, in place."""
        return values if self.size == 1 else self.sum_(values).div_(self.size)

    @property
    def beside(self) -> tuple[int, ...]:
        """What makes a seed of this process' own; nothing in the first one."""
        return (self.rank,) if self.rank else ()

    def agree(self, value: Any) -> Any:
        """The first process' value, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.talk)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process."""
        if self.size == 1:
            return flag
        number = torch.tensor(int(flag))
        dist.all_reduce(number, group=self.talk)
        return bool(number)

    def wait(self) -> None:
        """Until every process is here."""
        self.agree(None)


def join() -> World:
    """The world of this process: what ``torchrun`` or the caller set up, or itself alone."""
    if not dist.is_available():
        return World()
    if all(name in os.environ for name in _LAUNCHED) and not dist.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend, timeout=PATIENCE)
        # not earlier: a second group would find the addresses of the first
        atexit.register(_leave)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return World()
    return _world(dist.group.WORLD)


@functools.cache
def _world(group: dist.ProcessGroup) -> World:
    """The world of a group, whose groups beside it are made once."""
    return World(dist.get_rank(), dist.get_world_size(), _on_cpu(), _on_cpu())


def _leave() -> None:
    # a group that outlives the others may end with its threads running, which aborts the process
    _world.cache_clear()
    dist.destroy_process_group()


def _on_cpu() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    # a number would say that this process is not in it
    assert isinstance(group, dist.ProcessGroup)
    return group


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all gradients, of which some may be sharded."""
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    if not sharded:
        return torch.nn.utils.get_total_norm(whole)
    norm = torch.nn.utils.get_total_norm(sharded)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return torch.hypot(norm, torch.nn.utils.get_total_norm(whole).to(norm)) if whole else norm


def clip_(gradients: Sequence[Tensor], bound: float, norm: Tensor) -> None:
    """Scale the gradients so that their norm, given, is at most ``bound``.

    As torch's ``clip_grads_with_norm_``, which takes the host longer: it sorts them by device and type.
    """
    factor = torch.clamp(bound / (norm + 1e-6), max=1.0)
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    if whole:
        torch._foreach_mul_(whole, factor)
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            gradient.mul_(factor)


def average_whole_(world: World, gradients: Sequence[Tensor]) -> None:
    """Average the gradients of parameters that every process holds whole; sharded ones are averaged already."""
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    if world.size == 1 or not whole:
        return
    flat = world.sum_(torch.cat([g.flatten() for g in whole])).div_(world.size)
    for gradient, part in zip(whole, flat.split([g.numel() for g in whole]), strict=True):
        gradient.copy_(part.view_as(gradient))
