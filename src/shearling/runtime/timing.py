"""How long a step takes on weights that no cache holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from shearling.errors import ShearlingError

#: copies of a weight that steps go round over, at least, and as many more as this much memory takes
COPIES, TURNED_OVER = 8, 3 * 2**26
#: of all ways of a CPU together, whose last cache is larger; and rounds that say which ways may be the fastest
CPU_COPIES, CPU_TURNED_OVER, TRIALS = (2, 64), 3 * 2**28, 3
#: how many times as slow as the fastest is not worth another round
_HOPELESS = 4


Way = TypeVar("Way", bound=Hashable)


class Timing(NamedTuple):
    """Seconds of one step: the median of the replays, and their tenth and ninetieth hundredths."""

    seconds: float
    low: float
    high: float


def rounds(size: int) -> int:
    """How many copies of ``size`` bytes leave nothing of one in a cache when its turn comes again."""
    return max(COPIES, -(-TURNED_OVER // size))


def cpu_rounds(size: int) -> int:
    """How many sets of copies a CPU's ways take, of ``size`` bytes a set: more than its caches hold, within limits."""
    least, most = CPU_COPIES
    return min(most, max(least, -(-CPU_TURNED_OVER // size)))


def timed_ways(
    ways: Mapping[Way, Sequence[Callable[[], object]]], device: torch.device, replays: int
) -> dict[Way, Timing]:
    """Times of a step of several ways, which take turns, as a device is slower when it has grown warm.

    On CUDA the steps of a way are one graph, so that launching is free. Ways that are many times as slow as the fastest
    are left out of most rounds. Raises ShearlingError for steps that cannot be captured.
    """
    if device.type != "cuda":
        return {way: summary(times) for way, times in interleaved(ways, replays).items()}
    graphs = {way: _captured(steps, device) for way, steps in ways.items()}
    times: dict[Way, list[float]] = {way: [] for way in ways}
    for graph in graphs.values():
        graph.replay()
    for count in (min(TRIALS, replays), max(0, replays - TRIALS)):
        least = min((min(found) for found in times.values() if found), default=0.0)
        hopeful = [way for way, found in times.items() if min(found, default=0.0) <= _HOPELESS * least]
        events = {
            way: [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
            for way in hopeful
        }
        for replay in range(count):
            for way, pairs in events.items():
                start, end = pairs[replay]
                start.record()
                graphs[way].replay()
                end.record()
        torch.cuda.synchronize(device)
        for way, pairs in events.items():
            times[way] += [start.elapsed_time(end) / 1000 / len(ways[way]) for start, end in pairs]
    return {way: summary(found) for way, found in times.items()}


def _captured(steps: Sequence[Callable[[], object]], device: torch.device) -> torch.cuda.CUDAGraph:
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
    return graph


def interleaved(ways: Mapping[Way, Sequence[Callable[[], object]]], replays: int) -> dict[Way, list[float]]:
    """Seconds of steps of several ways on a CPU.

    A step of each comes in turn, so that what else the machine does hits all alike. They begin at different steps, as
    two may read the same copy. Ways that are many times as slow as the fastest are left out of most rounds.
    """
    times: dict[Way, list[float]] = {way: [] for way in ways}
    for steps in ways.values():
        steps[-1]()
    for replay in range(replays):
        least = min((min(found) for found in times.values() if found), default=0.0)
        for place, (way, steps) in enumerate(ways.items()):
            if replay >= TRIALS and min(times[way]) > _HOPELESS * least:
                continue
            step = steps[(replay + place * len(steps) // len(ways)) % len(steps)]
            start = time.perf_counter()
            step()
            times[way].append(time.perf_counter() - start)
    return times


def summary(times: list[float]) -> Timing:
    """The median of seconds, and their tenth and ninetieth hundredths."""
    if len(times) == 1:
        return Timing(times[0], times[0], times[0])
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(statistics.median(times), tenths[0], tenths[-1])
