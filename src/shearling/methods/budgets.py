"""From a recipe's share to whole widths of all blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shearling.anatomy import Anatomy
from shearling.errors import ShearlingError
from shearling.methods.cfsp import keep_ratios
from shearling.plan import Sizes, round_to_total, sizes, unit_parameters
from shearling.recipe import CFSP, Baseline, CFSPReference, Shearling

Settings = CFSP | CFSPReference | Shearling | Baseline


def channels_to_remove(anatomy: Anatomy, inventory: Any, settings: Settings) -> int:
    """The budget in FFN channels over all blocks; ShearlingError where the FFN layers cannot pay for it."""
    total = sum(shape.ffn for shape in anatomy.shapes)
    channel, _ = unit_parameters(inventory, anatomy, 0)
    before: Sizes = sizes(inventory, anatomy)
    # one channel weighs the same share of the bytes as of the parameters, since a model has one dtype
    unit = 1 / total if settings.of == "ffn" else channel / before.parameters
    remove = round(settings.sparsity / unit)
    if remove > total - anatomy.num_layers:
        raise ShearlingError(
            f"prune.sparsity = {settings.sparsity:g} of {settings.of}: {max(0, total - remove)} of {total} channels "
            f"would stay, fewer than one a block; choose at most {(total - anatomy.num_layers) * unit:.4f}"
        )
    return remove


def share_out(importance: Sequence[float], anatomy: Anatomy, remove: int, settings: Settings) -> list[int]:
    """Widths of all blocks: importance scaled to the mean kept share, whole channels, the total met exactly."""
    full = [shape.ffn for shape in anatomy.shapes]
    total = sum(full) - remove
    if settings.uniform:
        width = round(total / len(full) / settings.round_to) * settings.round_to
        if width < 1:
            raise ShearlingError(f"sparsity={settings.sparsity:g}: no width would be left; choose less")
        return [min(width, size) for size in full]
    keep = keep_ratios(importance, remove / sum(full))
    ideal = [k * size for k, size in zip(keep, full, strict=True)]
    low = [settings.round_to] * len(full)
    return round_to_total(ideal, total, multiple=settings.round_to, low=low, high=full)
