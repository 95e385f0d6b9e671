"""Sharing out a budget: ideal amounts in, whole units out, the total met exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shearling.errors import ShearlingError


def cap_shares(shares: Sequence[float], mean: float, cap: float = 1.0) -> list[float]:
    """Scale non-negative shares to a mean, none above ``cap``; what the cap takes goes to the others in proportion.

    Raises ShearlingError when the mean is not reachable.
    """
    count = len(shares)
    if not 0 < mean <= cap:
        raise ShearlingError(f"keep ratio {mean:g}: must be above 0 and at most {cap:g}")
    fixed: set[int] = set()
    while True:
        free = [i for i in range(count) if i not in fixed]
        if not free:
            return [cap] * count
        weight = sum(shares[i] for i in free)
        left = mean * count - cap * len(fixed)
        scale = left / weight if weight > 0 else 0.0
        result = [cap if i in fixed else (shares[i] * scale if weight > 0 else left / len(free)) for i in range(count)]
        over = {i for i in free if result[i] > cap * (1 + 1e-12)}
        if not over:
            return result
        fixed |= over


def round_to_total(
    ideal: Sequence[float], total: int, *, multiple: int = 1, low: Sequence[int], high: Sequence[int]
) -> list[int]:
    """Whole amounts nearest to the ideal ones, multiples of ``multiple``, whose sum is the nearest reachable to total.

    Largest remainder: each amount is rounded down, then the units that are missing go where the remainder is
    largest (the lower index first). A bound that is no multiple itself (a full width) may be kept whole.
    Raises ShearlingError when the bounds leave no solution.
    """
    floor_units = [math.ceil(b / multiple) for b in low]
    ceil_units = [b // multiple for b in high]
    units = round(total / multiple)
    if any(a > b for a, b in zip(floor_units, ceil_units, strict=True)):
        raise ShearlingError(f"round_to={multiple}: wider than the narrowest block; use at most {min(high)}")
    if not sum(floor_units) <= units <= sum(ceil_units):
        raise ShearlingError(
            f"{total} units over {len(ideal)} blocks: must be between {sum(floor_units) * multiple} and "
            f"{sum(ceil_units) * multiple} (multiples of {multiple}); choose another sparsity or a smaller round_to"
        )
    wish = [amount / multiple for amount in ideal]
    result = [min(max(math.floor(w + 1e-9), a), b) for w, a, b in zip(wish, floor_units, ceil_units, strict=True)]
    missing = units - sum(result)
    while missing:
        step = 1 if missing > 0 else -1
        bound = ceil_units if missing > 0 else floor_units
        open_ = [i for i in range(len(result)) if result[i] != bound[i]]
        best = max(open_, key=lambda i: (step * (wish[i] - result[i]), -i))
        result[best] += step
        missing -= step
    return [count * multiple for count in result]
