"""The running quantities in the events of training."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from shearling.train.resume import Counters
from shearling.train.settings import TrainSettings


class Clock:
    """Counts the seconds of a run, and its pace since the last report.

    ``flops`` are those of one token; ``peak`` is what all devices together could do in a second, None where that is
    not known.
    """

    def __init__(self, counters: Counters, flops: float, peak: float | None) -> None:
        self._last = time.perf_counter()
        self._reported = (counters.step, counters.seconds)
        self._flops, self._peak = flops, peak

    def tick(self, counters: Counters) -> None:
        now = time.perf_counter()
        counters.seconds += now - self._last
        self._last = now

    def report(self, event: dict[str, Any], counters: Counters, settings: TrainSettings) -> dict[str, Any]:
        """The event with numbers for tensors, the mean loss since the last report, and what has run up."""
        since = (counters.step - 1) % settings.log_every + 1
        finite = [loss for loss in counters.losses[-since:] if math.isfinite(loss)]
        step, seconds = self._reported
        self._reported = (counters.step, counters.seconds)
        pace = (counters.seconds - seconds) / (counters.step - step)
        speed = settings.tokens_per_step / pace
        used = {} if self._peak is None else {"flops_utilisation": speed * self._flops / self._peak}
        return {
            **_numbers(event),
            "loss": sum(finite) / len(finite),
            "tokens": counters.step * settings.tokens_per_step,
            "tokens_per_second": speed,
            **used,
            "eta_seconds": pace * (settings.steps - counters.step),
        }


def _numbers(event: dict[str, Any]) -> dict[str, Any]:
    """The event with numbers for tensors of one element, which the host waits for once."""
    tensors = {key: value.detach().reshape(()) for key, value in event.items() if isinstance(value, Tensor)}
    if not tensors:
        return event
    device = next(iter(tensors.values())).device
    values = torch.stack([value.to(device, torch.float64) for value in tensors.values()]).tolist()
    return event | dict(zip(tensors, values, strict=True))
