"""Recipes: what to do, typed. Imports neither torch nor transformers."""

from shearling.recipe.base import RECOVERY_TEXT, SOURCE, STDLIB, TOP_K, UNSTRUCTURED
from shearling.recipe.domains import Domain, Loading, reference_table
from shearling.recipe.masking import Denoise, Sparsify, pattern_numbers
from shearling.recipe.pruning import CFSP, Baseline, CFSPReference, Reconstruct, Shearling
from shearling.recipe.quantising import Quantise, Scales
from shearling.recipe.reading import load_recipe, parse_recipe, schema
from shearling.recipe.sections import Calibration, Evaluation
from shearling.recipe.shapes import Budget, Ranked, ShapeOrBudget, Target
from shearling.recipe.training import AST, SPP, Adapt, Full, LoRA, Shear, SLoRB
from shearling.recipe.whole import (
    MASK_METHODS,
    METHODS,
    RANKED,
    RECOVERIES,
    STAGES,
    PruneStage,
    Recipe,
    RecoverStage,
    Stage,
    TrainStage,
)

__all__ = [
    "AST",
    "CFSP",
    "MASK_METHODS",
    "METHODS",
    "RANKED",
    "RECOVERIES",
    "RECOVERY_TEXT",
    "SOURCE",
    "SPP",
    "STAGES",
    "STDLIB",
    "TOP_K",
    "UNSTRUCTURED",
    "Adapt",
    "Baseline",
    "Budget",
    "CFSPReference",
    "Calibration",
    "Denoise",
    "Domain",
    "Evaluation",
    "Full",
    "LoRA",
    "Loading",
    "PruneStage",
    "Quantise",
    "Ranked",
    "Recipe",
    "Reconstruct",
    "RecoverStage",
    "SLoRB",
    "Scales",
    "ShapeOrBudget",
    "Shear",
    "Shearling",
    "Sparsify",
    "Stage",
    "Target",
    "TrainStage",
    "load_recipe",
    "parse_recipe",
    "pattern_numbers",
    "reference_table",
    "schema",
]
