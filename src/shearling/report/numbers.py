"""Numbers as a reader wants them: units, sensible digits, and a dash for what is not there."""

from __future__ import annotations

import math
from typing import Any

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
NBSP = "\N{NO-BREAK SPACE}"


def finite(value: Any) -> float | None:
    """The value as a float, or None where it is missing, not a number, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def significant(value: Any, digits: int = 4) -> str:
    """The value to so many significant digits: 21.62, 3,786, 1.200e-06."""
    number = finite(value)
    if number is None:
        return DASH
    # Round first: 9.9999 belongs to the next power of ten.
    number = float(f"{number:.{digits - 1}e}")
    if number == 0:
        return "0"
    exponent = math.floor(math.log10(abs(number)))
    if not -4 <= exponent < 9:
        return f"{number:.{digits - 1}e}".replace("-", MINUS)
    return f"{number:,.{max(0, digits - 1 - exponent)}f}".replace("-", MINUS)


def count(value: Any) -> str:
    """A whole number with thousands separated: 134,515,008."""
    number = finite(value)
    if number is None:
        return DASH
    return f"{value if isinstance(value, int) else round(number):,}".replace("-", MINUS)


def _scaled(value: Any, base: int, units: tuple[str, ...]) -> str:
    number = finite(value)
    if number is None:
        return DASH
    power = 0
    # A number that rounds up to the next unit is shown in that unit.
    while power < len(units) - 1 and abs(number) >= base - 0.5:
        number /= base
        power += 1
    digits = f"{number:.0f}" if number == round(number) and power == 0 else significant(number)
    return f"{digits}{NBSP}{units[power]}".rstrip(NBSP)


def decimal(value: Any, unit: str = "") -> str:
    """The value with a decimal prefix: 134.5 M, 269.0 MFLOP."""
    return _scaled(value, 1000, tuple(prefix + unit for prefix in ("", "k", "M", "G", "T", "P")))


def size(value: Any) -> str:
    """Bytes in binary units: 22.50 KiB, 256.6 MiB."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def duration(seconds: Any) -> str:
    """Seconds as 0.40 s, 12.0 s, 3 min 20 s or 1 h 05 min."""
    number = finite(seconds)
    if number is None or number < 0:
        return DASH
    if number < 1:
        return f"{number:.2f}{NBSP}s"
    if number < 99.95:
        return f"{number:.1f}{NBSP}s"
    whole = round(number)
    if whole < 3600:
        return f"{whole // 60}{NBSP}min{NBSP}{whole % 60:02d}{NBSP}s"
    minutes = round(number / 60)
    return f"{minutes // 60:,}{NBSP}h{NBSP}{minutes % 60:02d}{NBSP}min"


def percent(fraction: Any) -> str:
    """A fraction of one as a percentage: 71.0 %."""
    number = finite(fraction)
    return DASH if number is None else f"{100 * number:.1f}{NBSP}%".replace("-", MINUS)


def ratio(after: Any, before: Any) -> str:
    """How many times `before` is `after`: 0.853 with a multiplication sign."""
    top, bottom = finite(after), finite(before)
    if top is None or bottom is None or bottom == 0 or finite(top / bottom) is None:
        return DASH
    quotient = top / bottom
    return (f"{quotient:.3f}" if abs(quotient) < 10 else significant(quotient)) + TIMES


def span(values: list[Any]) -> str:
    """The least and the greatest of the values: 980-1,400, or one number where all agree."""
    numbers = [number for number in map(finite, values) if number is not None]
    if not numbers:
        return DASH
    low, high = count(min(numbers)), count(max(numbers))
    return low if low == high else f"{low}{DASH}{high}"


def words(value: Any) -> str:
    """The value as text, a dash where it is missing or empty."""
    return DASH if value is None or value == "" else str(value)
