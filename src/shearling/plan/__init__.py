"""Edits, plans and budgets: everything about a change except carrying it out."""

from shearling.plan.budget import cap_shares, round_to_total
from shearling.plan.edits import Adapters, Delta, Edit, Masks, Quant, Structure, check_order, edit_size
from shearling.plan.files import load_edits, save_edits, write_tensors
from shearling.plan.grids import Codes, Grid, dequantise
from shearling.plan.outcome import Outcome, plan_of
from shearling.plan.plan import Masked, Plan
from shearling.plan.proposals import HEADINGS, Cost, Proposal, Width, propose_shapes, resolve_target, widths
from shearling.plan.shape import check_structure, kept_elements, kept_layers, shape_after
from shearling.plan.sizes import (
    Inventory,
    Quantised,
    Sizes,
    TensorSize,
    inventory_after,
    inventory_of,
    quantised_size,
    sizes,
    unit_parameters,
)
from shearling.plan.target import leading, target_anatomy

__all__ = [
    "HEADINGS",
    "Adapters",
    "Codes",
    "Cost",
    "Delta",
    "Edit",
    "Grid",
    "Inventory",
    "Masked",
    "Masks",
    "Outcome",
    "Plan",
    "Proposal",
    "Quant",
    "Quantised",
    "Sizes",
    "Structure",
    "TensorSize",
    "Width",
    "cap_shares",
    "check_order",
    "check_structure",
    "dequantise",
    "edit_size",
    "inventory_after",
    "inventory_of",
    "kept_elements",
    "kept_layers",
    "leading",
    "load_edits",
    "plan_of",
    "propose_shapes",
    "quantised_size",
    "resolve_target",
    "round_to_total",
    "save_edits",
    "shape_after",
    "sizes",
    "target_anatomy",
    "unit_parameters",
    "widths",
    "write_tensors",
]
