"""Recovery at equal token budgets: importance-guided LoRA, its controls, and all parameters.

    python benchmarks/recovery.py --data DIR [--json FILE] [--quick]

One cut model (CFSP with its refit), trained anew by each method on the same windows: equal parts of the
``corpus/*.train`` domains, next-token loss plus the divergence from the dense model. All LoRA rows have equally many
trainable parameters up to the widths of the blocks. With ``--tune`` several learning rates are scored instead, on
WikiText-2 valid.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from common import Rows, arguments, calibration, device_name, held_out, mixture, report_quality, score, wikitext_valid

from shearling.anatomy import anatomy_of
from shearling.methods.ig_lora import LoRAPolicy, allocate_ranks
from shearling.methods.structured import plan_structured
from shearling.models import load_model, load_tokenizer
from shearling.recipe import CFSP
from shearling.surgery import cut_
from shearling.train import Distillation, Policy, TrainSettings, train

COLUMNS = ["method", "sparsity", "corpus", "perplexity", "trained", "budget", "learning_rate", "seconds", "tokens"]
#: best of the rates below on WikiText-2 valid after a million tokens, as ``--tune`` scores them
RATES = {"lora": 4e-3, "full": 6e-4}
TRIED = {"lora": (5e-4, 1e-3, 2e-3, 4e-3), "full": (1e-4, 3e-4, 6e-4, 1e-3)}
MEAN_RANK = 16


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--budget", type=int, help="tokens of training")
    parser.add_argument("--tune", action="store_true", help="score learning rates on WikiText-2 valid instead")
    args = parser.parse_args()
    quick, gpu = args.quick, args.device.startswith("cuda")
    length = 128 if quick else 512
    budget = args.budget or (2048 if quick else 4_000_000 if gpu else 200_000)
    model: Any = load_model(args.model, dtype=torch.float32, device=args.device)
    tokenizer = load_tokenizer(args.model)
    tokens = calibration(args.data, tokenizer, 4 if quick else 48, 256 if quick else 1024).to(args.device)
    outcome = plan_structured(model, tokens, CFSP(sparsity=args.sparsity), batch=4)
    cut: Any = copy.deepcopy(model)
    cut_(cut, outcome.edits)
    text = mixture(args.data, tokenizer, budget, length)
    context = 256 if quick else 1024
    if args.tune:
        texts = {"wikitext2.valid": wikitext_valid(args.data, tokenizer, 64 * context)}
    else:
        texts = held_out(args.data, tokenizer, (2 if quick else 64) * context, domains=("web",) if quick else None)
    rows = Rows(COLUMNS, args.json)
    print(f"# {device_name(args.device)}, torch {torch.__version__}, windows {tuple(text.shape)}", flush=True)
    common: dict[str, Any] = {"sparsity": args.sparsity, "context": context}
    batch = 8 if gpu else 1
    if not args.tune:
        report_quality(rows, score(model, texts, context, batch), method="dense", **(common | {"sparsity": 0.0}))
        report_quality(rows, score(cut, texts, context, batch), method="not recovered", **common)

    def recover(method: str, rate: float) -> None:
        candidate = copy.deepcopy(cut)
        policies: list[Policy] = []
        if method != "full":
            ranks = allocate_ranks(shares[method], MEAN_RANK, method.removeprefix("lora-"))  # pyrefly: ignore
            policies.append(LoRAPolicy(anatomy_of(candidate.config), ranks))
        policies.append(Distillation(model))
        settings = TrainSettings(
            tokens=budget, length=length, batch=8 if quick else 32, micro_batch=16 if gpu else 2, learning_rate=rate
        )
        result = train(candidate, text, policies, settings)
        # what the LoRA policy merged, or everything
        branches = [t.numel() for edit in result.edits for t in edit.tensors().values()]
        trained = sum(branches) or sum(p.numel() for p in candidate.parameters())
        own = {"trained": trained, "budget": result.tokens, "learning_rate": rate, "seconds": result.seconds}
        report_quality(rows, score(candidate, texts, context, batch), method=method, **common, **own)

    before, after = outcome.plan.anatomy_before.shapes, outcome.plan.anatomy_after.shapes
    shares = {
        "lora-important": list(outcome.plan.importance),
        "lora-damaged": [1 - new.ffn / old.ffn for old, new in zip(before, after, strict=True)],
        "lora-uniform": [1.0] * len(after),
    }
    if args.tune:
        for method, kind in (("lora-uniform", "lora"), ("full", "full")):
            for rate in TRIED[kind]:
                recover(method, rate)
        return
    for method in [*shares, "full"]:
        recover(method, RATES["full" if method == "full" else "lora"])


if __name__ == "__main__":
    main()
