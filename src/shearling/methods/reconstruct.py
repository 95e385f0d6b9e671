"""Training one cut block to write what the dense block wrote: gradients stay inside the block.

    x, x'    the block's inputs in the dense model and in the model pruned so far
    y        the dense block's output

Each step draws a point between x' and x for every sequence and minimises the squared error against y, relative to the
size of y at each token. Inputs from the way between keep the block from learning one stream by heart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shearling.captured import Captured
from shearling.recipe import Reconstruct
from shearling.sweep import Walk

WARMUP = 10
MIN_RATIO = 0.02


def reconstruct_(
    walk: Walk,
    layer: int,
    block: nn.Module,
    edited: Tensor,
    dense: Tensor,
    target: Tensor,
    settings: Reconstruct,
    seed: int,
    masks: Mapping[str, Tensor] | None = None,
) -> tuple[float, float]:
    """Train all tensors of ``block``, a stand-in for block ``layer``; returns its mean loss in first and last steps.

    ``edited`` (x'), ``dense`` (x) and ``target`` (y) are [num, T, hidden]; a step reads ``walk.batch`` sequences. Adam
    in float32; half-precision blocks are trained in float32 under autocast and come back in their own dtype. Weights
    where ``masks`` (by name inside the block) are False stay +0.0.
    """
    own = {name: p.dtype for name, p in block.named_parameters()}
    block.float()
    gone = [(block.get_parameter(name), ~mask) for name, mask in (masks or {}).items()]
    parameters = list(block.parameters())
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    rate = torch.tensor(settings.learning_rate, device=edited.device)
    cuda = edited.is_cuda
    # a tensor as learning rate, so that a captured step can follow the schedule
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.95), fused=cuda, capturable=cuda)
    x, y = torch.empty_like(edited[: walk.batch]), torch.empty_like(target[: walk.batch])
    loss = torch.zeros((), device=edited.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(edited.device.type, edited.dtype, enabled=edited.dtype != torch.float32):
            written = walk.run_with_grad(layer, x, block)
        goal = y.float()
        error = (written.float() - goal).square().mean(-1) / goal.square().mean(-1)
        mean = error.mean()
        mean.backward()
        optimizer.step()
        with torch.no_grad():
            for parameter, dropped in gone:
                parameter.masked_fill_(dropped, 0)
        loss.copy_(mean.detach())

    generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
    draw = _draws(len(edited), walk.batch, generator)
    losses = torch.zeros(settings.steps, device=edited.device)
    with torch.enable_grad(), _fast_products():
        carry_out = Captured(step) if cuda else step
        for index in range(settings.steps):
            rows = next(draw).to(edited.device)
            way = torch.rand(walk.batch, 1, 1, generator=generator).to(edited)
            x.copy_(torch.lerp(edited[rows], dense[rows], way))
            y.copy_(target[rows])
            done = index / settings.steps
            fall = MIN_RATIO + (1 - MIN_RATIO) * 0.5 * (1 + math.cos(math.pi * done))
            rate.fill_(settings.learning_rate * min(1.0, (index + 1) / WARMUP) * fall)
            carry_out()
            losses[index] = loss
    for p, flag in zip(parameters, before, strict=True):
        p.requires_grad_(flag)
        p.grad = None
    for name, p in block.named_parameters():
        p.data = p.data.to(own[name])
    window = min(WARMUP, settings.steps)
    return losses[:window].mean().item(), losses[-window:].mean().item()


def _draws(num: int, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of the sequences of each step: every one once before any comes again."""
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < count:
            left = torch.cat([left, torch.randperm(num, generator=generator)])
        yield left[:count]
        left = left[count:]


@contextmanager
def _fast_products() -> Iterator[None]:
    """TF32 within the block: training steps need no more."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
