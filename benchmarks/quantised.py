"""Quantised weights, dense and 2:4: perplexity and true bits by method, grid and group.

    python benchmarks/quantised.py --data DIR [--json FILE] [--quick] [--models NAME=FOLDER ...] [--methods NAME ...]

Every model is quantised by every method, from what it is; a masked one keeps its zeros. SmolLM2 as its package ships it
was 4-bit before, so without ``--models`` its rows say little: give folders of models that were trained since. With
64 x 2048 tokens of the training corpora; scored on the first windows of WikiText-2 test and the held-out corpora.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from common import Rows, arguments, device_name, held_out, mixture, report_quality, score

from shearling.anatomy import anatomy_of, is_branch
from shearling.data import spread
from shearling.methods.quantise import plan_quantised
from shearling.models import empty_model, load_model, load_tokenizer
from shearling.plan import Grid, inventory_of, quantised_size
from shearling.recipe import Quantise
from shearling.surgery import attach_adapters_, cut_

COLUMNS = [
    "model", "method", "corpus", "perplexity", "ratio", "bits", "compact_bits", "zeros", "seconds", "peak_bytes",
    "tokens",
]  # fmt: skip
INT4: dict[str, Any] = {"format": "int4", "group": 64}
METHODS: dict[str, Quantise] = {
    "rtn, covering": Quantise(method="rtn", scales="covering", **INT4),
    "rtn": Quantise(method="rtn", **INT4),
    "gptq, covering": Quantise(scales="covering", **INT4),
    "gptq, no order": Quantise(order=False, **INT4),
    "gptq": Quantise(**INT4),
    "gptq, uint4": Quantise(format="uint4", group=64),
    "gptq, a scale a row": Quantise(format="int4"),
    "slim": Quantise(method="slim", compensate=0.1, branches="int8", **INT4),
    "gptq, compensated": Quantise(compensate=0.1, branches="int8", **INT4),
    "rtn, int8": Quantise(method="rtn", format="int8"),
    "rtn, float8": Quantise(method="rtn", format="float8_e4m3"),
}


def zeros_of(model: Any, names: list[str]) -> float:
    """Share of weights that are exactly zero."""
    weights = [model.get_parameter(name) for name in names]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def compact_bits(code: int, bits: float, zeros: float) -> float | None:
    """Of a weight as the runtime holds it, if half are zeros: half of the codes, two bits for the place of each.

    ``bits`` are those of a weight with codes for zeros too; what is beyond ``code`` of them (scales) stays.
    """
    return None if zeros < 0.5 else code / 2 + 1 + bits - code


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--windows", type=int, default=32, help="of 2048 tokens, of every corpus")
    args = parser.parse_args()
    gpu = args.device.startswith("cuda")
    tokenizer = load_tokenizer(args.model)
    num, length, context = (4, 128, 256) if args.quick else (64, 2048, 2048)
    text = mixture(args.data, tokenizer, num * length, length)
    tokens = spread(text, num).to(args.device)
    domains = ("web",) if args.quick else None
    texts = held_out(args.data, tokenizer, (2 if args.quick else args.windows) * context, domains)
    rows = Rows(COLUMNS, args.json)
    print(f"# {device_name(args.device)}, torch {torch.__version__}", flush=True)
    named = dict(wish.split("=", 1) for wish in args.models) or {"dense": args.model}
    for label, folder in named.items():
        model: Any = load_model(folder, dtype=torch.float32, device=args.device)
        # sizes are those of a checkpoint in bfloat16, whose scales are so too
        anatomy, inventory = anatomy_of(model.config), inventory_of(empty_model(folder, "bfloat16"))
        names = [name for layer in range(anatomy.num_layers) for name in anatomy.weights(layer)]
        before = score(model, texts, context, 4 if gpu else 1)
        zeros = zeros_of(model, names)
        weights = sum(inventory[name].numel for name in names)
        # branches that were trained beside it, in bfloat16
        trained = {name: 16 * p.numel() / weights for name, p in model.named_parameters() if is_branch(name)}
        before_bits = 16 + sum(trained.values())
        bits = {"bits": before_bits, "compact_bits": compact_bits(16, before_bits, zeros)}
        report_quality(rows, before, model=label, method="as it is", zeros=zeros, **bits)
        for method in args.methods:
            settings, own, began = METHODS[method], copy.deepcopy(model), time.perf_counter()
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            quant, *branches = plan_quantised(own, tokens, settings, batch=4)
            cut_(own, [quant])
            zeros = zeros_of(own, names)
            for adapters in branches:
                attach_adapters_(own, adapters)
            row: dict[str, Any] = {
                "model": label,
                "method": method,
                "zeros": zeros,
                "seconds": time.perf_counter() - began,
                "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
            }
            size = quantised_size(inventory, anatomy, Grid(settings.format, settings.group))
            made = {name: 8 * p.numel() / weights for name, p in own.named_parameters() if is_branch(name)}
            row["bits"] = size.bits + sum((made | trained).values())
            row["compact_bits"] = compact_bits(quant.bits, row["bits"], zeros)
            found = score(own, texts, context, 4 if gpu else 1)
            for corpus, (value, count) in found.items():
                rows.add(**row, corpus=corpus, perplexity=value, ratio=value / before[corpus][0], tokens=count)
            del own


if __name__ == "__main__":
    main()
