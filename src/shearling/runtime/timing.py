"""How long a step takes on weights that no cache holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from shearling.errors import ShearlingError

#: copies of a weight that steps go round over, at least, and as many more as this much memory takes
COPIES, TURNED_OVER = 8, 3 * 2**26


class Timing(NamedTuple):
    """Seconds of one step: the median of the replays, and their tenth and ninetieth hundredths."""

    seconds: float
    low: float
    high: float


def rounds(size: int) -> int:
    """How many copies of ``size`` bytes leave nothing of one in a cache when its turn comes again."""
    return max(COPIES, -(-TURNED_OVER // size))


def timed(steps: Sequence[Callable[[], object]], device: torch.device, replays: int = 100) -> Timing:
    """Time of one of several steps, carried out one after another; on CUDA as one graph, so that launching is free.

    Raises ShearlingError for steps that cannot be captured.
    """
    if device.type != "cuda":
        times = []
        for _ in range(replays):
            start = time.perf_counter()
            for step in steps:
                step()
            times.append((time.perf_counter() - start) / len(steps))
        return _summary(times)
    # compiles, plans and allocates, on a stream of its own as capturing wants it
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for step in steps[:2]:
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for step in steps:
                step()
    except RuntimeError as error:
        raise ShearlingError(f"timing: a step cannot become a CUDA graph ({str(error).splitlines()[0]})") from error
    graph.replay()
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(replays)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize(device)
    return _summary([a.elapsed_time(b) / 1000 / len(steps) for a, b in zip(starts, ends, strict=True)])


def _summary(times: list[float]) -> Timing:
    if len(times) == 1:
        return Timing(times[0], times[0], times[0])
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(statistics.median(times), tenths[0], tenths[-1])
