"""Trains tiny models in every process that torchrun starts; the first one writes what came of it.

torchrun ... tests/world_child.py OUT KIND [KIND ...] [--state DIR] [--kill STEP]
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from shearling.anatomy import anatomy_of
from shearling.data import Domains
from shearling.methods.ast import ASTPolicy
from shearling.methods.dynamic_loading import DynamicLoading
from shearling.methods.ig_lora import LoRAPolicy
from shearling.methods.sheared_llama import Shearing, ShearingPolicy
from shearling.methods.spp import SPPPolicy
from shearling.plan.patterns import Pattern
from shearling.recipe import AST, SLoRB
from shearling.train import Distillation, LayerwiseDistillation, Policy, Teacher, TrainSettings, train
from tests.tiny import tiny_model, tiny_tokens

LENGTH = 16
SETTINGS = TrainSettings(
    tokens=10 * 8 * LENGTH, length=LENGTH, batch=8, micro_batch=2, learning_rate=1e-2, log_every=1, checkpoint_every=1,
    validate_every=4,
)  # fmt: skip
KINDS = (
    "entropy",
    "distillation",
    "layerwise",
    "lora",
    "ast",
    "spp",
    "quantised",
    "untied",
    "domains",
    "shear",
    "documents",
    "projected",
)


def carry_out(kind: str, state: Path | None = None, on_event: Any = None) -> dict[str, Any]:
    """Train; losses, validation losses and every tensor of the model after it."""
    family = {"lora": "gpt2", "untied": "gemma2"}.get(kind, "llama")
    # each process would draw dropout of its own
    model = tiny_model(family, **({"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if family == "gpt2" else {}))
    policies: list[Policy] = []
    if kind == "distillation":
        policies = [Distillation(tiny_model("llama", seed=3))]
    if kind == "layerwise":
        teacher = Teacher(tiny_model("llama", seed=3))
        policies = [LayerwiseDistillation(teacher, 0.5), Distillation(teacher)]
    if kind == "projected":
        policies = [LayerwiseDistillation(tiny_model("llama", seed=3, hidden_size=48), 0.5)]
    if kind == "lora":
        policies = [LoRAPolicy(anatomy_of(model.config), [2, 3, 4])]
    if kind == "ast":
        wish = AST(refresh_every=2, decay=1e-3, score="activation-refreshed", slorb=SLoRB(size=8))
        policies = [
            Distillation(tiny_model("llama", seed=3)),
            ASTPolicy(anatomy_of(model.config), Pattern(2, 4), wish),
        ]
    if kind == "quantised":
        policies = [
            ASTPolicy(anatomy_of(model.config), Pattern(2, 4), AST(score="magnitude", quantise="int8", group=8))
        ]
    if kind == "spp":
        weights = {name: p.detach() for name, p in model.named_parameters() if "_proj" in name}
        masks = {name: Pattern(2, 4).mask(weight.abs()) for name, weight in weights.items()}
        policies = [SPPPolicy(anatomy_of(model.config), rank=4, masks=masks)]
    if kind == "shear":
        keep = {"layers": 2, "hidden": 24, "kv_group": 1, "ffn": 30}
        # a small rate: gates at full speed turn a difference in the last digit into another choice
        policies = [
            Distillation(tiny_model("llama", seed=3)),
            ShearingPolicy(anatomy_of(model.config), keep, Shearing(learning_rate=0.05, binary=0.2)),
        ]
    # some tokens of the random text end documents, so processes have unequally many labels
    # of quantised weights a difference in the last digit moves some by a whole code, and the more the larger the steps
    own: dict[str, Any] = {"documents": {"separator": 7}, "quantised": {"learning_rate": 1e-3}}
    settings = dataclasses.replace(SETTINGS, **own.get(kind, {}))
    if kind == "documents":
        policies = [Distillation(tiny_model("llama", seed=3), weight=0.5)]
    scores = []

    def hear(event: dict[str, Any]) -> None:
        if "validation_loss" in event:
            scores.append(event["validation_loss"])
        if on_event is not None:
            on_event(event)

    windows, held_out = tiny_tokens(20, LENGTH, seed=5), tiny_tokens(5, LENGTH, seed=6)
    text: Any = windows
    validation: Any = held_out
    if kind == "domains":
        text = Domains({"web": windows[:13], "code": windows[13:]}, {"web": 0.4, "code": 0.6})
        validation = {"web": held_out[:3], "code": held_out[3:]}
        policies = [DynamicLoading({"web": 5.0, "code": 3.0})]
    result = train(model, text, policies, settings, validation=validation, state_dir=state, on_event=hear)
    # a stock model again
    model(windows[:1])
    copy.deepcopy(model)
    assert {key for module in model.modules() for key in vars(module) if "fsdp" in key} <= {"_fsdp_plan"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return {"losses": list(result.losses), "scores": scores, "model": dict(model.state_dict())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("kinds", nargs="+")
    parser.add_argument("--state", type=Path)
    parser.add_argument("--kill", type=int)
    args = parser.parse_args()

    def strike(event: dict[str, Any]) -> None:
        if event["step"] == args.kill and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    found = {kind: carry_out(kind, args.state, strike) for kind in args.kinds}
    if os.environ["RANK"] == "0":
        torch.save(found, args.out)


if __name__ == "__main__":
    sys.exit(main())
