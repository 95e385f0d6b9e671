"""Structured pruning without training: perplexity of every method at equal budgets.

    python benchmarks/structured_one_shot.py --data DIR [--json FILE] [--quick]

All methods are given the same calibration tokens (48 x 1024 of C4) and remove the same number of FFN channels; the
released CFSP rounds up and keeps at most one more a block. ``shearling-reconstructed`` adds 96 windows that the dense
model writes itself, its row "C4 alone" does not. Settings were chosen on WikiText-2 valid.
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import Rows, arguments, calibration, device_name, held_out, report_quality, score

from shearling.anatomy import anatomy_of
from shearling.methods.structured import Settings, plan_structured
from shearling.models import load_model, load_tokenizer
from shearling.plan import inventory_of, sizes
from shearling.recipe import CFSP, Baseline, CFSPReference, Reconstruct, Shearling
from shearling.surgery import cut_


def methods(sparsity: float, *, quick: bool, gpu: bool) -> dict[str, Settings]:
    """Settings by the name they have in the table."""
    # gradients inside one block only: up to 60 s of a GPU or 10 minutes of two cores for the model
    reconstruct = Reconstruct(steps=2 if quick else 300 if gpu else 24)
    table: dict[str, Settings] = {
        "random": Baseline(method="random", sparsity=sparsity),
        "magnitude": Baseline(method="magnitude", sparsity=sparsity),
        "wanda-sp": Baseline(method="wanda-sp", sparsity=sparsity),
        "flap": Baseline(method="flap", sparsity=sparsity),
        "cfsp-reference": CFSPReference(sparsity=sparsity),
        "cfsp": CFSP(sparsity=sparsity),
        "shearling": Shearling(sparsity=sparsity),
        "shearling-reconstructed, C4 alone": Shearling(sparsity=sparsity, reconstruct=reconstruct),
        "shearling-reconstructed": Shearling(sparsity=sparsity, sampled=2 if quick else 96, reconstruct=reconstruct),
    }
    return table


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--sparsities", nargs="+", type=float, help="shares of the FFN channels")
    args = parser.parse_args()
    quick, gpu = args.quick, args.device.startswith("cuda")
    model: Any = load_model(args.model, dtype=torch.float32, device=args.device)
    tokenizer = load_tokenizer(args.model)
    tokens = calibration(args.data, tokenizer, 4 if quick else 48, 256 if quick else 1024).to(args.device)
    context = 256 if quick else 1024
    texts = held_out(args.data, tokenizer, (4 if quick else 64) * context, ("web",) if quick else None)
    columns = ["method", "sparsity", "corpus", "perplexity", "parameters", "tokens", "context", "seconds"]
    rows = Rows(columns, args.json)
    print(f"# {device_name(args.device)}, torch {torch.__version__}, calibration {tuple(tokens.shape)}", flush=True)

    def report(name: str, sparsity: float, candidate: Any, seconds: float) -> None:
        parameters = sizes(inventory_of(candidate), anatomy_of(candidate.config)).parameters
        common = {"method": name, "sparsity": sparsity, "parameters": parameters, "context": context}
        report_quality(rows, score(candidate, texts, context, 8 if gpu else 1), **common, seconds=seconds)

    report("dense", 0.0, model, 0.0)
    wanted = args.methods or (["magnitude", "cfsp-reference", "cfsp", "shearling"] if quick else None)
    with tempfile.TemporaryDirectory() as statistics:
        for sparsity in args.sparsities or ([0.5] if quick else [0.2, 0.35, 0.5]):
            for name, settings in methods(sparsity, quick=quick, gpu=gpu).items():
                if wanted is not None and name not in wanted:
                    continue
                start = time.perf_counter()
                outcome = plan_structured(model, tokens, settings, batch=4, state_dir=Path(statistics))
                if gpu:
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                candidate = copy.deepcopy(model)
                cut_(candidate, outcome.edits)
                report(name, sparsity, candidate, seconds)


if __name__ == "__main__":
    main()
