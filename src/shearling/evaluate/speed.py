"""How fast a model reads and writes, and what memory that takes."""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

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
    model: PreTrainedModel, *, prompt: int, generate: int, batch: int = 1, repeats: int = 3, seed: int = 0
) -> Speed:
    """Speed of reading ``batch`` random prompts of ``prompt`` tokens, then of ``generate`` cached greedy steps.

    One unmeasured run comes first. The device is synchronised around both timings; end tokens are ignored.

    Raises ShearlingError for sizes below 1 and for more tokens than learned positions.
    """
    for name, value in (("prompt", prompt), ("generate", generate), ("batch", batch), ("repeats", repeats)):
        if value < 1:
            raise ShearlingError(f"speed: {name} {value} must be at least 1")
    check_length(model, prompt + generate, "speed: prompt and continuation")
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(seed)
    # pyrefly: ignore[no-matching-overload]
    ids_BT = torch.randint(vocabulary(model), (batch, prompt), generator=generator).to(device)
    with evaluating(model):
        _timed_run(model, ids_BT, generate)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = [_timed_run(model, ids_BT, generate) for _ in range(repeats)]
    return Speed(
        prefill_tokens_per_second=batch * prompt / statistics.median(prefill for prefill, _ in times),
        decode_tokens_per_second=batch * generate / statistics.median(decode for _, decode in times),
        peak_bytes=_peak_bytes(device),  # pyrefly: ignore[bad-argument-type]
        device=_device_name(device),  # pyrefly: ignore[bad-argument-type]
        prompt=prompt,
        generate=generate,
        batch=batch,
        repeats=repeats,
    )


def _timed_run(model: PreTrainedModel, ids_BT: Tensor, generate: int) -> tuple[float, float]:
    """Seconds of one prefill and of the decode steps after it."""
    start = _now(ids_BT.device)
    ids_B1, cache = greedy_step(model, ids_BT)
    read = _now(ids_BT.device)
    for _ in range(generate):
        ids_B1, cache = greedy_step(model, ids_B1, cache)
    return read - start, _now(ids_BT.device) - read


def _now(device: torch.device) -> float:
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


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    return str(device)
