"""Half of SmolLM2 at an exact shape: learned gates, ranked units, whole blocks, chance, and a model from nothing.

    python benchmarks/shearing.py --data DIR [--json FILE] [--quick] [--tokens N] [--variants NAME ...]
        [--instructions DIR/eval/gsm8k/test.jsonl]

All variants spend the same FLOPs: those of ``--tokens`` tokens of training the cut model on cross-entropy, the gates'
stage and teachers counted. They train on the ten ``corpus/*.train`` domains in equal parts, and tell their loss on
WikiText-2 valid on the way. Scored on WikiText-2 test and the held-out corpora, in windows of 2048; with ``--tasks``
also on the zero-shot tasks. With ``--instructions`` a copy of every model is fine-tuned on the first four fifths of
such a file, all alike, and the loss of the other responses is told before and after it. The last table is the time of a
step with gates beside a plain one of the dense model.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import Row, Rows, arguments, device_name, held_out, mixture, report_model, wikitext_valid
from instructions import Instructions
from transformers import AutoModelForCausalLM

from shearling.anatomy import Anatomy, anatomy_of
from shearling.data import spread, windows
from shearling.methods.ranking import plan_ranked, unit_scores
from shearling.methods.sheared_llama import Shearing, ShearingPolicy, kept_of
from shearling.models import load_model, load_tokenizer
from shearling.plan import inventory_after, inventory_of, sizes, target_anatomy
from shearling.recipe import Ranked, Target
from shearling.surgery import cut_
from shearling.train import Distillation, Policy, TrainSettings, compiled, train
from shearling.train.flops import forward_flops

COLUMNS = [
    "variant", "seed", "corpus", "perplexity", "accuracy", "stderr", "loss", "tokens", "tuned_tokens", "context",
    "parameters", "pruning_tokens", "trained_tokens", "flops", "seconds", "dead", "peak_bytes",
]  # fmt: skip
TARGET = {"layers": 28, "hidden": 384, "heads": 6, "kv_heads": 3, "ffn": 1280}


class Variant(NamedTuple):
    """``start`` is where the small model comes from; ``more`` multiplies the FLOPs.

    ``blocks``: whole blocks go, as many as weigh what the target does without.
    """

    start: str
    distill: bool = False
    more: float = 1.0
    blocks: bool = False


VARIANTS = {
    "learned gates": Variant("gates"),
    "activation-ranked": Variant("minitron"),
    "depth only": Variant("shortgpt", blocks=True),
    "depth only, learned gates": Variant("gates", blocks=True),
    "depth only, random": Variant("random-shape", blocks=True),
    "random units": Variant("random-shape"),
    "random initialisation": Variant("nothing"),
    "random initialisation, three times the FLOPs": Variant("nothing", more=3.0),
    "learned gates, distilled": Variant("gates", distill=True),
    "activation-ranked, distilled": Variant("minitron", distill=True),
    "depth only, distilled": Variant("shortgpt", distill=True, blocks=True),
    "depth only, learned gates, distilled": Variant("gates", distill=True, blocks=True),
}


class Bench:
    """The dense model, the texts, and what a token costs."""

    def __init__(self, args: Any) -> None:
        self.args, self.gpu = args, args.device.startswith("cuda")
        self.small = args.quick or not self.gpu
        self.dense: Any = load_model(args.model, dtype=torch.float32, device=args.device)
        self.tokenizer = tokenizer = load_tokenizer(args.model)
        self.length, self.batch = (64, 4) if self.small else (1024, args.batch)
        self.text = mixture(args.data, tokenizer, 4000 if self.small else 10**9, self.length)
        num, length = (4, 128) if self.small else (64, 2048)
        domains = mixture(args.data, tokenizer, num * length, length)
        self.tokens = spread(domains, num).to(args.device)
        self.context = 256 if self.small else 2048
        scored = (2 if self.small else args.windows) * self.context
        self.tasks = args.data / "eval" if args.tasks else None
        self.texts = held_out(args.data, tokenizer, scored, ("web",) if self.small else None)
        self.valid = windows(wikitext_valid(args.data, tokenizer, 32 * self.length), None, self.length)
        self.anatomy = anatomy_of(self.dense.config)
        self.target = Target.model_validate(args.target)
        self.blocks = Target(layers=self.layers_alone())
        self.ranks = unit_scores(self.dense, self.tokens, batch=4) if args.gate_start == "ranked" else None
        self.instructions = args.instructions and Instructions(
            args.instructions, tokenizer, learning_rate=args.instruction_rate, small=self.small, gpu=self.gpu
        )
        #: FLOPs of a token
        self.forward = forward_flops(self.dense, self.length)
        self.budget = 3 * forward_flops(self.cut("random-shape", self.target, 0), self.length) * args.tokens

    def parameters(self, anatomy: Anatomy) -> int:
        layers = range(anatomy.num_layers)
        return sizes(inventory_after(inventory_of(self.dense), self.anatomy, anatomy, layers), anatomy).parameters

    def layers_alone(self) -> int:
        """How many whole blocks weigh as much as the target."""
        goal = self.parameters(target_anatomy(self.anatomy, self.target))
        counts = range(1, self.anatomy.num_layers + 1)
        return min(counts, key=lambda n: abs(self.parameters(target_anatomy(self.anatomy, Target(layers=n))) - goal))

    def gates(self, target: Target) -> ShearingPolicy:
        """Gates that learn which units of the dense model a target keeps."""
        args = self.args
        shearing = Shearing(args.gate_rate, args.multiplier_rate, args.gate_warmup)
        return ShearingPolicy(self.anatomy, kept_of(target_anatomy(self.anatomy, target)), shearing, self.ranks)

    def settings(
        self, tokens: float, learning_rate: float, seed: int, distill: bool, batch: int | None = None
    ) -> TrainSettings:
        batch = self.batch if batch is None or self.small else batch
        per_step = batch * self.length
        steps = max(3, round(tokens / per_step))
        return TrainSettings(
            tokens=steps * per_step,
            length=self.length,
            batch=batch,
            micro_batch=min(16, batch),
            learning_rate=learning_rate,
            cross_entropy=0.0 if distill else 1.0,
            validate_every=max(1, steps // 20),
            log_every=max(1, steps // 20),
            seed=seed,
            compile=self.gpu,
            capture=self.gpu,
        )

    def train(
        self, model: Any, settings: TrainSettings, policies: list[Policy], distill: bool, cost: float
    ) -> tuple[Any, list[Row]]:
        """The result, and the validation losses by the FLOPs spent until then, a token costing ``cost``."""
        events: list[Row] = []
        teacher = copy.deepcopy(self.dense).to(torch.bfloat16 if self.gpu else torch.float32) if distill else None
        followed = [] if teacher is None else [Distillation(teacher)]
        with nullcontext() if teacher is None or not self.gpu else compiled(teacher):
            both = [*followed, *policies]
            result = train(model, self.text, both, settings, validation=self.valid, on_event=events.append)
        seen = [event for event in events if "validation_loss" in event]
        spent = settings.tokens_per_step * cost
        return result, [{"flops": event["step"] * spent, "loss": event["validation_loss"]} for event in seen]

    def cut(self, method: str, target: Target, seed: int) -> Any:
        """The dense model cut to a target by a one-shot method."""
        model = copy.deepcopy(self.dense)
        ranked = Ranked.model_validate({"method": method, "target": target})
        cut_(model, plan_ranked(model, self.tokens, ranked, batch=4, seed=seed).edits)
        return model

    def sheared(self, target: Target, flops: float, seed: int, distill: bool) -> tuple[Any, Row, list[Row]]:
        """The dense model cut by gates that learned for about so many FLOPs, and the curve of that."""
        cost = (3 + distill) * self.forward
        model, policy = copy.deepcopy(self.dense), self.gates(target)
        settings = self.settings(flops / cost, self.args.gate_stage_rate, seed, distill, self.args.gate_batch)
        result, curve = self.train(model, settings, [policy], distill, cost)
        cut_(model, result.edits)
        return model, {"pruning_tokens": settings.tokens, "dead": sum(policy.dead.values())}, curve

    def carry_out(self, variant: Variant, seed: int) -> tuple[Any, Row, list[Row]]:
        """The variant's model, what making it took, and its curve: FLOPs spent and validation loss."""
        began, budget = time.perf_counter(), variant.more * self.budget
        target = self.blocks if variant.blocks else self.target
        row: Row = {}
        curve: list[Row] = []
        match variant.start:
            case "gates":
                model, row, curve = self.sheared(target, self.args.pruning_share * budget, seed, variant.distill)
            case "nothing":
                torch.manual_seed(seed)
                config = self.cut("random-shape", target, seed).config
                model = AutoModelForCausalLM.from_config(config).float().to(self.args.device)
            case method:
                model = self.cut(method, target, seed)
        spent = row.get("pruning_tokens", 0) * (3 + variant.distill) * self.forward
        cost = 3 * forward_flops(model, self.length) + variant.distill * self.forward
        settings = self.settings((budget - spent) / cost, self.args.learning_rate, seed, variant.distill)
        _, after = self.train(model, settings, [], variant.distill, cost)
        curve += [{**point, "flops": spent + point["flops"]} for point in after]
        row |= {
            "seed": seed,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained_tokens": settings.tokens,
            "flops": spent + settings.tokens * cost,
            "seconds": time.perf_counter() - began,
            "peak_bytes": torch.cuda.max_memory_allocated() if self.gpu else None,
        }
        return model, row, curve

    def report(self, rows: Rows, name: str, model: Any, **row: Any) -> None:
        report_model(rows, self, name, model, **row)
        if self.instructions is not None:
            self.instructions.report(rows, name, model, **row)

    def steps(self) -> None:
        """Print the time and memory of a step with gates beside a plain one of the dense model."""
        print("step of the dense model | milliseconds | peak GiB", flush=True)
        for name in ("plain", "with gates"):
            model, times = copy.deepcopy(self.dense), []
            policies = [self.gates(self.target)] if name != "plain" else []
            base = self.settings(24 * self.batch * self.length, 1e-5, 0, False)
            settings = TrainSettings(**{**vars(base), "log_every": 1, "validate_every": 0})
            if self.gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            train(model, self.text, policies, settings, on_event=times.append)
            speeds = [event["tokens_per_second"] for event in times if "loss" in event]
            took = 1e3 * settings.tokens_per_step / statistics.median(speeds[len(speeds) // 3 :])
            peak = torch.cuda.max_memory_allocated() / 2**30 if self.gpu else math.nan
            print(f"{name} | {took:.1f} | {peak:.2f}", flush=True)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=float, help="of plain training of the cut model, which set the FLOPs")
    parser.add_argument("--batch", type=int, default=16, help="windows of 1024 tokens")
    parser.add_argument("--pruning-share", type=float, default=0.3, help="of the FLOPs that the gates' stage takes")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--target", type=json.loads, default=TARGET, help="the shape, as JSON")
    parser.add_argument("--gate-stage-rate", type=float, default=3e-4, help="learning rate of the weights beside gates")
    parser.add_argument("--gate-batch", type=int, help="windows a step beside gates")
    parser.add_argument("--gate-rate", type=float, default=Shearing.learning_rate, help="learning rate of gates")
    parser.add_argument("--multiplier-rate", type=float, default=Shearing.multiplier_rate, help="and of multipliers")
    parser.add_argument(
        "--gate-warmup", type=float, default=Shearing.warmup, help="share of the steps the targets rise"
    )
    parser.add_argument("--gate-start", choices=("open", "ranked"), default="open")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--windows", type=int, default=32, help="of every corpus that are scored")
    parser.add_argument("--tasks", action="store_true", help="zero-shot tasks too")
    parser.add_argument("--instructions", type=Path, help="JSONL of questions and answers to fine-tune every model on")
    parser.add_argument("--instruction-rate", type=float, default=1e-4, help="learning rate of that")
    parser.add_argument("--steps", action="store_true", help="the last table alone")
    args = parser.parse_args()
    args.tokens = args.tokens or (4000 if args.quick or not args.device.startswith("cuda") else 40e6)
    bench = Bench(args)
    rows = Rows(COLUMNS, args.json)
    print(f"# {device_name(args.device)}, torch {torch.__version__}, {bench.text.numel()} unique tokens", flush=True)

    if not args.steps:
        bench.report(rows, "dense", bench.dense, parameters=bench.parameters(bench.anatomy))
        for name in args.variants:
            for seed in args.seeds:
                model, row, curve = bench.carry_out(VARIANTS[name], seed)
                bench.report(rows, name, model, **row)
                points = ", ".join(f"{point['flops']:.3g}: {math.exp(point['loss']):.2f}" for point in curve)
                print(f"# {name}, perplexity of WikiText-2 valid by FLOPs: {points}", flush=True)
                del model
    bench.steps()


if __name__ == "__main__":
    main()
