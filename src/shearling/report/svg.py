"""Parts of a plot as SVG text: scales, ticks, axes, bars, lines. All text is escaped.

Lengths are in SVG user units, y grows downwards. Colours come from the page's style sheet by class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

TICK_GAP = 8


@dataclass(frozen=True)
class Scale:
    """A linear map from values [low, high] to lengths [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The length at which the value lies."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> tuple[float, ...]:
    """Ascending ticks that enclose [low, high], evenly spaced by 1, 2 or 5 times a power of ten.

    At most count + 2 of them and at least two; `whole` keeps them whole numbers. Finite values of
    magnitude up to 1e300.
    """
    low, high = min(low, high), max(low, high)
    largest = max(abs(low), abs(high))
    # Closer values than this cannot be told apart on a page, and their ticks not in floating point.
    if high - low <= 1e-9 * largest or largest < 1e-290:
        margin = 0.05 * largest if largest >= 1e-290 else 0.5
        low, high = low - margin, high + margin
    least = (high - low) / count
    exponent = math.floor(math.log10(least))
    if whole and exponent < 0:
        mantissa, exponent = 1, 0
    else:
        unit = _tick(1, 1, exponent)
        mantissa = next((m for m in (1, 2, 5) if m * unit >= least), 10)
    step = _tick(1, mantissa, exponent)
    first, last = math.floor(low / step), math.ceil(high / step)
    return tuple(_tick(index, mantissa, exponent) for index in range(first, last + 1))


def _tick(index: int, mantissa: int, exponent: int) -> float:
    # Whole-number arithmetic rounds once, so a tick prints as 0.3 and not 0.30000000000000004.
    if exponent < 0:
        return index * mantissa / 10**-exponent
    return float(index * mantissa * 10**exponent)


def tick_labels(ticks: Sequence[float]) -> tuple[str, ...]:
    """The ticks as text, all with as many decimals as their step needs."""
    step = ticks[1] - ticks[0]
    largest = max(abs(tick) for tick in ticks)
    if largest >= 1e7 or step < 1e-5:
        return tuple(f"{tick:.6g}" for tick in ticks)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return tuple(f"{tick:,.{decimals}f}".replace("-", "\N{MINUS SIGN}") for tick in ticks)


def element(name: str, attributes: dict[str, str | float], *children: str) -> str:
    """One element; attribute values are escaped, children are SVG already."""
    written = "".join(f' {key}="{_value(value)}"' for key, value in attributes.items())
    return f"<{name}{written}>{''.join(children)}</{name}>"


def _value(value: str | float) -> str:
    return escape(value, quote=True) if isinstance(value, str) else f"{round(value, 2):.7g}"


def text(x: float, y: float, content: str, css: str, anchor: str = "middle") -> str:
    """A line of text at (x, y)."""
    attributes = {"x": x, "y": y, "class": css, "text-anchor": anchor}
    return element("text", attributes, escape(content))


def picture(name: str, title: str, description: str, size: tuple[float, float], *body: str) -> str:
    """A whole SVG image with an accessible title and description; `name` is unique on the page."""
    width, height = size
    names = {"title": f"{name}-title", "desc": f"{name}-desc"}
    attributes = {
        "viewBox": f"0 0 {width:g} {height:g}",
        "role": "img",
        "aria-labelledby": " ".join(names.values()),
    }
    heading = element("title", {"id": names["title"]}, escape(title))
    summary = element("desc", {"id": names["desc"]}, escape(description))
    return element("svg", attributes, heading, summary, *body)  # pyrefly: ignore[bad-argument-type]


def axis_left(ticks: Sequence[float], scale: Scale, left: float, right: float) -> str:
    """Labels left of the plot and a hairline across it at every tick."""
    return "".join(
        element("path", {"class": "grid", "d": f"M{left:.2f} {scale(tick):.2f}H{right:.2f}"})
        + text(left - TICK_GAP, scale(tick) + 4, label, "tick", "end")
        for tick, label in zip(ticks, tick_labels(ticks), strict=True)
    )


def axis_right(ticks: Sequence[float], scale: Scale, right: float, css: str) -> str:
    """Labels right of the plot, in the colour of their line."""
    return "".join(
        text(right + TICK_GAP, scale(tick) + 4, label, f"tick {css}", "start")
        for tick, label in zip(ticks, tick_labels(ticks), strict=True)
    )


def axis_bottom(ticks: Sequence[float], scale: Scale, bottom: float) -> str:
    """Labels below the plot at the ticks that lie on the scale."""
    return "".join(
        text(scale(tick), bottom + 18, label, "tick")
        for tick, label in zip(ticks, tick_labels(ticks), strict=True)
        if scale.low <= tick <= scale.high
    )


def bar(x: float, width: float, y: float, bottom: float, css: str, hint: str = "") -> str:
    """An upright bar from `bottom` up to y; the hint shows where a pointer rests on it."""
    attributes = {"class": css, "x": x, "y": y, "width": width, "height": max(0.0, bottom - y)}
    return element("rect", attributes, element("title", {}, escape(hint)) if hint else "")


def line(points: Sequence[tuple[float, float] | None], css: str) -> str:
    """A line through the points, broken where one is None; a lone point becomes a dot."""
    path, pen_down = [], False
    for index, point in enumerate(points):
        if point is None:
            pen_down = False
            continue
        alone = not pen_down and (index + 1 == len(points) or points[index + 1] is None)
        path.append(f"{'L' if pen_down else 'M'}{point[0]:.2f} {point[1]:.2f}{'h0' * alone}")
        pen_down = True
    return element("path", {"class": css, "d": "".join(path)}) if path else ""
