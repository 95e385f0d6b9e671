"""One forward pass, block after block, and what it collects."""

from shearling.sweep.measure import fingerprint, input_statistics, measure
from shearling.sweep.statistics import Angles, BlockStatistics, InputStatistics, Magnitudes, Moments, add_product_
from shearling.sweep.store import Store, block_tensors, take_values_
from shearling.sweep.walk import Walk

__all__ = [
    "Angles",
    "BlockStatistics",
    "InputStatistics",
    "Magnitudes",
    "Moments",
    "Store",
    "Walk",
    "add_product_",
    "block_tensors",
    "fingerprint",
    "input_statistics",
    "measure",
    "take_values_",
]
