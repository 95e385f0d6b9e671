"""What the cut buys on general devices: prefill and decode speed of dense and cut models, and of sheared shapes.

    python benchmarks/cut_speed.py --data DIR [--json FILE] [--quick]

Channels are cut to widths that are uniform or per layer, and multiples of 64, of 128, or of nothing. On a CPU
SmolLM2-135M in float32; on a GPU a model of LLaMA-2-7B's shape with random weights in bfloat16, whose decode steps are
captured in a CUDA graph, and Sheared LLaMA's two shapes of it.
"""

from __future__ import annotations

import copy
import gc
import itertools
from typing import Any

import torch
from calibration_speed import random_7b
from common import Rows, arguments, device_name

from shearling.anatomy import anatomy_of
from shearling.evaluate import speed
from shearling.methods.cfsp import block_importance, keep_ratios
from shearling.models import load_model
from shearling.plan import Structure, inventory_of, leading, round_to_total, sizes, target_anatomy
from shearling.recipe import Target
from shearling.surgery import cut_

COLUMNS = ["what", "phase", "batch", "tokens_per_second", "ratio", "parameters", "parameter_ratio", "device"]


#: what a 7B model and SmolLM2 are sheared to
SHEARED = {
    "cuda": {
        "sheared to 2.7B": Target(layers=32, hidden=2560, heads=20, kv_heads=20, ffn=6912),
        "sheared to 1.3B": Target(layers=24, hidden=2048, heads=16, kv_heads=16, ffn=5504),
    },
    "cpu": {"sheared": Target(layers=27, hidden=384, heads=6, kv_heads=3, ffn=1280)},
}


def structure(model: Any, sparsity: float, *, uniform: bool, multiple: int) -> Structure:
    """The first channels of each block: one width for all, or widths as angles between 0.05 and 0.4 would give."""
    anatomy = anatomy_of(model.config)
    count, full = anatomy.num_layers, anatomy.shapes[0].ffn
    angles = [0.05 + 0.35 * abs(2 * layer / (count - 1) - 1) for layer in range(count)]
    keep = keep_ratios([1.0] * count if uniform else block_importance(angles), sparsity)
    total = round((1 - sparsity) * full / multiple) * multiple * count
    bounds = {"low": [multiple] * count, "high": [full] * count}
    widths = round_to_total([k * full for k in keep], total, multiple=multiple, **bounds)
    return Structure({f"ffn.{layer}": tuple(range(width)) for layer, width in enumerate(widths)})


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=3, help="timings of which the median counts")
    parser.add_argument("--only", nargs="+", default=[""], help="beside dense the cuts whose names have one of these")
    args = parser.parse_args()
    gpu = args.device.startswith("cuda")
    if gpu:
        dense = random_7b(4 if args.quick else 32, "cuda")
        cases = [(1, 2048, 64), (16, 512, 64)]
    else:
        dense = load_model(args.model, dtype=torch.float32)
        cases = [(1, 64, 8)] if args.quick else [(1, 512, 32)]
    rows = Rows(COLUMNS, args.json)
    name = device_name(args.device)
    base: dict[tuple[str, int], float] = {}
    full = sizes(inventory_of(dense), anatomy_of(dense.config)).parameters
    variants: list[tuple[str, Structure | None]] = [("dense", None)]
    for sparsity, uniform, multiple in itertools.product((0.2, 0.5), (True, False), (64, 128, 1)):
        what = f"{sparsity:.0%} {'uniform' if uniform else 'per layer'}, multiples of {multiple}"
        variants.append((what, structure(dense, sparsity, uniform=uniform, multiple=multiple)))
    if not args.quick:
        anatomy = anatomy_of(dense.config)
        for what, target in SHEARED["cuda" if gpu else "cpu"].items():
            variants.append((what, leading(anatomy, target_anatomy(anatomy, target), range(target.layers))))
    for what, cut in variants:
        if cut is not None and not any(part in what for part in args.only):
            continue
        model = copy.deepcopy(dense)
        if cut is not None:
            cut_(model, [cut])
        parameters = sizes(inventory_of(model), anatomy_of(model.config)).parameters
        for batch, prompt, generate in cases:
            repeats = 1 if args.quick else args.repeats
            found = speed(model, prompt=prompt, generate=generate, batch=batch, repeats=repeats, captured=gpu)
            for phase in ("prefill", "decode"):
                rate = getattr(found, f"{phase}_tokens_per_second")
                floor = base.setdefault((phase, batch), rate)
                rows.add(
                    what=what,
                    phase=phase,
                    batch=batch,
                    tokens_per_second=rate,
                    ratio=rate / floor,
                    parameters=parameters,
                    parameter_ratio=parameters / full,
                    device=name,
                    peak_bytes=found.peak_bytes,
                )
        del model
        gc.collect()


if __name__ == "__main__":
    main()
