"""From statistics to edits: parity with the released method, exact budgets, and what the edits make of a model."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shearling.anatomy import expressible
from shearling.errors import ShearlingError
from shearling.export import plan_record
from shearling.methods.structured import Settings, plan_structured, preview
from shearling.plan import Structure
from shearling.recipe import CFSP, Baseline, CFSPReference, Reconstruct, Shearling
from shearling.surgery import cut_
from tests.tiny import FAMILIES, tiny_config, tiny_model, tiny_tokens

FULL, LAYERS = 48, 3
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")


def kept_sets(outcome: Any) -> dict[str, tuple[int, ...]]:
    return dict(next(edit for edit in outcome.edits if isinstance(edit, Structure)).kept)


def widths(outcome: Any) -> list[int]:
    return [shape.ffn for shape in outcome.plan.anatomy_after.shapes]


def dense_inputs(model: Any, tokens: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Inputs and outputs of every block, and inputs of every down projection, by hooks on a plain forward pass."""
    seen: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    handles = []
    for block in model.model.layers:
        handles.append(block.register_forward_pre_hook(lambda m, a: seen[0].append(a[0].detach())))
        handles.append(block.register_forward_hook(lambda m, a, o: seen[1].append(o.detach())))
        handles.append(block.mlp.down_proj.register_forward_pre_hook(lambda m, a: seen[2].append(a[0].detach())))
    with torch.no_grad():
        model.model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def released(model: Any, tokens: Tensor, p: float) -> dict[str, tuple[int, ...]]:
    """The released method, from the formulas: angles, sigmoid, cap, ranking by norm, floor(I keep) + 1 channels."""
    x, y, c = dense_inputs(model, tokens)
    angle = []
    for before, after in zip(x, y, strict=True):
        cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).clamp(-1, 1)
        # summed over 131072 tokens and divided by 1e4
        angle.append(float(cosine.arccos().div(math.pi).mean()) * 13.1072)
    g = [1 / (1 + math.exp(-(a - sum(angle) / len(angle)))) for a in angle]
    mean = sum(g) / len(g)
    if max(g) / mean * (1 - p) >= 1:
        s = mean * (1 / (1 - p) - 1) / (max(g) - mean) / 1.05
        g = [mean + s * (v - mean) for v in g]
    kept = {}
    for layer, inputs in enumerate(c):
        norm = inputs.double().flatten(0, 1).square().sum(0)
        number = min(math.floor(FULL * (1 - p) * g[layer] / mean) + 1, FULL)
        kept[f"ffn.{layer}"] = tuple(sorted(norm.argsort(descending=True)[:number].tolist()))
    return kept


@pytest.mark.parametrize("family", GATED)
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.62])
def test_reference_keeps_what_the_formulas_keep(family: str, p: float) -> None:
    model, tokens = tiny_model(family, seed=3), tiny_tokens(6, 20, seed=1)
    outcome = plan_structured(model, tokens, CFSPReference(sparsity=p), batch=2)
    assert kept_sets(outcome) == released(model, tokens, p)


@pytest.mark.parametrize(
    "settings",
    [
        *(CFSP(sparsity=0.37, score=score) for score in ("act", "wanda", "eq8", "eq8xn", "flap", "obs")),
        CFSP(sparsity=0.37, allocation="uniform", refit=False),
        CFSP(sparsity=0.5, uniform=True),
        CFSP(sparsity=0.5, round_to=8),
        *(Baseline(method=method, sparsity=0.37) for method in ("wanda-sp", "flap", "magnitude", "random")),
        Shearling(sparsity=0.37),
        Shearling(sparsity=0.5, uniform=True),
        Shearling(sparsity=0.5, round_to=8),
    ],
    ids=lambda s: f"{s.method}-{getattr(s, 'score', '')}-{s.round_to}-{s.uniform}",
)
def test_the_budget_is_met_exactly(settings: Settings) -> None:
    outcome = plan_structured(tiny_model("llama"), tiny_tokens(6, 24), settings, batch=3)
    wanted = FULL * LAYERS - round(settings.sparsity * FULL * LAYERS)
    assert sum(widths(outcome)) == wanted
    assert all(width % settings.round_to == 0 for width in widths(outcome))
    if settings.uniform:
        assert len(set(widths(outcome))) == 1


