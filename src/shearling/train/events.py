"""The running quantities in the events of training."""

from __future__ import annotations

import math
import time
from typing import Any

from torch import Tensor

from shearling.train.resume import Counters
from shearling.train.settings import TrainSettings


class Clock:
    """Counts the seconds of a run, and the pace since the last report."""

    def __init__(self, counters: Counters) -> None:
        self._last = time.perf_counter()
        self._reported = (counters.step, counters.seconds)

    def tick(self, counters: Counters) -> None:
        now = time.perf_counter()
        counters.seconds += now - self._last
        self._last = now

    def seconds_per_step(self, counters: Counters) -> float:
        step, seconds = self._reported
        self._reported = (counters.step, counters.seconds)
        return (counters.seconds - seconds) / (counters.step - step)


def report(event: dict[str, Any], counters: Counters, settings: TrainSettings, clock: Clock) -> dict[str, Any]:
    """The event with numbers for tensors, the mean loss since the last report, and what has run up."""
    since = (counters.step - 1) % settings.log_every + 1
    finite = [loss for loss in counters.losses[-since:] if math.isfinite(loss)]
    pace = clock.seconds_per_step(counters)
    numbers = {key: float(value) if isinstance(value, Tensor) else value for key, value in event.items()}
    return {
        **numbers,
        "loss": sum(finite) / len(finite),
        "tokens": counters.step * settings.tokens_per_step,
        "tokens_per_second": settings.tokens_per_step / pace,
        "eta_seconds": pace * (settings.steps - counters.step),
    }
