"""Mixing domains while a cut model is trained on: fixed proportions, equal ones, dynamic batch loading.

    python benchmarks/domain_loading.py --data DIR [--json FILE] [--quick] [--steps N] [--seeds S ...]

SmolLM2 loses half of its FFN channels (CFSP) and is trained on, all variants alike but for the weights of the eleven
``corpus/*.train`` domains: in proportion to their tokens, equal, by the roots of their tokens, or moved at every
validation by the paper's rule, by its authors' code, or by the rule in smaller steps, which do not compound until two
domains have everything. References are the uncut model's losses on each domain, taken beforehand. The windows that move
the weights, of ``corpus/*.val`` a few even ones, are never those that the table scores, all odd ones. JSON rows of the
mean have all ``weights``: of every step that is logged, and of the end.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from common import Rows, arguments, calibration, device_name, domain_windows

from shearling.data import Domains, spread
from shearling.methods.dynamic_loading import DynamicLoading
from shearling.methods.reference_losses import source_losses
from shearling.methods.structured import plan_structured
from shearling.models import load_model, load_tokenizer
from shearling.recipe import CFSP
from shearling.surgery import cut_
from shearling.train import Policy, TrainSettings, World, train, validation_loss

COLUMNS = ["loading", "seed", "domain", "loss", "reference", "excess", "weight", "tokens", "steps", "seconds"]
#: power of a domain's tokens that it weighs at the start, and settings of DynamicLoading
LOADINGS: dict[str, tuple[float, dict[str, Any] | None]] = {
    "in proportion": (1, None),
    "equal": (0, None),
    "by roots": (0.5, None),
    "dynamic": (1, {}),
    "dynamic, as released": (1, {"clamp": False}),
    "dynamic, eta 0.5": (1, {"eta": 0.5}),
    "dynamic, eta 0.5, smoothing 0.02": (1, {"eta": 0.5, "smoothing": 0.02}),
    "dynamic, eta 0.5, smoothing 0.01, from roots": (0.5, {"eta": 0.5, "smoothing": 0.01}),
}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--steps", type=int, help="of every variant")
    parser.add_argument("--seeds", nargs="+", type=int, help="two, but one with --quick")
    parser.add_argument("--loadings", nargs="+", choices=list(LOADINGS), help="all, but two with --quick")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    args = parser.parse_args()
    seeds = args.seeds or ([0] if args.quick else [0, 1])
    loadings = args.loadings or (["in proportion", "dynamic"] if args.quick else list(LOADINGS))
    gpu = args.device.startswith("cuda")
    small = args.quick or not gpu
    length, batch, steps, most = (64, 4, 6, 2000) if small else (1024, 32, 400, None)
    steps = args.steps or steps
    dense: Any = load_model(args.model, dtype=torch.float32, device=args.device)
    tokenizer = load_tokenizer(args.model)
    text = domain_windows(args.data, tokenizer, "train", length, most)
    held_out = domain_windows(args.data, tokenizer, "val", length, most)
    moving = {name: spread(part[::2], 8) for name, part in held_out.items()}
    scored = {name: part[1::2] for name, part in held_out.items()}
    settings = TrainSettings(
        tokens=steps * batch * length,
        length=length,
        batch=batch,
        micro_batch=min(batch, 16),
        learning_rate=args.learning_rate,
        validate_every=max(1, steps // 20),
        log_every=max(1, steps // 20),
        compile=gpu,
        capture=gpu,
    )
    reference = source_losses(dense, moving, settings, World())
    goal = source_losses(dense, scored, settings, World())
    tokens = calibration(args.data, tokenizer, *((4, 64) if small else (64, 1024))).to(args.device)
    outcome = plan_structured(dense, tokens, CFSP(sparsity=0.5), batch=4)
    cut: Any = copy.deepcopy(dense)
    cut_(cut, outcome.edits)
    del dense
    rows = Rows(COLUMNS, args.json)
    print(
        f"# {device_name(args.device)}, torch {torch.__version__}, {sum(map(len, text.values()))} windows", flush=True
    )

    def report(loading: str, model: Any, weights: list[dict[str, float]], **row: Any) -> None:
        losses = {name: validation_loss(model, part, settings, World()) for name, part in scored.items()}
        excess = {name: losses[name] - goal[name] for name in losses}
        for name, loss in losses.items():
            rows.add(
                loading=loading, domain=name, loss=loss, reference=goal[name], excess=excess[name],
                weight=weights[-1][name], **row,
            )  # fmt: skip
        loss, mean = (sum(values.values()) / len(scored) for values in (losses, excess))
        rows.add(loading=loading, domain="mean", loss=loss, excess=mean, weights=weights, **row)
        rows.add(loading=loading, domain="largest gap", excess=max(excess.values()), **row)

    report("none", cut, [dict.fromkeys(text, 0.0)])
    for loading in loadings:
        start, options = LOADINGS[loading]
        for seed in seeds:
            model = copy.deepcopy(cut)
            domains = Domains(text, {name: len(part) ** start for name, part in text.items()})
            policies: list[Policy] = [] if options is None else [DynamicLoading(reference, **options)]
            events: list[dict[str, Any]] = []
            began = time.perf_counter()
            own = TrainSettings(**{**vars(settings), "seed": seed})
            # weights that stay ask for no validation
            back = moving if policies else None
            result = train(model, domains, policies, own, validation=back, on_event=events.append)
            row = {"tokens": result.tokens, "steps": steps, "seconds": time.perf_counter() - began, "seed": seed}
            logged = [event for event in events if "loss" in event]
            weights = [{name: event[f"weight/{name}"] for name in text} for event in logged]
            report(loading, model, [*weights, result.weights], **row)


if __name__ == "__main__":
    main()