@pytest.mark.parametrize("of", ["parameters", "bytes"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_budgets_of_the_whole_model(family: str, of: Any) -> None:
    model = tiny_model(family)
    outcome = plan_structured(model, tiny_tokens(), CFSP(sparsity=0.15, of=of), batch=2)
    before, after = getattr(outcome.plan.before, of), getattr(outcome.plan.after, of)
    channel = (before - after) / (FULL * LAYERS - sum(widths(outcome)))
    assert abs(before - after - 0.15 * before) <= channel


@pytest.mark.parametrize(
    "settings", [CFSP(sparsity=0.4), CFSP(sparsity=0.4, score="flap"), CFSPReference(sparsity=0.4),
                 Baseline(method="flap", sparsity=0.4), Baseline(method="wanda-sp", sparsity=0.4)],
    ids=lambda s: f"{s.method}-{getattr(s, 'score', '')}",
)  # fmt: skip
@pytest.mark.parametrize("times", [2, 3, 5])
def test_repeating_the_text_changes_nothing(settings: Settings, times: int) -> None:
    model, tokens = tiny_model("llama", seed=5), tiny_tokens(4, 24, seed=2)
    once = plan_structured(model, tokens, settings, batch=2)
    often = plan_structured(model, tokens.repeat(times, 1), settings, batch=2)
    assert kept_sets(once) == kept_sets(often)
    assert once.plan.importance == pytest.approx(often.plan.importance, rel=1e-9)


def test_refit_is_the_ridge_solution_on_dense_inputs() -> None:
    model, tokens = tiny_model("llama", seed=1), tiny_tokens(8, 32, seed=3)
    outcome = plan_structured(model, tokens, CFSP(sparsity=0.5), batch=4)
    cut = copy.deepcopy(model)
    cut_(cut, outcome.edits)
    inputs = dense_inputs(model, tokens)[2]
    for layer, kept in enumerate(kept_sets(outcome)[f"ffn.{n}"] for n in range(LAYERS)):
        c = inputs[layer].flatten(0, 1).double().numpy()
        w = model.model.layers[layer].mlp.down_proj.weight.detach().double().numpy()
        damping = 0.01 * (c**2).sum(0).mean()
        # ridge as least squares over rows that hold the weights in place
        rows = np.vstack([c[:, kept], math.sqrt(damping) * np.eye(len(kept))])
        goal = np.vstack([c @ w.T, math.sqrt(damping) * w.T[list(kept)]])
        solution = np.linalg.lstsq(rows, goal, rcond=None)[0].T
        found = cut.model.layers[layer].mlp.down_proj.weight.detach().double().numpy()
        np.testing.assert_allclose(found, solution, atol=1e-4)
        error = np.square(c @ w.T - c[:, kept] @ found.T).sum()
        assert error <= np.square(c @ w.T - c[:, kept] @ w.T[list(kept)]).sum()


def test_flap_bias_keeps_the_mean_output() -> None:
    model, tokens = tiny_model("llama", seed=1), tiny_tokens(8, 32, seed=3)
    outcome = plan_structured(model, tokens, Baseline(method="flap", sparsity=0.5), batch=4)
    cut = copy.deepcopy(model)
    cut_(cut, outcome.edits)
    inputs = dense_inputs(model, tokens)[2]
    for layer, c in enumerate(inputs):
        kept = list(kept_sets(outcome)[f"ffn.{layer}"])
        dense = model.model.layers[layer].mlp.down_proj(c).flatten(0, 1).mean(0)
        short = cut.model.layers[layer].mlp.down_proj(c[..., kept]).flatten(0, 1).mean(0)
        torch.testing.assert_close(short, dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [CFSP(sparsity=0.4), Baseline(method="flap", sparsity=0.4), Shearling(sparsity=0.5, heads=True),
     Shearling(sparsity=0.4, reconstruct=Reconstruct(steps=3)), CFSP(sparsity=0.5, heads=True),
     CFSP(sparsity=0.5, heads=True, refit=False)],
    ids=["cfsp", "flap", "heads", "reconstruct", "cfsp-heads", "cfsp-heads-cut-alone"],
)  # fmt: skip
def test_edits_make_the_plan_true(family: str, settings: Settings) -> None:
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outcome = plan_structured(model, tiny_tokens(6, 24), settings, batch=2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} was changed by planning"
    cut = copy.deepcopy(model)
    assert cut_(cut, outcome.edits) == outcome.plan.anatomy_after
    assert sum(p.numel() for p in cut.parameters()) == outcome.plan.after.parameters
    assert torch.isfinite(cut(tiny_tokens()).logits).all()
    stored = json.loads(json.dumps(plan_record(outcome.plan, cut.config)))
    assert len(stored["blocks"]) == LAYERS
    assert stored["stock"] == expressible(outcome.plan.anatomy_after)


@pytest.mark.parametrize("method", [Shearling, CFSP])
def test_heads_and_channels_share_one_budget(method: Any) -> None:
    model = tiny_model("llama", num_key_value_heads=4)
    tokens = tiny_tokens(8, 32)
    plain = plan_structured(model, tokens, method(sparsity=0.6), batch=4)
    both = plan_structured(model, tokens, method(sparsity=0.6, heads=True), batch=4)
    assert all(shape.kv_heads == 4 for shape in plain.plan.anatomy_after.shapes)
    assert any(shape.kv_heads < 4 for shape in both.plan.anatomy_after.shapes)
    channel = 3 * 32
    assert abs(plain.plan.after.parameters - both.plan.after.parameters) <= channel


def test_heads_that_stay_are_those_that_write_most_and_are_refit() -> None:
    model, tokens = tiny_model("llama", seed=2, num_key_value_heads=4), tiny_tokens(8, 32, seed=3)
    seen: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, args, layer=n: seen[layer].append(args[0]))
        for n, block in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    outcome = plan_structured(model, tokens, CFSP(sparsity=0.6, heads=True), batch=4)
    cut = copy.deepcopy(model)
    cut_(cut, outcome.edits)
    for layer, inputs in enumerate(seen):
        kept = kept_sets(outcome).get(f"kv_group.{layer}")
        if kept is None:
            continue
        c = inputs[0].flatten(0, 1).double().numpy()
        w = model.model.layers[layer].self_attn.o_proj.weight.detach().double().numpy()
        energy = ((c**2).mean(0) * (w**2).sum(0)).reshape(4, -1).sum(1)
        assert set(kept) == set(np.argsort(-energy)[: len(kept)].tolist())
        columns = [group * 8 + offset for group in kept for offset in range(8)]
        lam = 0.01 * np.mean(np.sum(c**2, 0))
        stacked = np.vstack([c[:, columns], np.sqrt(lam) * np.eye(len(columns))])
        wish = np.vstack([c @ w.T, np.sqrt(lam) * w.T[columns]])
        expected = np.linalg.lstsq(stacked, wish, rcond=None)[0].T
        found = cut.model.layers[layer].self_attn.o_proj.weight.detach().double().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-3)
    assert any(space.startswith("kv_group") for space in kept_sets(outcome))


