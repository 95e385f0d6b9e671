"""One-shot structured pruning: from statistics to edits, for every method of the family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.anatomy import anatomy_of
from shearling.data import sampled_windows
from shearling.events import OnEvent
from shearling.methods.budgets import Settings, channels_to_remove, share_out
from shearling.methods.dense import decide
from shearling.methods.shearling import plan_sequential
from shearling.plan import Outcome, Plan, Structure, inventory_of, plan_of, unit_parameters
from shearling.recipe import CFSP, Shearling
from shearling.sweep import Store, Walk, fingerprint, measure

#: sequences, and tokens of each, on which next-token distributions are compared
PROBES, PROBE_LENGTH = 8, 512


def plan_structured(
    model: Any,
    tokens: Tensor,
    settings: Settings,
    *,
    batch: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
    state_dir: Path | None = None,
    on_event: OnEvent | None = None,
    name: str = "",
) -> Outcome:
    """Measure a model on calibration windows [num, T] and decide what goes.

    The model is left as it is; carry the edits out with ``surgery.cut_``. ``state_dir`` keeps finished blocks, so
    that a killed measurement goes on where it stopped. Raises ShearlingError for a budget that cannot be met and
    for activations that are not finite.
    """
    anatomy, inventory = anatomy_of(model.config), inventory_of(model)
    budget = channels_to_remove(anatomy, inventory, settings)
    if isinstance(settings, Shearling):
        channel, group = unit_parameters(inventory, anatomy, 0)
        store = Store(None)
        if state_dir is not None:
            store = Store(state_dir / fingerprint(model, tokens, settings.model_dump(), batch, seed)[:16])
        importance, edits = plan_sequential(
            Walk(model, _with_samples(model, tokens, settings.sampled, seed, store), batch=batch, device=device),
            # the probes are short, so that all of them pass at once
            Walk(model, tokens[:PROBES, :PROBE_LENGTH], batch=PROBES, device=device),
            settings,
            lambda: share_out([1.0] * anatomy.num_layers, anatomy, budget, settings),
            remove=budget,
            group_cost=group / channel,
            seed=seed,
            store=store,
            on_event=on_event,
        )
    else:
        walk = Walk(model, tokens, batch=batch, device=device)
        grams = isinstance(settings, CFSP) and (settings.refit or settings.score == "obs")
        heads = isinstance(settings, CFSP) and settings.heads
        cache = None
        if state_dir is not None:
            cache = state_dir / fingerprint(model, tokens, "dense", grams, grams and heads, batch)[:16]
        found = measure(walk, ffn_gram=grams, attention_gram=grams and heads, cache=cache, on_event=on_event)
        importance, edits = decide(walk, found, settings, budget, seed)
    return Outcome(plan_of(name, settings.method, anatomy, inventory, edits, importance), tuple(edits))


def _with_samples(model: Any, tokens: Tensor, num: int, seed: int, store: Store) -> Tensor:
    """Calibration windows and ``num`` that the model writes; kept, since another process might draw others."""
    if num == 0:
        return tokens
    finished = store.tensors("sampled")
    if finished is not None:
        return finished["tokens"].to(tokens.device)
    # documents lie end to end in windows, so what ends one starts the next
    end = model.config.eos_token_id
    end = end[0] if isinstance(end, list) else int(tokens[0, 0]) if end is None else end
    written = sampled_windows(model, tokens, num, tokens.shape[1], start_token=end, seed=seed)
    both = torch.cat([tokens, written.to(tokens.device)])
    store.keep_tensors("sampled", {"tokens": both})
    return both


def preview(model: Any, settings: Settings, name: str = "") -> Plan:
    """The plan's totals before anything is measured: every block at the mean width. ``model`` may be on meta."""
    anatomy, inventory = anatomy_of(model.config), inventory_of(model)
    budget = channels_to_remove(anatomy, inventory, settings)
    widths = share_out([1.0] * anatomy.num_layers, anatomy, budget, settings)
    kept = {f"ffn.{layer}": tuple(range(width)) for layer, width in enumerate(widths)}
    return plan_of(name, settings.method, anatomy, inventory, [Structure(kept)])
