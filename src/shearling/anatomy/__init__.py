"""What a model is made of, as data: spaces, layouts, and what a stock config can express."""

from shearling.anatomy.lookup import anatomy_of, family_names, family_of
from shearling.anatomy.spec import Anatomy, BlockShape, Family, Layout, is_branch, parse_layout
from shearling.anatomy.stock import PER_LAYER_PREFIX, config_updates, expressible, obstacle

__all__ = [
    "PER_LAYER_PREFIX",
    "Anatomy",
    "BlockShape",
    "Family",
    "Layout",
    "anatomy_of",
    "config_updates",
    "expressible",
    "family_names",
    "family_of",
    "is_branch",
    "obstacle",
    "parse_layout",
]
