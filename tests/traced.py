"""What stands in for a CUDA graph on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from shearling.captured import WARMUP


class Traced:
    """As ``Captured``, but what is repeated are operations that were traced; none of the step's Python runs.

    ``made`` are those that there were in a test, which starts it anew.
    """

    made: ClassVar[list[Traced]] = []

    def __init__(self, step: Callable[[], None]) -> None:
        self.step, self.calls = step, 0
        self.graph: Any = None
        self.made.append(self)

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= WARMUP:
            self.step()
        elif self.graph is None:
            # tracing carries out as well
            self.graph = make_fx(lambda: self.step() or ())()
        else:
            with torch.no_grad():
                self.graph()
