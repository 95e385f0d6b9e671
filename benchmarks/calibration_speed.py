"""What measuring costs beside a plain forward pass, and beside a hook-based two-pass implementation.

    python benchmarks/calibration_speed.py --data DIR [--json FILE] [--quick]

On a CPU: SmolLM2-135M, the same tokens through the same blocks, without the output head. On a GPU: a model of
LLaMA-2-7B's shape with random weights in bfloat16, 128 x 2048 tokens (``--tokens`` and ``--layers`` make it smaller).
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Rows, arguments, calibration, device_name
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from shearling.methods.structured import plan_structured
from shearling.models import load_model, load_tokenizer
from shearling.recipe import CFSP
from shearling.surgery import cut_
from shearling.sweep import Walk, add_product_, measure
from shearling.usage import Usage

COLUMNS = ["what", "device", "seconds", "ratio", "peak_bytes"]


def plain(walk: Walk) -> None:
    """The floor: every block on every batch, nothing else."""
    states = walk.enter()
    for layer in range(len(walk.blocks)):
        for rows in walk.slices():
            states[rows] = walk.run(layer, states[rows])


def products(walk: Walk) -> None:
    """The Gram products alone, on inputs of the same shapes."""
    width, dtype = walk.anatomy.shapes[0].ffn, next(walk.model.parameters()).dtype
    total = torch.zeros(width, width, device=walk.device)
    for rows in walk.slices():
        count = (rows.stop - rows.start) * walk.tokens.shape[1]
        inputs = torch.rand(count, width, device=walk.device, dtype=dtype)
        for _ in walk.blocks:
            add_product_(total, inputs, inputs)


def timed(work: Callable[[], object]) -> float:
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def on_cpu(args: Any, rows: Rows) -> None:
    model = load_model(args.model, dtype=torch.float32)
    num, length = (4, 256) if args.quick else (16, 512)
    tokens = calibration(args.data, load_tokenizer(args.model), num, length)
    walk = Walk(model, tokens, batch=4)
    works: dict[str, Callable[[], object]] = {
        "plain forward": lambda: plain(walk),
        "norms and angles": lambda: measure(walk),
        "Gram products alone": lambda: products(walk),
        "norms, angles and FFN Gram matrices": lambda: measure(walk, ffn_gram=True),
    }
    with torch.no_grad():
        plain(walk)
        # interleaved, so that a slow minute of the machine falls on all alike
        costs: dict[str, list[Usage]] = {name: [] for name in works}
        for _ in range(3 if args.quick else 5):
            for name, work in works.items():
                with Usage() as usage:
                    work()
                costs[name].append(usage)
    found = {name: statistics.median(usage.seconds for usage in values) for name, values in costs.items()}
    floor = found["plain forward"]
    for name, seconds in found.items():
        rest = floor + found["Gram products alone"] if "Gram matrices" in name else floor
        peak = max(usage.peak_bytes for usage in costs[name])
        rows.add(what=name, device=device_name("cpu"), seconds=seconds, ratio=seconds / rest, peak_bytes=peak)


def released(model: Any, tokens: Tensor, sparsity: float) -> None:
    """A straightforward implementation with hooks, after the released method: two passes, a sequence at a time.

    The first pass takes block inputs and outputs for the angles (the diagonal of a full product, as released), the
    second the norms of what the down projections read; then channels are ranked and the matrices sliced.
    """
    blocks = model.model.layers
    angles = [0.0] * len(blocks)
    norms: list[Any] = [0] * len(blocks)

    def angle(layer: int) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            x, y = inputs[0][0].float(), output[0].float()
            product = torch.matmul(x, y.T).diagonal()
            cosine = (product / (x.norm(dim=-1) * y.norm(dim=-1))).nan_to_num(nan=0.5)
            angles[layer] += float((cosine.clamp(-1, 1).arccos() / math.pi).sum())

        return hook

    def norm(layer: int) -> Callable[..., None]:
        def hook(module: Any, inputs: Any) -> None:
            norms[layer] = norms[layer] + inputs[0].float().square().sum((0, 1))

        return hook

    handles = [block.register_forward_hook(angle(layer)) for layer, block in enumerate(blocks)]
    for row in tokens:
        model.model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    handles = [block.mlp.down_proj.register_forward_pre_hook(norm(layer)) for layer, block in enumerate(blocks)]
    for row in tokens:
        model.model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    mean = sum(angles) / len(angles)
    importance = [1 / (1 + math.exp(-(a - mean) / 1e4)) for a in angles]
    for layer, block in enumerate(blocks):
        share = min(1.0, (1 - sparsity) * importance[layer] * len(blocks) / sum(importance))
        kept = norms[layer].topk(int(share * len(norms[layer]))).indices.sort().values
        mlp = block.mlp
        for linear, axis in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
            linear.weight = torch.nn.Parameter(linear.weight.index_select(axis, kept), requires_grad=False)


def random_7b(layers: int, device: str) -> Any:
    """A model of LLaMA-2-7B's shape with random weights."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    # drawn where it is fast
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.to(device).eval().requires_grad_(False)


