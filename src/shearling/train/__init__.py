"""The one training loop, the policies that plug into it, its teachers and its losses."""

from shearling.train.cache import CachedTeacher, cache_teacher
from shearling.train.compiled import compiled
from shearling.train.distill import Distillation
from shearling.train.layerwise import LayerwiseDistillation
from shearling.train.loop import TrainResult, train
from shearling.train.loss import IGNORE, HeadLoss, chunked_cross_entropy, chunked_divergence, chunked_head_loss
from shearling.train.offload import offloaded
from shearling.train.optimizers import decay_groups
from shearling.train.policy import Policy, StepContext
from shearling.train.progress import TrainProgress
from shearling.train.settings import TrainSettings
from shearling.train.teachers import Teacher, in_dtype
from shearling.train.topk import chunked_topk_divergence
from shearling.train.validation import affordable_windows, validation_loss
from shearling.train.world import World, join

__all__ = [
    "IGNORE",
    "CachedTeacher",
    "Distillation",
    "HeadLoss",
    "LayerwiseDistillation",
    "Policy",
    "StepContext",
    "Teacher",
    "TrainProgress",
    "TrainResult",
    "TrainSettings",
    "World",
    "affordable_windows",
    "cache_teacher",
    "chunked_cross_entropy",
    "chunked_divergence",
    "chunked_head_loss",
    "chunked_topk_divergence",
    "compiled",
    "decay_groups",
    "in_dtype",
    "join",
    "offloaded",
    "train",
    "validation_loss",
]
