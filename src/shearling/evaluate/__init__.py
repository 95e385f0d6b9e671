"""What a model is worth: perplexity, divergence from its reference, tasks, samples, speed, what a shape takes."""

from shearling.evaluate.bench import Bench, Cell, measure_cells
from shearling.evaluate.divergence import Divergence, divergence
from shearling.evaluate.latency import Latency, measure_latency
from shearling.evaluate.perplexity import Perplexity, perplexity
from shearling.evaluate.samples import generate_samples
from shearling.evaluate.speed import Speed, speed
from shearling.evaluate.step_time import Workload
from shearling.evaluate.tasks import TASKS, evaluate_tasks

__all__ = [
    "TASKS",
    "Bench",
    "Cell",
    "Divergence",
    "Latency",
    "Perplexity",
    "Speed",
    "Workload",
    "divergence",
    "evaluate_tasks",
    "generate_samples",
    "measure_cells",
    "measure_latency",
    "perplexity",
    "speed",
]
