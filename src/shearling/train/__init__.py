"""The one training loop, the policies that plug into it, and its losses."""

from shearling.train.distill import Distillation
from shearling.train.loop import TrainResult, train
from shearling.train.loss import IGNORE, HeadLoss, chunked_cross_entropy, chunked_divergence, chunked_head_loss
from shearling.train.policy import Policy, StepContext
from shearling.train.progress import TrainProgress
from shearling.train.settings import TrainSettings

__all__ = [
    "IGNORE",
    "Distillation",
    "HeadLoss",
    "Policy",
    "StepContext",
    "TrainProgress",
    "TrainResult",
    "TrainSettings",
    "chunked_cross_entropy",
    "chunked_divergence",
    "chunked_head_loss",
    "train",
]
