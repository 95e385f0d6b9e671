"""The one training loop, the policies that plug into it, and its losses."""

from shearling.train.distill import Distillation
from shearling.train.loop import TrainResult, train
from shearling.train.loss import IGNORE, chunked_cross_entropy, chunked_divergence
from shearling.train.policy import Policy, StepContext
from shearling.train.progress import TrainProgress
from shearling.train.settings import TrainSettings
from shearling.train.world import World, join

__all__ = [
    "IGNORE",
    "Distillation",
    "Policy",
    "StepContext",
    "TrainProgress",
    "TrainResult",
    "TrainSettings",
    "World",
    "chunked_cross_entropy",
    "chunked_divergence",
    "join",
    "train",
]
