"""Running 2:4 and 2:4 with 4-bit values where it is faster than dense, and dense where it is not."""

from shearling.kernels.compact24 import random_24
from shearling.runtime.accelerate import Accelerated, accelerate_
from shearling.runtime.linear import Route, RoutedLinear
from shearling.runtime.paths import (
    COPIES,
    Beside,
    Branch,
    Path,
    beside_of,
    branch_of,
    copy_of,
    decompressed,
    paths,
    product,
    random_branch,
)
from shearling.runtime.table import TOKENS, Key, Table, cached_table, measure_table, table_file
from shearling.runtime.timing import Timing

__all__ = [
    "COPIES",
    "TOKENS",
    "Accelerated",
    "Beside",
    "Branch",
    "Key",
    "Path",
    "Route",
    "RoutedLinear",
    "Table",
    "Timing",
    "accelerate_",
    "beside_of",
    "branch_of",
    "cached_table",
    "copy_of",
    "decompressed",
    "measure_table",
    "paths",
    "product",
    "random_24",
    "random_branch",
    "table_file",
]