def test_heads_need_a_width_per_block() -> None:
    with pytest.raises(ValueError, match="leave uniform off"):
        CFSP(sparsity=0.5, uniform=True, heads=True)


def test_sequential_refit_beats_cutting_alone() -> None:
    """On the calibration text itself, where least squares must not lose."""
    model, tokens = tiny_model("llama", seed=7), tiny_tokens(16, 32, seed=7)

    def error(settings: Settings) -> float:
        cut = copy.deepcopy(model)
        cut_(cut, plan_structured(model, tokens, settings, batch=4).edits)
        with torch.no_grad():
            return float((cut.model(tokens)[0] - model.model(tokens)[0]).square().mean())

    alone = error(CFSP(sparsity=0.5, refit=False))
    refit = error(CFSP(sparsity=0.5))
    sequential = error(Shearling(sparsity=0.5, correction=1.0, damping=0.01))
    trained = error(Shearling(sparsity=0.5, correction=1.0, damping=0.01, reconstruct=Reconstruct(steps=60)))
    assert trained < sequential < refit < alone


@pytest.mark.parametrize(
    "settings", [CFSP(sparsity=0.4), Shearling(sparsity=0.4, heads=True, reconstruct=Reconstruct(steps=3)),
                 Shearling(sparsity=0.4, sampled=4)],
    ids=["cfsp", "shearling", "sampled"],
)  # fmt: skip
def test_interrupted_measuring_goes_on_to_the_same_edits(settings: Settings, tmp_path: Path) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(6, 24)
    whole = plan_structured(model, tokens, settings, batch=2, state_dir=tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["stage"] == "measure" and event["block"] == 1:
            raise Stop

    with pytest.raises(Stop):
        plan_structured(model, tokens, settings, batch=2, state_dir=tmp_path / "part", on_event=stop)
    rest = plan_structured(model, tokens, settings, batch=2, state_dir=tmp_path / "part")
    assert kept_sets(rest) == kept_sets(whole)
    for ours, theirs in zip(rest.edits, whole.edits, strict=True):
        for name, tensor in theirs.tensors().items():
            assert torch.equal(ours.tensors()[name], tensor), name


def test_what_the_model_writes_changes_the_edits() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(6, 24)
    alone = plan_structured(model, tokens, Shearling(sparsity=0.4), batch=2)
    more = plan_structured(model, tokens, Shearling(sparsity=0.4, sampled=6), batch=2)
    again = plan_structured(model, tokens, Shearling(sparsity=0.4, sampled=6), batch=2)
    assert [e.tensors().keys() for e in more.edits] == [e.tensors().keys() for e in again.edits]
    for ours, theirs in zip(more.edits, again.edits, strict=True):
        assert all(torch.equal(ours.tensors()[name], tensor) for name, tensor in theirs.tensors().items())
    name = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(more.edits[1].tensors()[name], alone.edits[1].tensors()[name])
    assert more.plan.after.parameters == alone.plan.after.parameters


def test_another_sparsity_measures_nothing_anew(tmp_path: Path) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(6, 24)
    plan_structured(model, tokens, CFSP(sparsity=0.4), batch=2, state_dir=tmp_path)
    events: list[Any] = []
    plan_structured(model, tokens, CFSP(sparsity=0.2), batch=2, state_dir=tmp_path, on_event=events.append)
    assert events == []
    plan_structured(model, tiny_tokens(6, 24, seed=9), CFSP(sparsity=0.2), batch=2, state_dir=tmp_path,
                    on_event=events.append)  # fmt: skip
    assert len(events) == LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_preview_needs_no_weights_and_tells_the_totals(family: str) -> None:
    from transformers import AutoModelForCausalLM

    settings = CFSP(sparsity=0.3)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_config(family))
    planned = preview(empty, settings)
    made = plan_structured(tiny_model(family), tiny_tokens(), settings, batch=2).plan
    assert planned.before == made.before
    assert planned.after == made.after


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (CFSP(sparsity=0.99), "1 of 144 channels would stay, fewer than one a block"),
        (CFSP(sparsity=0.9, of="parameters"), "of parameters"),
        (CFSP(sparsity=0.5, round_to=64), "round_to=64"),
        (CFSP(sparsity=0.5, uniform=True, round_to=64), "no width would be left"),
        (Shearling(sparsity=0.95), "is the most"),
    ],
)
def test_budgets_that_cannot_be_met(settings: Settings, what: str) -> None:
    with pytest.raises(ShearlingError, match=what) as caught:
        plan_structured(tiny_model("llama"), tiny_tokens(4, 24), settings, batch=2)
    assert "\n" not in str(caught.value)


def test_infinite_activations_name_the_block() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    for settings in (CFSP(sparsity=0.5), Shearling(sparsity=0.5)):
        with pytest.raises(ShearlingError, match=r"model\.layers\.1: its output is not finite"):
            plan_structured(model, tiny_tokens(), settings, batch=2)
