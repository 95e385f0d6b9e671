"""What one step of a model of random weights takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from shearling.captured import WARMUP, Captured, NotCapturable
from shearling.errors import ShearlingError
from shearling.evaluate.checks import check_length
from shearling.evaluate.speed import now, static_step

#: steps before those that count: those before the graph, and its capture
UNTIMED = WARMUP + 1
#: steps that count, and how many do where they take longer than a second
MOST, FEWEST = 20, 3
#: bytes written between two steps, where the device does not tell the size of its cache
FLUSH = 64 * 2**20


@dataclass(frozen=True)
class Workload:
    """What is timed: one token more in each of ``batch`` rows of ``context`` cached ones, or these read at once."""

    phase: Literal["decode", "prefill"] = "decode"
    batch: int = 1
    context: int = 1024


def step_milliseconds(config: Any, workload: Workload, dtype: torch.dtype, device: torch.device) -> float:
    """Lower quartile over steps of a model of random weights, made from a config; on CUDA by a graph.

    Where nothing else runs that is the median; other work on the device only ever adds. Caches are emptied before each
    step: in a whole model the other blocks do that. Raises ShearlingError for more tokens than learned positions, and
    for a step that no graph can hold.
    """
    with torch.device(device), torch.inference_mode():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        step = _step(model, workload)
        flushed = torch.empty(_flush_bytes(device), dtype=torch.uint8)
        times: list[float] = []
        try:
            for number in range(UNTIMED + MOST):
                flushed.fill_(number)
                start = now(device)
                step()
                times.append(now(device) - start)
                if len(times) >= UNTIMED + FEWEST and sum(times[UNTIMED:]) > 1:
                    break
        except NotCapturable as error:
            raise ShearlingError(f"latency: a step of {config.model_type} {error}") from error
    return 1e3 * statistics.quantiles(times[UNTIMED:], n=4)[0]


def _step(model: Any, workload: Workload) -> Callable[[], None]:
    ids_BT = torch.randint(model.config.vocab_size, (workload.batch, workload.context))
    if workload.phase == "decode":
        check_length(model, workload.context + UNTIMED + MOST, "latency: context and steps")
        step, *_ = static_step(model, ids_BT, UNTIMED + MOST)
    else:
        check_length(model, workload.context, "latency: context")
        step = partial(_read, model, ids_BT)
    return Captured(step) if ids_BT.device.type == "cuda" else step


def _read(model: Any, ids_BT: Tensor) -> None:
    model(input_ids=ids_BT, use_cache=False, logits_to_keep=1)


def _flush_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return FLUSH
    return max(FLUSH, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
