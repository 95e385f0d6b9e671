"""What a training step will hold at most, from shapes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from shearling.anatomy import anatomy_of
from shearling.train.compiled import compiled
from shearling.train.documents import document_positions
from shearling.train.head import hidden_states, narrow_stream, output_head
from shearling.train.optimizers import build_optimizers
from shearling.train.policy import Policy
from shearling.train.recompute import recomputed
from shearling.train.settings import TrainSettings
from shearling.train.teachers import copied

#: divides a compiled block as Inductor does into what is kept and what is computed again, and generates no code
_PARTITION = "aot_eager_decomp_partition"
#: float32 arrays over a chunk's vocabulary that a loss in plain PyTorch has at a time, with and without a teacher
_ARRAYS = {False: 4, True: 7}


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    ``activations`` are those of a micro-batch that wait for the backward pass, ``head`` what the losses, a teacher
    or a block that is computed again hold beside them, ``beside`` a teacher's weights and whatever else lies there.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    beside: int
    accumulates: bool

    @property
    def peak(self) -> int:
        """The greatest sum: after the last forward pass of a step, or after its backward pass where it has only one."""
        waiting = self.activations + self.head + (self.gradients if self.accumulates else 0)
        return self.weights + self.optimizer + self.beside + max(waiting, self.gradients)


def training_memory(
    model: Any,
    settings: TrainSettings,
    policies: Sequence[Policy] = (),
    *,
    compute: torch.dtype | None = None,
    teacher: Any = None,
    processes: int = 1,
    beside: int = 0,
    chunk: int = 512,
) -> Memory:
    """Memory of the training loop on ``model``, which may be on meta and stays as it is.

    ``compute`` is the type of products, None the weights' own; ``chunk`` the tokens whose logits exist at a time;
    ``beside`` the bytes of what else lies on the device. The forward pass is carried out on tensors without content.
    ``policies`` are attached to a copy, and are used up.
    """
    anatomy = anatomy_of(model.config)
    itemsize = (compute or torch.float32).itemsize
    tokens = settings.micro_batch * settings.length
    empty = copied(model, lambda weight: weight.to("meta"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        empty.to_empty(device="cpu").train()
        empty.tie_weights()
        for policy in policies:
            policy.attach(empty, settings)
        trained = build_optimizers(empty, policies, settings).parameters
        activations, block = _kept(empty, settings, compute), 0
        if settings.recompute:
            everything = _kept(empty, dataclasses.replace(settings, recompute=False), compute)
            block = (everything - activations) // anatomy.num_layers
        head = output_head(empty).weight
        learned = any(parameter is head for parameter in trained)
    gradients = sum(4 * p.numel() for p in trained)
    arrays = _ARRAYS[teacher is not None]
    vocab, hidden = head.shape
    # the logits of a chunk, the head cast, the gradients of the head and of the states before it
    losses = 4 * arrays * min(chunk, tokens) * vocab + (itemsize + 4 * learned) * vocab * hidden + 4 * tokens * hidden
    weights = sum(p.numel() * p.element_size() for p in empty.parameters())
    # masks and the like, whole in every process
    beside += sum(b.numel() * b.element_size() for b in empty.buffers())
    if teacher is not None:
        shape = anatomy_of(teacher.config).shapes[0]
        beside += sum(p.numel() * p.element_size() for p in teacher.parameters())
        # it runs while the student's activations wait, and is done before the losses
        losses = max(losses, tokens * itemsize * (3 * shape.ffn + 4 * anatomy_of(teacher.config).hidden))
    # a block that is computed again comes when the losses are done
    losses = max(losses, block)
    gathered = 0
    if processes > 1:
        # one block whole, and another on its way; the embedding and the head all the time
        rest = head.numel() * (1 if empty.config.tie_word_embeddings else 2)
        gathered = itemsize * (rest + 2 * (weights // 4 - rest) // anatomy.num_layers)
    return Memory(
        weights=weights // processes + gathered,
        gradients=gradients // processes,
        optimizer=2 * gradients // processes,
        activations=activations,
        head=losses,
        beside=beside,
        accumulates=settings.batch // processes > settings.micro_batch,
    )


def _kept(model: Any, settings: TrainSettings, compute: torch.dtype | None) -> int:
    """Bytes of all that a micro-batch's forward pass keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    # alive, so that no address is used twice
    alive: list[Any] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    ids = torch.zeros(settings.micro_batch, settings.length, dtype=torch.int64)
    with ExitStack() as stack:
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        if compute is not None:
            stack.enter_context(torch.autocast("cpu", dtype=compute))
        stack.enter_context(narrow_stream(model, compute))
        if settings.compile:
            stack.enter_context(compiled(model, _PARTITION))
        if settings.recompute:
            stack.enter_context(recomputed(model))
        states = hidden_states(model, ids, document_positions(ids, settings.separator))
    del states
    return sum(kept.values())
