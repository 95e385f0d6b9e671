"""Steps of fixed shapes as CUDA graphs: launching small kernels one by one takes longer than they do."""

from __future__ import annotations

from collections.abc import Callable

import torch

#: calls carried out as they are, before one is captured
WARMUP = 3


class NotCapturable(RuntimeError):
    """A step waits for the GPU, or does something else that a graph cannot hold."""


class Captured:
    """A step that reads and writes the same tensors at every call, carried out by replaying a CUDA graph.

    The first ``WARMUP`` calls run as they are, on a stream of their own; the one after captures; every call carries
    the step out once. Whatever changes between calls must be a tensor on the GPU. Raises NotCapturable.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step
        self._calls = 0
        self._side = torch.cuda.Stream()
        self._graph = torch.cuda.CUDAGraph()

    def __call__(self) -> None:
        self._calls += 1
        if self._calls <= WARMUP:
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                self._step()
            torch.cuda.current_stream().wait_stream(self._side)
            return
        if self._calls == WARMUP + 1:
            # what is captured is not carried out
            try:
                with torch.cuda.graph(self._graph):
                    self._step()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise NotCapturable(f"cannot become a CUDA graph: {str(error).splitlines()[0]}") from error
        self._graph.replay()
