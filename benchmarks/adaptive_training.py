"""2:4 by retraining for a fixed time: AST, its relatives, SPP, and what dense training of the same tokens does.

    python benchmarks/adaptive_training.py --data DIR [--json FILE] [--quick] [--seconds S] [--variants NAME ...]

All variants train on the ``corpus/*.train`` domains with the same steps: as many as the first one makes in the given
seconds, by the pace of a short run that is thrown away with its compiling; adapting the dense model is part of them.
They follow the dense model unless they say otherwise, and are trained at every learning rate and seed that is given.
Adapted ones start from, and follow, the dense model after ``--adapt-tokens`` of cross-entropy on the same text.
``--mixture`` says in which proportions domains are read: as they come; equal; even, which is equal but none more than
four times; or moved by dynamic batch loading towards what lags furthest behind the dense model, on windows held back
for that. Scored on WikiText-2 test and the held-out corpora, in windows of 2048; with ``--tasks`` also on the zero-shot
tasks, from their raw files.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import Row, Rows, arguments, device_name, domain_windows, held_out, mixture, report_model
from torch import Tensor

from shearling.anatomy import anatomy_of
from shearling.data import Domains, spread
from shearling.export import save_model
from shearling.methods.ast import ASTPolicy, input_norms, masks_of, unmask_
from shearling.methods.dynamic_loading import DynamicLoading
from shearling.methods.masks import pattern_of, plan_masks
from shearling.methods.reference_losses import source_losses
from shearling.methods.slorb import overhead
from shearling.methods.spp import SPPPolicy
from shearling.models import load_model, load_tokenizer
from shearling.plan import Adapters, Outcome
from shearling.recipe import AST, SPP, Reconstruct, SLoRB, Sparsify
from shearling.surgery import attach_adapters_, cut_
from shearling.train import Distillation, LayerwiseDistillation, Policy, Teacher, TrainSettings, World, compiled, train

COLUMNS = [
    "variant", "learning_rate", "seed", "corpus", "perplexity", "accuracy", "stderr", "tokens", "context", "steps",
    "trained_tokens", "unique_tokens", "tokens_per_second", "seconds", "flips", "away", "overhead", "peak_bytes",
]  # fmt: skip


#: most times that a domain is read, where parts are even; repeated so often text is worth nearly as much as new text
#: (Muennighoff et al., arXiv 2305.16264)
PASSES = 4
#: windows of every domain that dynamic batch loading looks at, and that are not trained on
HELD_BACK = 8


class Variant(NamedTuple):
    """``settings`` None trains the dense model; ``start`` is the one-shot method whose masks come first."""

    settings: AST | SPP | None
    start: str = "wanda"
    cross_entropy: float = 0.0
    distill: float = 1.0
    temperature: float = 1.0
    layerwise: float = 0.0
    adapted: bool = False


VARIANTS = {
    "ast": Variant(AST()),
    "ast, cross-entropy too": Variant(AST(), cross_entropy=0.5, distill=0.5),
    "ast, block outputs too": Variant(AST(), layerwise=1.0),
    "ast from alps": Variant(AST(), start="alps"),
    "ast from alps, reconstructed": Variant(AST(), start="alps, reconstructed"),
    "ast from alps, cross-entropy too": Variant(AST(), start="alps", cross_entropy=0.5, distill=0.5),
    "ast, slorb": Variant(AST(slorb=SLoRB())),
    "ast, slorb, cross-entropy too": Variant(AST(slorb=SLoRB()), cross_entropy=0.5, distill=0.5),
    "adapted, ast from alps": Variant(AST(), start="alps", adapted=True),
    "adapted, ast, slorb": Variant(AST(slorb=SLoRB()), adapted=True),
    "adapted, ast from alps, slorb": Variant(AST(slorb=SLoRB()), start="alps", adapted=True),
    "adapted, ast from alps, int4": Variant(AST(quantise="int4", group=64), start="alps", adapted=True),
    "fixed mask": Variant(AST(refresh_every=0)),
    "fixed mask from alps, reconstructed": Variant(AST(refresh_every=0), start="alps, reconstructed"),
    "static sr-ste": Variant(AST(anneal=0.0, decay_by="coupled")),
    "no decay (dpf)": Variant(AST(decay=0.0)),
    "coupled decay": Variant(AST(decay_by="coupled")),
    "the paper's second moment": Variant(AST(second_moment="ast")),
    "no distillation": Variant(AST(), cross_entropy=1.0, distill=0.0),
    "the paper's mixture": Variant(AST(), cross_entropy=1 / 3, distill=2 / 3, temperature=2.0),
    "magnitude": Variant(AST(score="magnitude"), start="magnitude"),
    "refreshed activations": Variant(AST(score="activation-refreshed")),
    "l1 decay (cast)": Variant(AST(decay_by="l1", decay=1e-6)),
    "soft threshold (s-ste)": Variant(AST(forward="soft", decay=0.0, score="magnitude"), start="magnitude"),
    "slorb, block mean": Variant(AST(slorb=SLoRB(start="block-mean"))),
    "slorb, activation svd": Variant(AST(slorb=SLoRB(start="activation-svd"))),
    "spp": Variant(SPP()),
    "dense, distilled": Variant(None),
    "dense, cross-entropy": Variant(None, cross_entropy=1.0, distill=0.0),
}


def even(sizes: dict[str, int], tokens: float, passes: float) -> dict[str, float]:
    """Tokens of each domain: equal parts, but of none more than so many times what it has."""
    given: dict[str, float] = {}
    left = dict(sizes)
    while left:
        share = (tokens - sum(given.values())) / len(left)
        small = [name for name, size in left.items() if passes * size < share]
        if not small:
            return given | dict.fromkeys(left, share)
        given |= {name: passes * left.pop(name) for name in small}
    return given


class Bench:
    """The dense model, the text, and one-shot masks as they are asked for."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.small, self.gpu = args.quick, args.device.startswith("cuda")
        self.tasks = args.data / "eval" if args.tasks else None
        self.dense: Any = load_model(args.model, dtype=torch.float32, device=args.device)
        self.tokenizer = tokenizer = load_tokenizer(args.model)
        self.length, self.batch = (64, 4) if self.small else (args.length, args.batch)
        self.micro_batch = min(args.micro_batch, self.batch)
        self.domains = domain_windows(
            args.data, tokenizer, "train", self.length, 10 * self.length if self.small else None
        )
        num, length = (4, 128) if self.small else (64, 2048)
        domains = mixture(args.data, tokenizer, num * length, length)
        self.tokens = spread(domains, num).to(args.device)
        self.context = 256 if self.small else 2048
        self.texts = held_out(
            args.data, tokenizer, (2 if self.small else args.windows) * self.context, ("web",) if self.small else None
        )
        self.norms = input_norms(self.dense, self.tokens, 4)
        self.outcomes: dict[str, Outcome] = {}
        #: seconds that making this dense model took, at the pace of the run
        self.spent = 0.0
        self.adapted: Bench | None = None

    def parts(self, tokens: int) -> dict[str, float]:
        """How many of those tokens each domain gives; with ``dynamic`` at first."""
        sizes = {name: part.numel() for name, part in self.domains.items()}
        if self.args.mixture == "natural":
            return {name: tokens * size / sum(sizes.values()) for name, size in sizes.items()}
        return even(sizes, tokens, PASSES if self.args.mixture == "even" else math.inf)

    def unique_tokens(self, tokens: int) -> int:
        """How many of them are read for the first time."""
        return round(sum(min(part, self.domains[name].numel()) for name, part in self.parts(tokens).items()))

    def outcome(self, start: str) -> Outcome:
        if start not in self.outcomes:
            method, _, also = start.partition(", ")
            train_blocks = Reconstruct(steps=3 if self.small else 100, learning_rate=1e-3) if also else None
            settings = Sparsify.model_validate({"method": method, "reconstruct": train_blocks})
            self.outcomes[start] = plan_masks(self.dense, self.tokens, settings, batch=4)
        return self.outcomes[start]

    def adapt(self) -> Bench:
        """The same with a dense model that is used to the text, made once."""
        if self.adapted is None:
            own = copy.copy(self)
            steps = 2 if self.small else math.ceil(self.args.adapt_tokens / self.batch / self.length)
            own.dense, row = self.carry_out(VARIANTS["dense, cross-entropy"], steps, self.args.adapt_rate, 0)
            own.spent = row["trained_tokens"] / row["tokens_per_second"]
            own.norms, own.outcomes = input_norms(own.dense, own.tokens, 4), {}
            self.adapted = own
        return self.adapted

    def reading(self, settings: TrainSettings) -> tuple[Tensor | Domains, list[Policy], dict[str, Tensor] | None]:
        """What is trained on, what mixes it, and what that looks at."""
        if self.args.mixture == "natural":
            return torch.cat(list(self.domains.values())), [], None
        if self.args.mixture in ("equal", "even"):
            return Domains(self.domains, self.parts(settings.tokens)), [], None
        back = {name: part[-HELD_BACK:] for name, part in self.domains.items()}
        text = Domains({name: part[:-HELD_BACK] for name, part in self.domains.items()}, dict.fromkeys(self.domains, 1))
        return text, [DynamicLoading(source_losses(self.dense, back, settings, World()))], back

    def settings(self, variant: Variant, steps: int, learning_rate: float, seed: int) -> TrainSettings:
        return TrainSettings(
            tokens=steps * self.batch * self.length,
            length=self.length,
            batch=self.batch,
            micro_batch=self.micro_batch,
            learning_rate=learning_rate,
            min_ratio=self.args.min_ratio,
            cross_entropy=variant.cross_entropy,
            log_every=1,
            validate_every=max(1, steps // 20) if self.args.mixture == "dynamic" else 0,
            seed=seed,
            compile=self.gpu,
            capture=self.gpu,
        )

    def start(self, variant: Variant) -> tuple[Any, list[Policy]]:
        """The model that is trained, and what keeps to its masks where it has some."""
        model = copy.deepcopy(self.dense)
        if variant.settings is None:
            return model, []
        outcome = self.outcome(variant.start)
        cut_(model, outcome.edits)
        masks = masks_of(outcome.edits)
        if isinstance(variant.settings, SPP):
            return model, [SPPPolicy(anatomy_of(model.config), variant.settings.rank, variant.settings.scale, masks)]
        unmask_(model, self.dense, outcome.edits, masks_alone=variant.settings.slorb is not None)
        pattern = pattern_of(Sparsify())
        return model, [ASTPolicy(anatomy_of(model.config), pattern, variant.settings, masks, self.norms)]

    def carry_out(self, variant: Variant, steps: int, learning_rate: float, seed: int) -> tuple[Any, Row]:
        """Train a variant; the model as it is scored, and what training it was like."""
        model, policies = self.start(variant)
        dense = copy.deepcopy(self.dense).to(torch.bfloat16 if self.gpu else torch.float32)
        teacher = Teacher(dense)
        follow: list[Policy] = []
        if variant.distill:
            follow.append(Distillation(teacher, weight=variant.distill, temperature=variant.temperature))
        if variant.layerwise:
            follow.append(LayerwiseDistillation(teacher, variant.layerwise))
        events: list[Row] = []
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        with compiled(dense) if self.gpu else nullcontext():
            settings = self.settings(variant, steps, learning_rate, seed)
            text, mixing, back = self.reading(settings)
            every = [*follow, *policies, *mixing]
            result = train(model, text, every, settings, validation=back, on_event=events.append)
        speeds = [event["tokens_per_second"] for event in events if "loss" in event]
        row: Row = {
            "learning_rate": learning_rate,
            "seed": seed,
            "steps": steps,
            "trained_tokens": result.tokens,
            "unique_tokens": self.unique_tokens(result.tokens),
            "tokens_per_second": statistics.median(speeds[len(speeds) // 3 :]),
            "seconds": time.perf_counter() - began,
            "peak_bytes": torch.cuda.max_memory_allocated() if self.gpu else None,
        }
        for policy in policies:
            if isinstance(policy, ASTPolicy) and policy.refreshes:
                last = policy.refreshes[-1]
                row |= {"flips": last.flip_rate, "away": last.flips_from_start}
        for edit in result.edits:
            if isinstance(edit, Adapters):
                attach_adapters_(model, edit)
                row["overhead"] = overhead(edit, down_trained=True)
        return model, row


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--seconds", type=float, default=300.0, help="of the first variant's training")
    parser.add_argument("--steps", type=int, help="instead of seconds")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["ast", "ast, slorb", "fixed mask"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="of a training window")
    parser.add_argument("--mixture", choices=("natural", "equal", "even", "dynamic"), default="natural")
    parser.add_argument("--adapt-tokens", type=float, default=5e6, help="of cross-entropy before adapted variants")
    parser.add_argument("--adapt-rate", type=float, default=5e-4, help="learning rate of that")
    parser.add_argument("--min-ratio", type=float, default=0.1, help="of the learning rate, at the end")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--windows", type=int, default=32, help="of every corpus that are scored")
    parser.add_argument("--tasks", action="store_true", help="zero-shot tasks too")
    parser.add_argument("--save", type=Path, help="folder for the trained models, and the dense one that was adapted")
    args = parser.parse_args()
    rows = Rows(COLUMNS, args.json)
    bench = Bench(args)
    tokens = sum(part.numel() for part in bench.domains.values())
    print(f"# {device_name(args.device)}, torch {torch.__version__}, {tokens} tokens of text", flush=True)

    def keep(name: str, model: Any) -> None:
        if args.save is not None:
            save_model(model, bench.tokenizer, args.save / name.replace(", ", "-").replace(" ", "-"), provenance={})

    report_model(rows, bench, "dense", bench.dense)
    wanted = {name: VARIANTS[name] for name in args.variants}
    if any(variant.adapted for variant in wanted.values()):
        report_model(rows, bench, "dense, adapted", bench.adapt().dense)
        keep("dense, adapted", bench.adapt().dense)
    for start, adapted in dict.fromkeys((v.start, v.adapted) for v in wanted.values() if v.settings is not None):
        own = bench.adapt() if adapted else bench
        model = copy.deepcopy(own.dense)
        cut_(model, own.outcome(start).edits)
        report_model(rows, bench, f"{'adapted, ' if adapted else ''}{start}, one-shot", model)
    steps = args.steps or (3 if args.quick else None)
    if steps is None:
        first = next(iter(wanted.values()))
        own = bench.adapt() if first.adapted else bench
        _, row = own.carry_out(first, 24, args.learning_rates[0], 0)
        steps = max(1, int((args.seconds - own.spent) * row["tokens_per_second"] / (bench.batch * bench.length)))
    for name, variant in wanted.items():
        # multiplied by weights, few numbers take large steps
        rates = [variant.settings.learning_rate] if isinstance(variant.settings, SPP) else args.learning_rates
        for rate, seed in itertools.product(rates, args.seeds):
            own = bench.adapt() if variant.adapted else bench
            model, row = own.carry_out(variant, steps, rate, seed)
            report_model(rows, bench, name, model, **row)
            keep(f"{name}, {rate:g}, {seed}", model)


if __name__ == "__main__":
    main()
