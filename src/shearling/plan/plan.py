"""The before => after table of a run, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from shearling.anatomy import Anatomy
from shearling.plan.sizes import Quantised, Sizes


@dataclass(frozen=True)
class Masked:
    """Masks of a plan: their pattern, and how many weights stay ``kept`` of how many they cover."""

    pattern: str
    kept: int
    of: int


@dataclass(frozen=True)
class Plan:
    """Sizes and block shapes before and after, and what making it costs.

    ``importance`` has one number a block, empty where nothing was measured. ``estimate`` holds the
    ``peak_bytes`` of training where they are known. Masks change no size: ``masked`` counts them. ``quantised`` is the
    size with codes in place of weights, where there is a grid. ``branches`` is the largest rank of branches that stay
    beside linears, where there are any.
    """

    model: str
    method: str
    before: Sizes
    after: Sizes
    anatomy_before: Anatomy
    anatomy_after: Anatomy
    layers: tuple[int, ...]
    importance: tuple[float, ...] = ()
    estimate: dict[str, float] = field(default_factory=dict)
    masked: Masked | None = None
    quantised: Quantised | None = None
    branches: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of ``plan.json``, without the engines that load the result."""
        return {
            "model": self.model,
            "method": self.method,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "hidden": [self.anatomy_before.hidden, self.anatomy_after.hidden],
            "blocks": [self._block(new, old) for new, old in enumerate(self.layers)],
            "estimate": self.estimate,
            **({} if self.masked is None else {"masks": asdict(self.masked)}),
            **({} if self.quantised is None else {"quantised": asdict(self.quantised)}),
            **({} if self.branches is None else {"branches": self.branches}),
        }

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(quantity, before, after, after / before) for printing."""
        before, after = self.before.to_json(), self.after.to_json()
        rows = [
            (name.replace("_", " "), f"{before[name]:,}", f"{after[name]:,}", f"{after[name] / before[name]:.3f}")
            for name in before
            if before[name]
        ]
        for name in ("ffn", "query_heads", "kv_heads"):
            widths = [
                [getattr(shape, name) for shape in anatomy.shapes]
                for anatomy in (self.anatomy_before, self.anatomy_after)
            ]
            total = [sum(w) for w in widths]
            rows.append((name.replace("_", " "), _span(widths[0]), _span(widths[1]), f"{total[1] / total[0]:.3f}"))
        if self.masked is not None:
            share = self.masked.kept / self.masked.of
            of, kept = f"{self.masked.of:,}", f"{self.masked.kept:,}"
            rows.append((f"weights under the masks ({self.masked.pattern})", of, kept, f"{share:.3f}"))
        if self.quantised is not None:
            grid = self.quantised
            name = f"{grid.format}, " + ("a scale a row" if grid.group is None else f"groups of {grid.group}")
            share = f"{grid.bytes / self.before.bytes:.3f}"
            rows.append((f"bytes, quantised ({name})", f"{self.before.bytes:,}", f"{grid.bytes:,}", share))
            rows.append(("bits of a quantised weight, with its scales", "", f"{grid.bits:.3f}", ""))
        if self.branches is not None:
            rows.append(("rank of the branches beside linears", "", str(self.branches), ""))
        if "peak_bytes" in self.estimate:
            rows.append(("memory of training, estimated", "", f"{self.estimate['peak_bytes'] / 2**30:.1f} GiB", ""))
        for name in ("hidden", "num_layers"):
            old, new = (getattr(anatomy, name) for anatomy in (self.anatomy_before, self.anatomy_after))
            rows.append((name.removeprefix("num_"), str(old), str(new), f"{new / old:.3f}"))
        return rows

    def _block(self, new: int, old: int) -> dict[str, Any]:
        before, after = self.anatomy_before.shapes[old], self.anatomy_after.shapes[new]
        widths = {name: [getattr(before, name), getattr(after, name)] for name in ("ffn", "query_heads", "kv_heads")}
        return {"layer": old, **widths, **({"importance": self.importance[old]} if self.importance else {})}


def _span(widths: Sequence[int]) -> str:
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low}..{high}"
