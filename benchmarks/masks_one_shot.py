"""One-shot masks: perplexity of every method and pattern on all linears of the blocks.

    python benchmarks/masks_one_shot.py --data DIR [--json FILE] [--quick]

All methods see the same calibration tokens: 64 windows of 2048, equal parts of the ``corpus/*.train`` domains. They are
scored on WikiText-2 test and the held-out corpora, in windows of 2048.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from common import Rows, arguments, device_name, held_out, mixture, report_quality, score

from shearling.data import spread
from shearling.methods.masks import plan_masks
from shearling.models import load_model, load_tokenizer
from shearling.recipe import Reconstruct, Sparsify
from shearling.surgery import cut_
from shearling.usage import Usage

COLUMNS = ["method", "pattern", "corpus", "perplexity", "sparsity", "tokens", "context", "seconds", "peak_bytes"]


def methods(pattern: str, steps: int) -> dict[str, Sparsify]:
    """Settings by the name they have in the table."""
    train = Reconstruct(steps=steps, learning_rate=1e-3)
    return {
        "magnitude": Sparsify(method="magnitude", pattern=pattern),
        "wanda, dense statistics": Sparsify(method="wanda", pattern=pattern, statistics="dense"),
        "wanda, statistics by block": Sparsify(method="wanda", pattern=pattern, statistics="block"),
        "wanda": Sparsify(method="wanda", pattern=pattern),
        "sparsegpt, dense statistics": Sparsify(method="sparsegpt", pattern=pattern, statistics="dense"),
        "sparsegpt": Sparsify(method="sparsegpt", pattern=pattern),
        "alps": Sparsify(method="alps", pattern=pattern),
        "alps, reconstructed": Sparsify(method="alps", pattern=pattern, reconstruct=train),
        "sparsegpt, reconstructed": Sparsify(method="sparsegpt", pattern=pattern, reconstruct=train),
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--patterns", nargs="+", help="N:M or unstructured (half of each row)")
    parser.add_argument("--steps", type=int, default=300, help="training steps of a block")
    args = parser.parse_args()
    quick, gpu = args.quick, args.device.startswith("cuda")
    model: Any = load_model(args.model, dtype=torch.float32, device=args.device)
    tokenizer = load_tokenizer(args.model)
    num, length = (4, 128) if quick else (64, 2048)
    domains = mixture(args.data, tokenizer, num * length, length)
    # every domain alike: its windows lie one after the other
    tokens = spread(domains, num).to(args.device)
    context = 256 if quick else 2048
    texts = held_out(args.data, tokenizer, (4 if quick else 32) * context, ("web",) if quick else None)
    rows = Rows(COLUMNS, args.json)
    print(f"# {device_name(args.device)}, torch {torch.__version__}, calibration {tuple(tokens.shape)}", flush=True)
    batch = 4 if gpu else 1
    report_quality(rows, score(model, texts, context, batch), method="dense", sparsity=0.0, context=context)
    wanted = args.methods or (["magnitude", "wanda", "sparsegpt, dense statistics"] if quick else None)
    for pattern in args.patterns or (["2:4"] if quick else ["2:4", "4:8", "1:4", "unstructured"]):
        for name, settings in methods(pattern, args.steps).items():
            if wanted is not None and name not in wanted:
                continue
            with Usage() as usage:
                outcome = plan_masks(model, tokens, settings, batch=4 if gpu else 2)
                if gpu:
                    torch.cuda.synchronize()
            candidate = copy.deepcopy(model)
            cut_(candidate, outcome.edits)
            masked = outcome.plan.masked
            assert masked is not None
            common = {"method": name, "pattern": pattern, "sparsity": 1 - masked.kept / masked.of, "context": context}
            found = score(candidate, texts, context, batch)
            report_quality(rows, found, **common, seconds=usage.seconds, peak_bytes=usage.peak_bytes)


if __name__ == "__main__":
    main()
