"""How a method plugs into the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from shearling.plan import Edit
    from shearling.train.settings import TrainSettings


@dataclass
class StepContext:
    """What a policy sees of one step.

    ``step`` counts from 0. ``rate`` is this step's learning rate over the settings' ``learning_rate``, for policies
    with an optimizer of their own. ``input_ids`` and ``labels`` are [B, T] of the current micro-batch, ``labels[:, t]``
    being the token after ``input_ids[:, t]`` and -100 where there is none; ``indices`` [B] (int64, CPU) says which
    windows they are. ``position_ids`` [B, T] begin anew in every document where documents are kept apart, and are None
    elsewhere; whoever runs a model gives them to it. ``hidden`` is [B, T, D], the states before the head, with their
    graph, and None outside ``loss_terms``. What a policy writes into ``metrics`` goes into the next event.
    """

    step: int
    total_steps: int
    model: nn.Module
    device: torch.device
    rate: float
    input_ids: Tensor
    labels: Tensor
    indices: Tensor
    position_ids: Tensor | None = None
    hidden: Tensor | None = None
    cross_entropy: float = 0.0
    metrics: dict[str, float | Tensor] = field(default_factory=dict)


class Policy:
    """A method's part in training; every hook does nothing unless overridden.

    Policies are called in their order in the list. Once: ``check_domains`` of all, ``attach`` of all, ``param_groups``,
    ``optimizer`` and ``auxiliary_groups`` of all, ``load_state_dict`` if a run is resumed. Then every step:

        begin_step                  before anything is computed
        loss_terms                  for each micro-batch, after the forward pass
        (backward; gradients are checked and clipped; a step with a non-finite loss or gradient ends here)
        after_backward              gradients of the whole batch are complete
        (the loop's optimizer, then the policies' own)
        after_step                  weights are new
        on_eval, reweight           only where validation is due
        state_dict                  only where a checkpoint is due

    and at the end ``finalize``, also of a run that a signal stopped.
    """

    def check_domains(self, domains: Sequence[str], validated: Sequence[str]) -> None:
        """Raise ShearlingError where the policy cannot train on these domains, or not with those that are validated.

        Both are names, and none where windows or validation are of one text; nothing is changed yet.
        """

    def attach(self, model: nn.Module, settings: TrainSettings) -> None:
        """Change the model for training (wrap linears, add buffers); torch's global generator is seeded.

        With several processes parameters become sharded tensors afterwards: look them up anew in what comes later.
        """

    def param_groups(self) -> list[dict[str, Any]] | None:
        """Groups for the loop's AdamW, ``{"params": [...]}`` with optional ``lr`` and ``weight_decay``.

        The schedule scales ``lr``. Where no policy names a parameter here or in ``optimizer``, all parameters of the
        model are trained; otherwise only those named.
        """
        return None

    def auxiliary_groups(self) -> list[dict[str, Any]]:
        """Groups as in ``param_groups`` of the policy's own parameters that a loss needs, beside whatever is trained.

        They say nothing about the model's: all of these are trained if nobody names one.
        """
        return []

    def optimizer(self) -> torch.optim.Optimizer | None:
        """An optimizer of the policy's own, over parameters that no other holds; the loop steps and saves it.

        Its parameters take part in the global gradient norm; its learning rates are left alone. Parameters that are not
        the model's are whole in every process, and their gradients are averaged.
        """
        return None

    def flops_per_token(self, length: int) -> float:
        """FLOPs that the policy's own forward passes add for each token of windows of ``length``."""
        return 0.0

    def capturable(self) -> bool:
        """Whether ``loss_terms`` may be repeated by a CUDA graph, with none of its Python.

        It must then do the same work on the same tensors at every step, read of its context only ``model``,
        ``input_ids``, ``labels``, ``hidden`` and ``cross_entropy``, and write no metrics. Asked before ``attach``.
        """
        return False

    def begin_step(self, step: int, rng: torch.Generator) -> None:
        """Prepare a step; ``rng`` (CPU) depends on the seed and the step alone.

        Called again, with the same numbers, where a step ran out of memory and begins anew.
        """

    def loss_terms(self, ctx: StepContext) -> dict[str, Tensor]:
        """Scalars added to the loss, each a mean over the micro-batch; names must be unique among policies."""
        return {}

    def after_backward(self, ctx: StepContext) -> None:
        """Read or change the gradients; they are clipped already, and go to the optimizers as they are left."""

    def after_step(self, ctx: StepContext) -> None:
        """Act on the new weights (refresh masks, project)."""

    def on_eval(self, metrics: dict[str, float]) -> None:
        """Read validation metrics: ``validation_loss``, and of domains each one's ``validation_loss/<domain>``.

        What a policy writes into them goes into the event.
        """

    def reweight(self, weights: dict[str, float], metrics: dict[str, float]) -> dict[str, float]:
        """Weights by which domains are drawn from the next step on, given the present ones and validation metrics.

        The sampler keeps and saves them. Without domains there are none.
        """
        return weights

    def finalize(self) -> Sequence[Edit]:
        """End training on the model, which becomes stock again, and return the edits that say what was done to it."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """State that is neither a trained parameter nor a buffer of the model: tensors, numbers, strings, nested."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
