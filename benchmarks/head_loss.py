"""What a distillation step costs at the output head: forward KL and cross-entropy, forward and backward.

    python benchmarks/head_loss.py --data DIR [--json FILE] [--quick]

Full logits with plain PyTorch under autocast, the chunked loss in plain PyTorch, and the chunked loss with the fused
kernel, on random states and heads (the data folder is not read). On a GPU 32 x 1024 tokens in bfloat16: a head of
SmolLM2-135M's shape, and one of Llama-3-8B's, for which full logits need fewer tokens; all get those few.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from common import Rows, arguments, device_name
from torch import Tensor
from torch.nn import functional as F

from shearling.train import chunked_head_loss, loss
from shearling.train.head import Head
from shearling.usage import Usage

COLUMNS = ["what", "device", "tokens", "width", "vocab", "loss", "seconds", "ratio", "peak_bytes"]
WEIGHTS = {"cross_entropy_weight": 0.5, "divergence_weight": 0.5}

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def full(hidden: Tensor, weight: Tensor, taught: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Both models' logits whole."""
    with torch.no_grad():
        target = F.log_softmax(taught @ teacher.T, -1, dtype=torch.float32)
    logits = hidden @ weight.T
    divergence = F.kl_div(
        F.log_softmax(logits, -1, dtype=torch.float32), target, reduction="batchmean", log_target=True
    )
    return 0.5 * F.cross_entropy(logits.float(), labels) + 0.5 * divergence


def chunked(hidden: Tensor, weight: Tensor, taught: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return chunked_head_loss(hidden, Head(weight), taught, Head(teacher), labels, **WEIGHTS).total


def plain(*tensors: Tensor) -> Tensor:
    with patch.object(loss, "triton_usable", lambda tensor: False):
        return chunked(*tensors)


def step(work: Loss, tensors: list[Tensor]) -> float:
    device = tensors[0].device.type
    for tensor in tensors[:2]:
        tensor.grad = None
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        value = work(*tensors)
    value.backward()
    # waits for the device
    return value.item()


def compare(rows: Rows, device: str, tokens: int, width: int, vocab: int, repeats: int, note: str = "") -> None:
    generator = torch.Generator(device).manual_seed(0)
    name = device_name(device)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    labels = torch.randint(0, vocab, (tokens,), generator=generator, device=device)
    states = [normal(tokens, width).to(dtype) for _ in range(2)]
    # the student's head in float32, as it is trained
    heads = [normal(vocab, width) / math.sqrt(width) for _ in range(2)]
    tensors = [states[0].requires_grad_(), heads[0].requires_grad_(), states[1], heads[1].to(dtype), labels]
    del heads
    works: dict[str, Loss] = {"full logits": full, "chunked, plain PyTorch": plain}
    if loss.triton_usable(labels):
        works["chunked, fused kernel"] = chunked
    floor = 0.0
    for what, work in works.items():
        try:
            value = step(work, tensors)
            costs = []
            for _ in range(repeats):
                with Usage() as usage:
                    step(work, tensors)
                costs.append(usage)
        except torch.OutOfMemoryError as error:
            print(f"# {what}: out of memory ({error})", flush=True)
            continue
        finally:
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
        seconds = statistics.median(usage.seconds for usage in costs)
        floor = floor or seconds
        rows.add(
            what=what + note,
            device=name,
            tokens=tokens,
            width=width,
            vocab=vocab,
            loss=value,
            seconds=seconds,
            ratio=seconds / floor,
            peak_bytes=max(usage.peak_bytes for usage in costs),
        )


def main() -> None:
    args: Any = arguments(__doc__ or "").parse_args()
    rows = Rows(COLUMNS, args.json)
    if not args.device.startswith("cuda"):
        compare(rows, args.device, 256 if args.quick else 1024, 576, 8192 if args.quick else 49152, 3)
        return
    repeats = 3 if args.quick else 10
    # at once the full path holds about 30 bytes for each logit
    room = torch.cuda.get_device_properties(0).total_memory * 0.8 / 30
    for width, vocab in ((576, 49152), (4096, 128256)):
        wanted = 32 * 1024 // (8 if args.quick else 1)
        tokens = wanted
        while tokens * vocab > room:
            tokens //= 2
        few = f" ({tokens} of {wanted} tokens, so that full logits fit)" if tokens < wanted else ""
        compare(rows, args.device, tokens, width, vocab, repeats, few)


if __name__ == "__main__":
    main()
