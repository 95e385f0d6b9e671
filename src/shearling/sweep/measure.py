"""One dense sweep: the statistics of every block, kept on disk block by block."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from shearling.errors import ShearlingError
from shearling.plan import write_tensors
from shearling.sweep.statistics import Angles, BlockStatistics, InputStatistics, Moments
from shearling.sweep.walk import Walk

Event = dict[str, Any]


def measure(
    walk: Walk,
    *,
    ffn_gram: bool = False,
    attention_gram: bool = False,
    cache: Path | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> list[BlockStatistics]:
    """Statistics of every block on the dense model's own states: one forward pass.

    With ``cache`` (a folder made for this model, text and choice of statistics: see ``fingerprint``) a finished
    block is written there; a block found there is only run, not measured, and none is run after the last missing one.
    """
    family, states = walk.anatomy.family, walk.enter()
    files = [None if cache is None else cache / f"block-{layer:04d}.safetensors" for layer in range(len(walk.blocks))]
    missing = [layer for layer, file in enumerate(files) if file is None or not file.exists()]
    result = []
    for layer, file in enumerate(files):
        start = time.perf_counter()
        if layer not in missing:
            assert file is not None
            result.append(_read(file))
            if missing and layer < missing[-1]:
                with walk.on_device(layer):
                    walk.advance(layer, states)
            continue
        angles, ffn, attention = Angles(), Moments(ffn_gram), Moments(attention_gram)
        with walk.on_device(layer):
            taps = {family.ffn_output: ffn, family.attention_output: attention}
            walk.advance(layer, states, taps=taps, watch=angles)
        found = BlockStatistics(angles.mean, ffn.result(), attention.result())
        if file is not None:
            tensors, meta = found.to_tensors()
            write_tensors(tensors, file, meta)
        result.append(found)
        if on_event is not None:
            on_event({"stage": "measure", "block": layer, "blocks": len(files), "seconds": time.perf_counter() - start})
    return result


def input_statistics(
    walk: Walk, layer: int, states: Tensor, names: Sequence[str], *, gram: bool, block: nn.Module | None = None
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of some linears of a block (or of a stand-in for it), the states left as they are.

    Raises ShearlingError, naming the linear, where its inputs are not finite.
    """
    moments = {name: Moments(gram=gram) for name in names}
    walk.read(layer, states, moments, block)
    found = {name: collected.result() for name, collected in moments.items()}
    for name, statistics in found.items():
        if not torch.isfinite(statistics.norm).all():
            raise ShearlingError(
                f"{walk.anatomy.path(layer, name)}: its inputs are not finite on the calibration text; look for NaN or "
                "overflow in its weights, or use dtype float32 or bfloat16"
            )
    return found


def fingerprint(model: nn.Module, tokens: Tensor, *choices: object) -> str:
    """Hex digest of a model's weights, the calibration tokens and whatever else a result depends on.

    Weights enter by their names, shapes, sums and a strided sample, so that billions of them take a second.
    """
    digest = hashlib.sha256(repr(choices).encode())
    digest.update(tokens.cpu().numpy().tobytes() + repr(tuple(tokens.shape)).encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // 1024)].float()
        sums = torch.stack([flat.sum(dtype=torch.float32), flat.abs().sum(dtype=torch.float32)])
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(torch.cat([sample, sums]).cpu().numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path) -> BlockStatistics:
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return BlockStatistics.from_tensors(tensors, stored.metadata())
