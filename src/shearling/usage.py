"""What a piece of work took: seconds and peak memory."""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from types import TracebackType
from typing import Any, Self

import psutil


class Usage:
    """Context manager: ``seconds``, and ``peak_bytes`` of the CUDA allocator where a GPU works, else of this process.

    On Linux the process' peak is that of the block alone; elsewhere it is the greatest since the process started.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        self._cuda = _cuda()
        if self._cuda is not None:
            self._cuda.reset_peak_memory_stats()
        elif platform.system() == "Linux":
            _reset_peak()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self.peak_bytes = _process_peak() if self._cuda is None else self._cuda.max_memory_allocated()

    def to_json(self) -> dict[str, float]:
        return {"seconds": self.seconds, "peak_bytes": self.peak_bytes}


def held_bytes() -> int:
    """What is held now, of the memory whose peak ``Usage`` tells."""
    cuda = _cuda()
    return psutil.Process().memory_info().rss if cuda is None else cuda.memory_allocated()


def return_freed() -> None:
    """Give memory that was freed back to the system (glibc; elsewhere nothing), so that what is taken next shows."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _reset_peak() -> None:
    try:
        # 5: the kernel's high-water mark of resident memory starts anew
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
    except OSError:
        return


def _process_peak() -> int:
    if platform.system() == "Linux":
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    if platform.system() == "Windows":
        return psutil.Process().memory_info().peak_wset  # pyrefly: ignore[missing-attribute]
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
