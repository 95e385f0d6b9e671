"""AST's update of all masked weights as one Triton kernel.

Annotations are not postponed here: Triton reads them.
"""

import torch
import triton
import triton.language as tl

from shearling.kernels.tables import Table

BLOCK = 4096
WARPS = 8
_HOW = {"decoupled": 0, "coupled": 1, "l1": 2}


def annealed_adam(
    table: Table,
    step: int,
    *,
    rate: float,
    decay: float,
    how: str,
    second_moment: str,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """As ``annealed_adam_`` of methods/ast.py for every tensor of a table with blocks of BLOCK elements.

    Its kinds are weights, gradients, both moments (float32) and masks (bool).
    """
    # Triton launches on the current device
    with torch.cuda.device_of(table.addresses):
        _annealed_adam[(len(table.owners),)](
            table.addresses,
            table.sizes,
            table.owners,
            table.starts,
            len(table.sizes),
            1 - rate * weight_decay,
            rate / (1 - betas[0] ** step),
            decay,
            1 - betas[0],
            1 - betas[1],
            1 - betas[1] ** step,
            eps,
            HOW=_HOW[how],
            SEEN=second_moment == "ast",
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


@triton.jit(do_not_specialize=["shrink", "rate", "decay", "fresh", "fresh_square", "correction", "eps"])
def _annealed_adam(
    addresses,
    sizes,
    owners,
    starts,
    tensors,
    shrink,
    rate,
    decay,
    fresh,
    fresh_square,
    correction,
    eps,
    HOW: tl.constexpr,
    SEEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    owner = tl.load(owners + block)
    at = tl.load(starts + block) + tl.arange(0, BLOCK)
    inside = at < tl.load(sizes + owner)
    weights = tl.load(addresses + owner).to(tl.pointer_type(tl.float32)) + at
    gradients = tl.load(addresses + tensors + owner).to(tl.pointer_type(tl.float32)) + at
    firsts = tl.load(addresses + 2 * tensors + owner).to(tl.pointer_type(tl.float32)) + at
    seconds = tl.load(addresses + 3 * tensors + owner).to(tl.pointer_type(tl.float32)) + at
    masks = tl.load(addresses + 4 * tensors + owner).to(tl.pointer_type(tl.uint8)) + at

    weight = tl.load(weights, mask=inside, other=0.0) * shrink
    gradient = tl.load(gradients, mask=inside, other=0.0)
    masked = tl.where(tl.load(masks, mask=inside, other=1) > 0, 0.0, weight)
    size_of = tl.abs(masked)
    sign = tl.where(masked > 0, 1.0, tl.where(masked < 0, -1.0, 0.0))
    pull = masked * decay
    if HOW == 2:
        pull = sign * decay
    if HOW == 1:
        gradient += pull
    first = tl.load(firsts, mask=inside, other=0.0)
    first += fresh * (gradient - first)
    seen = gradient
    if SEEN:
        seen = first + pull
    second = tl.load(seconds, mask=inside, other=0.0)
    second = second * (1 - fresh_square) + fresh_square * seen * seen
    step_of = rate / (tl.sqrt(second / correction) + eps)
    if HOW != 1:
        # never past zero
        weight -= sign * tl.minimum(step_of * tl.abs(pull), size_of)
    weight -= step_of * first
    tl.store(weights, weight, mask=inside)
    tl.store(firsts, first, mask=inside)
    tl.store(seconds, second, mask=inside)
