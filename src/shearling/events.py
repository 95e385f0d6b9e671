"""What long work tells while it runs: one dictionary an event, as docs/architecture.md lists them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OnEvent = Callable[[dict[str, Any]], None]
