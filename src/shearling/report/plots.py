"""The plots of a report: widths of the blocks, curves of training, share of the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from shearling.report import svg
from shearling.report.numbers import count, finite, significant

Points = Sequence[tuple[float, float | None]]

WIDTH = 760.0
LEFT = 50.0
RIGHT = WIDTH - 44.0
TOP = 30.0
MOST_POINTS = 400
SMOOTH_FRACTION = 0.05
#: that the style sheet has for lines of domains
COLOURS = 8


def width_plot(
    name: str,
    what: str,
    widths: Sequence[tuple[float | None, float | None]],
    importance: Sequence[float | None] = (),
    *,
    height: float = 280.0,
) -> str:
    """Bars of each layer's width before and after, with the block importance as a line.

    `widths` holds (before, after) a layer; `importance` one value a layer, or nothing.
    """
    bottom = height - 44
    tallest = max((value for pair in widths for value in pair if value is not None), default=1.0)
    ticks = svg.nice_ticks(0, max(tallest, 1.0), 4 if height > 200 else 2, whole=True)
    up = svg.Scale(ticks[0], ticks[-1], bottom, TOP)
    pitch = (RIGHT - LEFT) / len(widths)
    across = svg.Scale(0, len(widths), LEFT, RIGHT)
    body = [
        svg.text(0, 14, what, "label", "start"),
        svg.axis_left(ticks, up, LEFT, RIGHT),
    ]
    gap = min(6.0, 0.22 * pitch)
    for layer, (before, after) in enumerate(widths):
        hint = f"layer {layer}: {count(before)} before, {count(after)} after"
        x = across(layer) + gap / 2
        for value, css in ((before, "bar before"), (after, "bar after")):
            if value is not None:
                body.append(svg.bar(x, pitch - gap, up(value), bottom, css, hint))
    known = [value for value in importance if value is not None]
    if known:
        sides = svg.nice_ticks(min(0.0, *known), max(known), 4)
        side = svg.Scale(sides[0], sides[-1], bottom, TOP)
        points = [
            None if value is None else (across(layer + 0.5), side(value)) for layer, value in enumerate(importance)
        ]
        body += [
            svg.text(WIDTH, 14, "block importance", "label importance", "end"),
            svg.axis_right(sides, side, RIGHT, "importance"),
            svg.line(points, "curve halo"),
            svg.line(points, "curve importance"),
        ]
    # A layer's label stands below the middle of its bar.
    middles = svg.Scale(0, len(widths), LEFT + pitch / 2, RIGHT + pitch / 2)
    layers = [tick for tick in _layer_ticks(len(widths)) if tick < len(widths)]
    body += [svg.text(middles(tick), bottom + 18, f"{tick:g}", "tick") for tick in layers]
    body.append(svg.text((LEFT + RIGHT) / 2, height - 6, "layer", "label"))
    description = _width_description(what, widths, known)
    return svg.picture(name, f"{what} per layer", description, (WIDTH, height), *body)


def _layer_ticks(num_layers: int) -> Sequence[float]:
    if num_layers <= 16:
        return range(num_layers)
    return svg.nice_ticks(0, num_layers - 1, 10, whole=True)


def _width_description(
    what: str,
    widths: Sequence[tuple[float | None, float | None]],
    known: Sequence[float],
) -> str:
    sides = [[value for value in side if value is not None] for side in zip(*widths, strict=True)]
    spans = [f"{count(min(s))} to {count(max(s))}" if s else "unknown" for s in sides]
    said = f"Bars for {len(widths)} layers: {what} from {spans[0]} before, {spans[1]} after."
    if known:
        said += f" Line: block importance from {min(known):.3g} to {max(known):.3g}."
    return said


def step_plot(name: str, stage: str, points: Points, what: str = "loss", *, height: float = 280.0) -> str:
    """A quantity over the steps: every value thin, their running mean strong.

    `points` holds (step, value) in ascending steps, None where the value was not finite.
    """
    points = _thinned(points)
    known = [loss for _, loss in points if loss is not None]
    first, last = points[0][0], points[-1][0]
    lines = [(points, "curve raw"), (_smoothed(points), "curve after")]
    description = (
        f"Line: {what} from {significant(known[0])} at step {count(first)} "
        f"to {significant(known[-1])} at step {count(last)}, lowest {significant(min(known))}."
    )
    return _steps(name, stage, what, description, lines, height)


def domain_plot(
    name: str, stage: str, domains: Mapping[str, Points], what: str = "weight", *, height: float = 280.0
) -> str:
    """A quantity of every domain over the steps, a line each; `domains` holds points as `step_plot` has them."""
    thinned = [_thinned(points) for points in domains.values()]
    ends = [[value for _, value in points if value is not None] for points in thinned]
    told = [
        f"{domain} from {significant(values[0])} to {significant(values[-1])}"
        for domain, values in zip(domains, ends, strict=True)
    ]
    lines = [(points, f"curve {domain_class(number)}") for number, points in enumerate(thinned)]
    return _steps(name, stage, what, f"Lines: {what}, {', '.join(told)}.", lines, height)


def domain_class(number: int) -> str:
    """What a domain's line is in the style sheet: its colour, and dashes where all colours are taken."""
    return f"domain-{number % COLOURS}" + " dashed" * (number // COLOURS % 2)


def _steps(
    name: str, stage: str, what: str, description: str, lines: Sequence[tuple[Points, str]], height: float
) -> str:
    """Lines over the steps, each with its class, in one frame."""
    bottom = height - 44
    known = [value for points, _ in lines for _, value in points if value is not None]
    first, last = min(points[0][0] for points, _ in lines), max(points[-1][0] for points, _ in lines)
    ticks = svg.nice_ticks(min(known), max(known))
    steps = svg.nice_ticks(first, last, 6, whole=True)
    margin = 0.5 if first == last else 0.0
    across = svg.Scale(first - margin, last + margin, LEFT, RIGHT)
    up = svg.Scale(ticks[0], ticks[-1], bottom, TOP)
    body = [
        svg.text(0, 14, what, "label", "start"),
        svg.axis_left(ticks, up, LEFT, RIGHT),
        svg.axis_bottom(steps, across, bottom),
        svg.text((LEFT + RIGHT) / 2, height - 6, "step", "label"),
    ]
    for points, css in lines:
        placed = [None if value is None else (across(step), up(value)) for step, value in points]
        body.append(svg.line(placed, css))
    return svg.picture(name, f"{what.capitalize()} of stage {stage}", description, (WIDTH, height), *body)


def _thinned(points: Points) -> Points:
    if len(points) <= MOST_POINTS:
        return points
    cuts = [index * len(points) // MOST_POINTS for index in range(MOST_POINTS + 1)]
    return [_mean_point(points[start:end]) for start, end in pairwise(cuts)]


def _mean_point(points: Points) -> tuple[float, float | None]:
    known = [loss for _, loss in points if loss is not None]
    # The last step of a bucket, so that the curve ends where training did.
    return points[-1][0], sum(known) / len(known) if known else None


def _smoothed(points: Points) -> Points:
    reach = max(1, round(SMOOTH_FRACTION * len(points)))
    return [
        (step, None if loss is None else _mean_point(points[max(0, i - reach) : i + reach + 1])[1])
        for i, (step, loss) in enumerate(points)
    ]


def share_bar(value: float | None, largest: float) -> str:
    """A thin horizontal bar as long as its share of the largest value; decoration only."""
    share = 0.0 if not value or largest <= 0 else max(0.0, min(1.0, value / largest))
    attributes: dict[str, str | float] = {
        "class": "share",
        "viewBox": "0 0 100 6",
        "preserveAspectRatio": "none",
        "aria-hidden": "true",
    }
    track = {"class": "track", "width": 100.0, "height": 6.0}
    filled = {"class": "bar after", "width": 100 * share, "height": 6.0}
    return svg.element("svg", attributes, svg.element("rect", track), svg.element("rect", filled))


def finite_pair(pair: object) -> tuple[float | None, float | None]:
    """A [before, after] of the plan as numbers, None for what is not one or is negative."""
    values = pair if isinstance(pair, list) and len(pair) == 2 else [None, None]
    numbers = [finite(value) for value in values]
    before, after = (None if number is None or number < 0 else number for number in numbers)
    return before, after
