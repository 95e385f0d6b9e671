"""CFSP: coarse-to-fine structured pruning (arXiv 2409.13199), as its code was released.

    A_l     mean angle between the input and output of block l over all tokens, as a share of pi
    g_l     importance of block l
    keep_l  share of its channels that block l keeps; p is the share removed of all

The paper's body was not at hand: equation numbers follow a third-party transcription, and ``reference_widths`` repeats
the released code where it departs from exact totals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from shearling.errors import ShearlingError
from shearling.plan import cap_shares

#: makes importance equal the released code's at its 128 x 1024 calibration tokens: N / 1e4
TEMPERATURE = 13.1072


def block_importance(angles: Sequence[float], temperature: float = TEMPERATURE) -> list[float]:
    """g_l = sigmoid(beta (A_l - mean A)).

    The released code sums angles over tokens and divides by 1e4, so its sharpness grows with the amount of text; the
    mean angle with a temperature does not.
    """
    mean = sum(angles) / len(angles)
    return [1 / (1 + math.exp(-temperature * (angle - mean))) for angle in angles]


def keep_ratios(importance: Sequence[float], sparsity: float) -> list[float]:
    """keep_l = (1 - p) g_l / mean g, its spread shrunk where a block would keep more than all of itself.

    The largest ratio after shrinking is 1 - p + p / 1.05, as in the released code; the mean is 1 - p exactly.
    """
    mean = sum(importance) / len(importance)
    largest = max(importance)
    if largest / mean * (1 - sparsity) >= 1 and largest > mean:
        spread = mean * (1 / (1 - sparsity) - 1) / (largest - mean) / 1.05
        importance = [mean + spread * (g - mean) for g in importance]
    return cap_shares(importance, 1 - sparsity)


def reference_widths(keep: Sequence[float], channels: int, multiple: int | None = None) -> list[int]:
    """Widths as released: floor(I keep) + 1 channels, or the nearest multiple of 128; totals are only nearly met.

    Raises ShearlingError where the released code's rounding reaches zero, at which it would keep the whole block.
    """
    if multiple is None:
        return [min(math.floor(channels * k) + 1, channels) for k in keep]
    widths = [min(multiple * math.floor((channels * k + multiple / 2) / multiple), channels) for k in keep]
    if min(widths) == 0:
        raise ShearlingError(f"round_to={multiple}: block {widths.index(0)} would keep nothing; use a smaller multiple")
    return widths
