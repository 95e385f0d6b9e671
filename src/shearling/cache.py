"""Where things are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder of converted models, measured times and compiled kernels.

    It is ``$SHEARLING_CACHE`` or ``~/.cache/shearling``.
    """
    return Path(os.environ.get("SHEARLING_CACHE") or Path.home() / ".cache" / "shearling")
