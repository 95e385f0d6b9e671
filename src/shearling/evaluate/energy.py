"""Joules that a device says it has used."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class EnergyCounter:
    """Counters of joules that only rise: ``read`` gives all of them; each starts at 0 again when it reaches its range.

    They count the whole device, whatever runs on it, and the energy of its idling too.
    """

    source: str
    read: Callable[[], Sequence[float]]
    ranges: Sequence[float]

    def joules(self, before: Sequence[float], after: Sequence[float]) -> float:
        """Joules between two readings, between which no counter may start again more than once."""
        return sum((b - a) % range_ for a, b, range_ in zip(before, after, self.ranges, strict=True))


def energy_counter(device: torch.device) -> EnergyCounter | None:
    """The counter of a device: NVML's of a GPU, RAPL's of a processor; None where there is none to read."""
    if device.type == "cuda":
        return nvml_counter(device)
    return rapl_counter() if device.type == "cpu" else None


def rapl_counter(root: Path = POWERCAP) -> EnergyCounter | None:
    """Packages and memory as Linux counts them; None where there are none, or only the superuser may read them."""
    zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if _counts(zone)]
    try:
        ranges = [_joules(zone / "max_energy_range_uj") for zone in zones]
        counter = EnergyCounter("RAPL", partial(_read_zones, zones), ranges)
        return counter if any(counter.read()) else None
    except (OSError, ValueError):
        return None


def _counts(zone: Path) -> bool:
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return False
    # cores are part of their package, and psys has everything once more
    return name.startswith("package") or name == "dram"


def _read_zones(zones: Sequence[Path]) -> list[float]:
    return [_joules(zone / "energy_uj") for zone in zones]


def _joules(file: Path) -> float:
    return int(file.read_text()) / 1e6


def nvml_counter(device: torch.device) -> EnergyCounter | None:
    """The board's total energy; None without the package ``pynvml`` and on GPUs that do not count."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        # CUDA's numbers are not NVML's where CUDA_VISIBLE_DEVICES hides some
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return EnergyCounter("NVML", lambda: [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3], [math.inf])
