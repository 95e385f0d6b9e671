"""What a training run is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from shearling.errors import ShearlingError


@dataclass(frozen=True)
class TrainSettings:
    """Settings of the loop; ShearlingError for a value that makes no sense.

    ``tokens`` is the budget; a step reads ``batch`` windows of ``length`` tokens, so the last step may go beyond it.
    ``micro_batch`` windows pass through the model at a time. ``warmup`` below 1 is a share of the steps, from 1 on a
    number of steps. ``min_ratio`` is where the schedule ends, over ``learning_rate``. ``clip`` bounds the global
    gradient norm (None: no bound). ``autocast`` None means bfloat16 on CUDA and none elsewhere.
    ``checkpoint_every`` and ``validate_every`` count steps; 0 means at the end only. ``cross_entropy`` weighs the
    next-token loss; at 0 it is not computed and policies must bring a loss. With ``recompute`` activations inside a
    block are computed again in the backward pass instead of kept; with ``compile`` torch compiles the blocks; with
    ``capture`` forward and backward pass become a CUDA graph, for small models that are done before they are launched.
    With ``separator``, the token that documents end in, those of a window are kept apart: each has attention and
    positions of its own, in training, validation and teachers, and its first token is not predicted.
    ``keep`` says which parameters a run ends with: the last, or those of the best validation.
    """

    tokens: int
    length: int
    batch: int = 8
    micro_batch: int = 8
    learning_rate: float = 1e-4
    warmup: float = 0.05
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_ratio: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0
    autocast: torch.dtype | None = None
    cross_entropy: float = 1.0
    recompute: bool = False
    compile: bool = False
    capture: bool = False
    separator: int | None = None
    keep: Literal["last", "best"] = "last"
    log_every: int = 10
    checkpoint_every: int = 0
    validate_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "length", "batch", "micro_batch", "learning_rate", "log_every"):
            if not getattr(self, name) > 0:
                raise ShearlingError(f"{name}={getattr(self, name)}: must be above 0")
        if self.length < 2:
            raise ShearlingError("length=1: a window needs at least 2 tokens, one to read and one to predict")
        for name in ("warmup", "weight_decay", "cross_entropy", "checkpoint_every", "validate_every"):
            if not getattr(self, name) >= 0:
                raise ShearlingError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.clip is not None and not self.clip > 0:
            raise ShearlingError(f"clip={self.clip}: must be above 0, or None for no clipping")
        if self.separator is not None and self.separator < 0:
            raise ShearlingError(f"separator={self.separator}: must be a token id, or None to keep documents together")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ShearlingError(f"schedule={self.schedule!r}: must be cosine, linear or constant")
        if self.keep not in ("last", "best"):
            raise ShearlingError(f"keep={self.keep!r}: must be last or best")
        if self.capture and self.recompute:
            raise ShearlingError("capture: a graph cannot compute activations again; leave recompute or capture off")
        if self.capture and self.separator is not None:
            raise ShearlingError("capture: a graph weighs all windows alike; leave documents together or capture off")
        if not 0 <= self.min_ratio <= 1:
            raise ShearlingError(f"min_ratio={self.min_ratio}: must lie in 0 to 1")

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.length

    @property
    def steps(self) -> int:
        """Number of optimizer steps: the fewest that read ``tokens``."""
        return math.ceil(self.tokens / self.tokens_per_step)

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup * self.steps) if self.warmup < 1 else int(self.warmup)

    def rate(self, step: int) -> float:
        """Learning rate of a step (counted from 0) over ``learning_rate``.

        Rises linearly over the warm-up (its last step is at 1), then falls from 1 towards ``min_ratio``, which the
        step after the last one would reach.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[self.schedule]
        return self.min_ratio + (1 - self.min_ratio) * left
