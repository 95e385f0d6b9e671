"""How fast a model reads and writes, and what memory that takes."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from shearling.captured import WARMUP, Captured
from shearling.errors import ShearlingError
from shearling.evaluate.checks import check_length
from shearling.evaluate.decode import greedy_step
from shearling.evaluate.logits import evaluating, vocabulary


@dataclass(frozen=True)
class Speed:
    """Medians over the repeats, in tokens a second over the whole batch.

    ``peak_bytes`` is what the CUDA allocator held at most while measuring; on a CPU it is the process' peak
    resident memory since it started.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_bytes: int
    device: str
    prompt: int
    generate: int
    batch: int
    repeats: int


def speed(
    model: PreTrainedModel,
    *,
    prompt: int,
    generate: int,
    batch: int = 1,
    repeats: int = 3,
    seed: int = 0,
    captured: bool = False,
) -> Speed:
    """Speed of reading ``batch`` random prompts of ``prompt`` tokens, then of ``generate`` cached greedy steps.

    One unmeasured run comes first. The device is synchronised around both timings; end tokens are ignored. With
    ``captured`` (CUDA alone) the steps replay a CUDA graph over a static cache, as serving engines do: otherwise a
    large GPU mostly waits for Python.

    Raises ShearlingError for sizes below 1, for more tokens than learned positions, and for a capture without CUDA.
    """
    for name, value in (("prompt", prompt), ("generate", generate), ("batch", batch), ("repeats", repeats)):
        if value < 1:
            raise ShearlingError(f"speed: {name} {value} must be at least 1")
    check_length(model, prompt + generate, "speed: prompt and continuation")
    device = model.get_input_embeddings().weight.device
    if captured and device.type != "cuda":  # pyrefly: ignore[missing-attribute]
        raise ShearlingError(f"speed: captured steps need a model on CUDA, this one is on {device}")
    generator = torch.Generator().manual_seed(seed)
    # pyrefly: ignore[no-matching-overload]
    ids_BT = torch.randint(vocabulary(model), (batch, prompt), generator=generator).to(device)
    with evaluating(model):
        _timed_run(model, ids_BT, generate, captured)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = [_timed_run(model, ids_BT, generate, captured) for _ in range(repeats)]
    return Speed(
        prefill_tokens_per_second=batch * prompt / statistics.median(prefill for prefill, _ in times),
        decode_tokens_per_second=batch * generate / statistics.median(decode for _, decode in times),
        peak_bytes=_peak_bytes(device),  # pyrefly: ignore[bad-argument-type]
        device=device_name(device),  # pyrefly: ignore[bad-argument-type]
        prompt=prompt,
        generate=generate,
        batch=batch,
        repeats=repeats,
    )


def _timed_run(model: PreTrainedModel, ids_BT: Tensor, generate: int, captured: bool) -> tuple[float, float]:
    """Seconds of one prefill and of the decode steps after it."""
    start = now(ids_BT.device)
    ids_B1, cache = greedy_step(model, ids_BT)
    read = now(ids_BT.device) - start
    if captured:
        step, _ = captured_step(model, ids_BT, WARMUP + 1 + generate)
        for _ in range(WARMUP + 1):
            step()
        start = now(ids_BT.device)
        for _ in range(generate):
            step()
    else:
        start = now(ids_BT.device)
        for _ in range(generate):
            ids_B1, cache = greedy_step(model, ids_B1, cache)
    return read, now(ids_BT.device) - start


def captured_step(model: PreTrainedModel, ids_BT: Tensor, calls: int) -> tuple[Captured, Tensor]:
    """Greedy steps after a prompt, captured in a CUDA graph, and the tokens [B, 1] that each of ``calls`` renews."""
    step, ids_B1, _ = static_step(model, ids_BT, calls)
    return Captured(step), ids_B1


def static_step(model: PreTrainedModel, ids_BT: Tensor, calls: int) -> tuple[Callable[[], None], Tensor, StaticCache]:
    """Greedy steps after a prompt, the tokens [B, 1] that each renews, and their cache with room for ``calls``."""
    cache = StaticCache(config=model.config, max_cache_len=ids_BT.shape[1] + calls)
    ids_B1, _ = greedy_step(model, ids_BT, cache)

    def step() -> None:
        ids_B1.copy_(greedy_step(model, ids_B1, cache)[0])

    return step, ids_B1, cache


def now(device: torch.device) -> float:
    """Seconds on a clock, read when the device is done."""
    if device.type != "cpu":
        # kernels run behind the caller's back; a clock read without waiting would time their launch
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if platform.system() == "Windows":
        return psutil.Process().memory_info().peak_wset  # pyrefly: ignore[missing-attribute]
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    """What timings belong to."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    return str(device)