def on_gpu(args: Any, rows: Rows) -> None:
    layers, num = (4, 16) if args.quick else (args.layers, args.tokens // 2048)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32000, (num, 2048), generator=generator).cuda()
    name = device_name("cuda")
    gram_error(rows, name)

    def once(what: str, home: str, work: Callable[[Any], object], floor: float | None) -> float:
        model = random_7b(layers, home)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            seconds = timed(lambda: work(model))
        except torch.OutOfMemoryError as error:
            print(f"# {what}: out of memory ({error})", flush=True)
            return math.nan
        peak = torch.cuda.max_memory_allocated()
        rows.add(what=what, device=name, seconds=seconds, ratio=seconds / (floor or seconds), peak_bytes=peak)
        return seconds

    def shearling(refit: bool) -> Callable[[Any], None]:
        def work(model: Any) -> None:
            settings = CFSP(sparsity=0.2, refit=refit)
            cut_(model, plan_structured(model, tokens, settings, batch=4, device="cuda").edits)

        return work

    with torch.no_grad():
        # kernels are chosen and compiled before anything is timed
        plan_structured(random_7b(1, "cuda"), tokens[:4], CFSP(sparsity=0.2), batch=4)
        floor = once("plain forward, resident", "cuda", lambda model: plain(Walk(model, tokens, batch=4)), None)
        once("measure, plan, cut: resident", "cuda", shearling(refit=False), floor)
        once("measure, plan, cut: resident, Gram matrices and refit", "cuda", shearling(refit=True), floor)
        once("measure, plan, cut: streamed", "cpu", shearling(refit=False), floor)
        once("measure, plan, cut: streamed, Gram matrices and refit", "cpu", shearling(refit=True), floor)
        once("hooks, two passes", "cuda", lambda model: released(model, tokens, 0.2), floor)


def gram_error(rows: Rows, name: str) -> None:
    """One Gram matrix from half-precision inputs: its time over that of float32 products, its error against float64."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    inputs = torch.randn(32768, 11008, device="cuda", generator=generator).bfloat16()

    def gram(parts: Tensor) -> Tensor:
        total = torch.zeros(parts.shape[1], parts.shape[1], device="cuda")
        for part in parts.split(8192):
            add_product_(total, part, part)
        return total

    wide = inputs.float()
    gram(inputs[:8192]), gram(wide[:8192])
    seconds, floor = timed(lambda: gram(inputs)), timed(lambda: gram(wide))
    sample = inputs[:, :2048]
    exact = sample.double().T @ sample.double()
    error = ((gram(sample) - exact).norm() / exact.norm()).item()
    what = f"Gram matrix of bf16 inputs over float32 products (relative error {error:.1e} against float64)"
    peak = torch.cuda.max_memory_allocated()
    rows.add(what=what, device=name, seconds=seconds, ratio=seconds / floor, peak_bytes=peak, relative_error=error)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128 * 2048)
    args = parser.parse_args()
    rows = Rows(COLUMNS, args.json)
    if args.device.startswith("cuda"):
        on_gpu(args, rows)
    else:
        on_cpu(args, rows)


if __name__ == "__main__":
    main()
