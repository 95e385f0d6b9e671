"""A distillation step of the training loop: tokens a second, share of the device's FLOPs, peak memory.

    python benchmarks/training_step.py --data DIR [--json FILE] [--quick]

Student and teacher are the same dense model, the loss is the forward divergence alone, a step reads 32 x 1024 tokens
(on a CPU and with ``--quick`` far fewer). Beside it a plain script: both models compiled whole, logits in full,
the same micro-batches unless ``--plain-micro-batch`` says otherwise. The first row times the matrix products alone;
``ast`` and ``shear`` are captured steps with 2:4 masks that follow the weights, and with gates on every space.
On a GPU the last table says what a captured step's time went into, by a profile of three.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Rows, arguments, device_name, mixture
from torch import Tensor
from torch.nn import functional

from shearling.anatomy import anatomy_of
from shearling.methods.ast import ASTPolicy
from shearling.methods.sheared_llama import Shearing, ShearingPolicy, gate_shapes
from shearling.models import load_model, load_tokenizer
from shearling.plan.patterns import Pattern
from shearling.recipe import AST
from shearling.train import Distillation, Policy, TrainSettings, compiled, train
from shearling.train.flops import forward_flops, peak_flops

COLUMNS = ["what", "micro_batch", "tokens_per_second", "ratio", "flops_utilisation", "peak_bytes", "device"]


def plain_steps(model: Any, teacher: Any, text: Tensor, settings: TrainSettings) -> Iterator[float]:
    """Seconds of each step of a script without a loop, a policy or a chunk."""
    cuda = model.device.type == "cuda"
    student, guide = (torch.compile(m, dynamic=False) if cuda else m for m in (model, teacher))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
    for batch in text.split(settings.batch)[: settings.steps]:
        start = time.perf_counter()
        for ids in batch.to(model.device).split(settings.micro_batch):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=cuda):
                with torch.no_grad():
                    taught = guide(input_ids=ids, use_cache=False).logits
                logits = student(input_ids=ids, use_cache=False).logits
                goal = functional.log_softmax(taught[:, :-1].float(), -1)
                found = functional.log_softmax(logits[:, :-1].float(), -1)
                loss = functional.kl_div(found, goal, reduction="none", log_target=True).sum(-1).mean()
            (loss * len(ids) / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        yield time.perf_counter() - start


def loop_steps(
    model: Any,
    teacher: Any,
    text: Tensor,
    settings: TrainSettings,
    policies: Sequence[Policy] = (),
    also: Callable[[], object] = lambda: None,
) -> list[float]:
    """Seconds of each step of the training loop; ``also`` is called after each."""
    events: list[dict[str, Any]] = []

    def keep(event: dict[str, Any]) -> None:
        events.append(event)
        also()

    with compiled(teacher) if settings.compile else nullcontext():
        train(model, text, [Distillation(teacher), *policies], settings, on_event=keep)
    return [settings.tokens_per_step / event["tokens_per_second"] for event in events if "loss" in event]


#: what a kernel's name contains -> what it does; the first that fits
KERNELS = {
    "attention": ("flash", "fmha", "sdpa"),
    "losses over logits": ("_head_loss",),
    "matrix products": ("gemm", "nvjet", "cutlass", "splitk", "cublas"),
    "optimizer, clipping": ("multi_tensor", "adam", "lpnorm"),
    "compiled pointwise": ("triton",),
    "copies": ("memcpy", "memset", "copy"),
}


def breakdown(profile: torch.profiler.profile, steps: int) -> dict[str, float]:
    """Seconds of a step on the GPU, by what its kernels do; kernels that fit nothing are ``other``."""
    seconds = dict.fromkeys([*KERNELS, "other"], 0.0)
    for event in profile.key_averages():
        # annotations span kernels, and the gaps between them
        if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
            continue
        name = event.key.lower()
        fits = (what for what, parts in KERNELS.items() if any(part in name for part in parts))
        seconds[next(fits, "other")] += event.self_device_time_total / 1e6 / steps
    return seconds


def products(model: Any, tokens: int) -> float:
    """Seconds of all matrix products of a step over ``tokens``, one after the other, attention left out."""
    device = model.device
    weights = [p for name, p in model.named_parameters() if p.ndim == 2 and anatomy_of(model.config).layer_of(name)]
    weights.append(model.get_output_embeddings().weight)
    seconds: dict[tuple[int, ...], float] = {}
    for weight in weights:
        shape = tuple(weight.shape)
        if shape in seconds:
            continue
        w = torch.randn(shape, device=device, dtype=torch.bfloat16)
        x = torch.randn(tokens, shape[1], device=device, dtype=torch.bfloat16)
        y = torch.randn(tokens, shape[0], device=device, dtype=torch.bfloat16)
        took = []
        for _ in range(7):
            torch.cuda.synchronize()
            start = time.perf_counter()
            # the teacher's and the student's forward pass, then both gradients
            for left, right in ((x, w.T), (x, w.T), (y, w), (y.T, x)):
                torch.mm(left, right)
            torch.cuda.synchronize()
            took.append(time.perf_counter() - start)
        seconds[shape] = statistics.median(took)
    return sum(seconds[tuple(weight.shape)] for weight in weights)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--micro-batches", nargs="+", type=int, help="windows at a time")
    parser.add_argument("--plain-micro-batch", type=int)
    parser.add_argument("--steps", type=int, help="steps, of which the first third does not count")
    whats = ["products", "plain", "eager", "compiled", "captured", "ast", "shear", "recomputed", "profile"]
    parser.add_argument("--what", nargs="+", choices=whats, default=whats)
    parser.add_argument("--trace", type=Path, help="file for the profile's table of kernels")
    args = parser.parse_args()
    quick, gpu = args.quick, args.device.startswith("cuda")
    length, batch = (1024, 32) if gpu and not quick else (64, 2)
    steps = args.steps or (24 if gpu else 3)
    dense: Any = load_model(args.model, dtype=torch.float32, device=args.device)
    text = mixture(args.data, load_tokenizer(args.model), steps * batch * length, length)
    text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))[: steps * batch]]
    rows = Rows(COLUMNS, args.json)
    print(f"# {device_name(args.device)}, torch {torch.__version__}, batch {batch} x {length}", flush=True)
    # forward and backward of the student, forward of the teacher
    flops, peak = 4 * forward_flops(dense, length), peak_flops(torch.device(args.device))
    base: list[float] = []

    def report(what: str, micro_batch: int, seconds: float, peak_bytes: int | None) -> None:
        speed = batch * length / seconds
        base.append(speed)
        rows.add(
            what=what,
            micro_batch=micro_batch,
            tokens_per_second=speed,
            ratio=speed / base[0],
            flops_utilisation=None if peak is None else speed * flops / peak,
            peak_bytes=peak_bytes,
            device=device_name(args.device),
        )

    def profiled(*arguments: Any) -> list[float]:
        active = 3
        plan = torch.profiler.schedule(wait=steps - active - 2, warmup=1, active=active)
        with torch.profiler.profile(schedule=plan, acc_events=True) as profile:
            seconds = loop_steps(*arguments, also=profile.step)
        parts = breakdown(profile, active)
        print("what | milliseconds", flush=True)
        for what, took in (*parts.items(), ("a step", statistics.median(seconds[steps // 3 : -active - 2]))):
            print(f"{what} | {1e3 * took:.1f}", flush=True)
        if args.trace:
            table = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90)
            args.trace.write_text(table)
        return seconds[: -active - 2]

    def measure(what: str, micro_batch: int) -> None:
        options: dict[str, Any] = {}
        if gpu:
            captured = what in ("captured", "ast", "shear", "profile")
            options = {"compile": what != "eager", "recompute": what == "recomputed", "capture": captured}
        settings = TrainSettings(
            tokens=steps * batch * length,
            length=length,
            batch=batch,
            micro_batch=micro_batch,
            learning_rate=1e-5,
            cross_entropy=0.0,
            log_every=1,
            **options,
        )
        student, teacher = copy.deepcopy(dense), copy.deepcopy(dense)
        if gpu:
            teacher.bfloat16()
            torch.cuda.reset_peak_memory_stats()
        anatomy = anatomy_of(dense.config)
        if what == "ast":
            run: Callable[..., Iterable[float]] = partial(
                loop_steps, policies=[ASTPolicy(anatomy, Pattern(2, 4), AST(score="magnitude"))]
            )
        elif what == "shear":
            keep = {space: shape[-1] - 1 for space, shape in gate_shapes(anatomy).items()}
            run = partial(loop_steps, policies=[ShearingPolicy(anatomy, keep, Shearing())])
        else:
            run = {"plain": plain_steps, "profile": profiled}.get(what, loop_steps)
        seconds = list(run(student, teacher, text, settings))
        used = torch.cuda.max_memory_allocated() if gpu else None
        report(what, micro_batch, statistics.median(seconds[len(seconds) // 3 :]), used)
        del student, teacher
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
            torch.compiler.reset()

    sizes = args.micro_batches or ([8] if gpu and not quick else [2])
    for what in args.what if gpu else ["plain", "eager"]:
        if what == "products":
            report("matrix products alone", batch, products(dense, batch * length), None)
        elif what == "plain":
            measure(what, args.plain_micro_batch or sizes[0])
        elif what == "profile":
            measure(what, sizes[0])
        else:
            for micro_batch in sizes:
                measure(what, micro_batch)


if __name__ == "__main__":
    main()
