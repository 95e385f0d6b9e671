"""Does leaving out small components help? Perplexity against rank, one block at a time, and the last ones together.

    python benchmarks/denoising.py --data DIR [--json FILE] [--quick] [--methods cp tucker svd] [--ranks R ...]

Feed-forward or attention weights of one block are replaced by their approximation of a share of the full rank (TRAWL by
CP or Tucker over the stacked weights, LASER by the SVD of each), nothing else changes and nothing is trained. Scored on
the first windows of WikiText-2 test and of the held-out corpora.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from common import WIKITEXT, Rows, arguments, device_name, held_out, score

from shearling.anatomy import anatomy_of
from shearling.methods.trawl import plan_trawl
from shearling.models import load_model, load_tokenizer
from shearling.recipe import Denoise
from shearling.surgery import cut_

COLUMNS = ["method", "part", "layers", "rank", "wikitext2", "mean_of_corpora", "ratio", "seconds", "context", "tokens"]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--methods", nargs="+", default=["cp", "svd"], choices=("cp", "tucker", "svd"))
    parser.add_argument("--parts", nargs="+", default=["ffn", "attention"], choices=("ffn", "attention"))
    parser.add_argument("--ranks", nargs="+", type=float, default=[0.1, 0.25, 0.5, 0.75, 0.9])
    parser.add_argument("--windows", type=int, default=4, help="of 2048 tokens, of every corpus")
    parser.add_argument("--every", type=int, default=1, help="block of the model")
    args = parser.parse_args()
    gpu = args.device.startswith("cuda")
    dense: Any = load_model(args.model, dtype=torch.float32, device=args.device)
    tokenizer = load_tokenizer(args.model)
    context = 256 if args.quick else 2048
    texts = held_out(args.data, tokenizer, args.windows * context, ("encyclopedic", "web"))
    rows = Rows(COLUMNS, args.json)
    print(f"# {device_name(args.device)}, torch {torch.__version__}", flush=True)

    def report(model: Any, before: float | None = None, **row: Any) -> float:
        found = score(model, texts, context, 4 if gpu else 1)
        value, count = found.pop(WIKITEXT)
        mean = sum(v for v, _ in found.values()) / len(found)
        ratio = None if before is None else value / before
        rows.add(**row, wikitext2=value, mean_of_corpora=mean, ratio=ratio, context=context, tokens=count)
        return value

    before = report(dense, method="dense")
    last = anatomy_of(dense.config).num_layers
    alone = [(layer,) for layer in range(0, last, last - 1 if args.quick else args.every)]
    together = [] if args.quick else [tuple(range(last - count, last)) for count in (3, 6)]
    for method in args.methods:
        for part in args.parts:
            for layers in (*alone, *together):
                for rank in args.ranks[::2] if args.quick else args.ranks:
                    began = time.perf_counter()
                    outcome = plan_trawl(dense, Denoise(method=method, part=part, layers=layers, rank=rank))
                    model = copy.deepcopy(dense)
                    cut_(model, outcome.edits)
                    row = {"method": method, "part": part, "layers": " ".join(map(str, layers)), "rank": rank}
                    report(model, before, **row, seconds=time.perf_counter() - began)


if __name__ == "__main__":
    main()
