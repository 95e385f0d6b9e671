"""What a model is worth: perplexity, divergence from its reference, tasks, samples, speed."""

from shearling.evaluate.divergence import Divergence, divergence
from shearling.evaluate.perplexity import Perplexity, perplexity
from shearling.evaluate.samples import generate_samples
from shearling.evaluate.speed import Speed, speed
from shearling.evaluate.tasks import TASKS, evaluate_tasks

__all__ = [
    "TASKS",
    "Divergence",
    "Perplexity",
    "Speed",
    "divergence",
    "evaluate_tasks",
    "generate_samples",
    "perplexity",
    "speed",
]
