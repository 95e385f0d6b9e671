"""Units that a cut keeps though their gates are closed: the paper's constraint beside the corrected one.

    python benchmarks/dead_units.py --data DIR [--json FILE] [--quick] [--steps N] [--target JSON]
        [--constraints NAME ...]

SmolLM2's gates learn alone, its weights stay: first with the share of closed gates as the paper counts it, whose bounds
lie above 0 and below 1, then as methods/hard_concrete.py corrects it. Told are, of the units that the exact target
keeps, those whose gate is closed (below 0.1 without noise) or not open (as the policy counts them) just before gates
become 0 or 1.
"""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import torch
from common import Rows, arguments, device_name, mixture

from shearling.anatomy import anatomy_of
from shearling.methods.hard_concrete import most_open, settled
from shearling.methods.sheared_llama import Shearing, ShearingPolicy, kept_of
from shearling.models import load_model, load_tokenizer
from shearling.plan import target_anatomy
from shearling.recipe import Target
from shearling.train import TrainSettings, train

COLUMNS = ["constraint", "space", "kept", "closed", "not_open", "target", "share", "steps", "seconds"]
CLOSED = 0.1
CONSTRAINTS = {"paper": False, "corrected": True}


class GatesAlone(ShearingPolicy):
    """Gates of weights that stay."""

    def attach(self, model: Any, settings: TrainSettings) -> None:
        model.requires_grad_(False)
        super().attach(model, settings)

    def param_groups(self) -> list[dict[str, Any]]:
        return []


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--steps", type=int, help="of either constraint")
    parser.add_argument("--length", type=int, default=64, help="tokens of the one window a step")
    parser.add_argument("--target", type=json.loads, default={"hidden": 288, "ffn": 768}, help="the shape, as JSON")
    parser.add_argument("--constraints", nargs="+", choices=list(CONSTRAINTS), default=list(CONSTRAINTS))
    args = parser.parse_args()
    steps, length = args.steps or (40 if args.quick else 1600), args.length
    dense: Any = load_model(args.model, dtype=torch.float32, device=args.device)
    anatomy = anatomy_of(dense.config)
    keep = kept_of(target_anatomy(anatomy, Target.model_validate(args.target)))
    text = mixture(args.data, load_tokenizer(args.model), steps * length, length)
    every = max(1, steps // 20)
    settings = TrainSettings(tokens=steps * length, length=length, batch=1, micro_batch=1, log_every=every)
    rows = Rows(COLUMNS, args.json)
    print(f"# {device_name(args.device)}, torch {torch.__version__}, {len(text)} windows", flush=True)
    for name in args.constraints:
        policy = GatesAlone(anatomy, keep, Shearing(binary=1 / steps, corrected=CONSTRAINTS[name]))
        events: list[dict[str, Any]] = []
        began = time.perf_counter()
        train(copy.deepcopy(dense), text, [policy], settings, on_event=events.append)
        last = [event for event in events if "loss" in event][-2]
        assert policy.dead is not None
        for space, parameter in policy.log_alpha.items():
            log_alpha = parameter.detach()
            gates = settled(log_alpha)[most_open(log_alpha, policy.keep[space])]
            rows.add(
                constraint=name, space=space, kept=gates.numel(), closed=int((gates < CLOSED).sum()),
                not_open=policy.dead[space], target=last[f"target/{space}"], share=last[f"closed/{space}"],
                steps=steps, seconds=time.perf_counter() - began,
            )  # fmt: skip


if __name__ == "__main__":
    main()
