"""What is measured and what is reported."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shearling.recipe.base import Strict, Tokens


class Calibration(Strict):
    """Text that is measured: ``sequences`` windows of ``length`` tokens, ``batch`` at a time.

    With ``stream`` the weights stay in host memory and visit the device block by block while they are measured.
    """

    text: str = "stdlib:calibration"
    sequences: Tokens = 128
    length: Annotated[int, Field(ge=2)] = 2048
    batch: Tokens = 8
    stream: bool = False


class Evaluation(Strict):
    """What is reported of each model; ``samples`` are prompts that every model continues."""

    text: str = "stdlib:evaluation"
    context: Annotated[int, Field(ge=2)] = 1024
    stride: Tokens = 1024
    max_tokens: Tokens | None = None
    batch: Tokens = 1
    samples: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    data: str | None = None
