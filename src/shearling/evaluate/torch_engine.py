"""A transformers model that is run on cells: on CUDA its decode steps replay a graph over a static cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shearling.captured import WARMUP, Captured, NotCapturable
from shearling.errors import ShearlingError
from shearling.evaluate.bench import Cell, Prefill
from shearling.evaluate.checks import check_length
from shearling.evaluate.decode import greedy_step
from shearling.evaluate.logits import evaluating, vocabulary
from shearling.evaluate.speed import now, static_step


@dataclass
class TorchEngine:
    """An ``Engine`` of a loaded model, on the device it is on; prompts are random and the same for a vocabulary."""

    name: str
    model: Any
    parameters: int
    disk_bytes: int
    weight_bytes: int | None
    note: str = ""
    runner: str = "transformers"

    def check(self, cell: Cell) -> None:
        check_length(self.model, cell.context + _room(cell, self._device), f"bench: {self.name}: context and steps")

    def prepare(self, cell: Cell) -> None:
        self._cell = cell
        shape = (cell.batch, cell.context)
        self._ids_BT = torch.randint(vocabulary(self.model), shape, generator=torch.Generator().manual_seed(0))
        with evaluating(self.model):
            self._step, self._rewind, self._last_B1 = self._steps()

    def prefill(self) -> Prefill:
        with evaluating(self.model):
            start = now(self._device)
            ids_BT = self._ids_BT.to(self._device)
            arrived = now(self._device)
            ids_B1, _ = greedy_step(self.model, ids_BT)
            read = now(self._device)
            ids_B1.tolist()
            return Prefill(read - arrived, now(self._device) - start)

    def decode(self) -> list[float]:
        with evaluating(self.model):
            self._rewind()
            return _step_seconds(self._step, self._cell.generate, self._device)

    def release(self) -> None:
        for name in ("_step", "_rewind", "_last_B1"):
            self.__dict__.pop(name, None)

    @property
    def _device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def _steps(self) -> tuple[Callable[[], None], Callable[[], None], Tensor]:
        """One decode step, what puts cache and last tokens back to the end of the prompts, and these tokens."""
        ids_BT = self._ids_BT.to(self._device)
        room = _room(self._cell, self._device)
        step, ids_B1, cache = static_step(self.model, ids_BT, room)
        rewind = _rewinder(cache, ids_B1)
        if self._device.type == "cuda":
            self._check_window(cache, ids_BT.shape[1], room)
            step = Captured(step)
            try:
                for _ in range(WARMUP + 1):
                    step()
            except NotCapturable as error:
                raise ShearlingError(f"bench: {self.name}: a decode step {error}") from error
        return step, rewind, ids_B1

    def _check_window(self, cache: Any, context: int, room: int) -> None:
        # a graph of steps before a window is full writes beyond it afterwards
        for layer in cache.layers:
            if layer.is_sliding and context < layer.max_cache_len < context + room:
                raise ShearlingError(
                    f"bench: {self.name}: steps after {context} tokens pass the sliding window of "
                    f"{layer.max_cache_len}; take a context of at least that, or fewer steps"
                )


def _room(cell: Cell, device: torch.device) -> int:
    return max(cell.generate, WARMUP + 1) if device.type == "cuda" else cell.generate


def _rewinder(cache: Any, ids_B1: Tensor) -> Callable[[], None]:
    """Puts a static cache back to as many tokens as it holds now; what lies beyond is masked, then overwritten."""
    first_B1 = ids_B1.clone()
    lengths = [(layer, layer.cumulative_length.clone()) for layer in cache.layers]
    # layers with a window count in Python too
    counts = [(layer, layer.cumulative_length_int) for layer in cache.layers if layer.is_sliding]

    def rewind() -> None:
        ids_B1.copy_(first_B1)
        for layer, length in lengths:
            layer.cumulative_length.copy_(length)
        for layer, count in counts:
            layer.cumulative_length_int = count

    return rewind


def _step_seconds(step: Callable[[], None], count: int, device: torch.device) -> list[float]:
    """Seconds of each of several steps; on CUDA between events, so that the host need not wait after each."""
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        for number, mark in enumerate(marks):
            if number:
                step()
            mark.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks)]
    times = []
    for _ in range(count):
        start = now(device)
        step()
        times.append(now(device) - start)
    return times
