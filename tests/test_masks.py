"""Patterns and one-shot masks, against definitions in float64."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from shearling.anatomy import anatomy_of
from shearling.errors import ShearlingError
from shearling.export import save_model
from shearling.methods.alps import alps
from shearling.methods.masks import plan_masks, preview_masks
from shearling.methods.sparsegpt import inverse_factor, invert_triangular_, sparsegpt
from shearling.methods.wanda import wanda_score
from shearling.plan import Masks, load_edits, save_edits
from shearling.plan.patterns import Pattern, row_mask
from shearling.recipe import Reconstruct, Sparsify
from shearling.surgery import cut_
from tests.tiny import FAMILIES, tiny_config, tiny_model, tiny_tokens


@given(st.sampled_from([(2, 4), (4, 8), (1, 4), (3, 5)]), st.integers(1, 4), st.integers(1, 6), st.integers(0, 10_000))
def test_pattern_keeps_the_highest_and_of_equals_the_first(nm: tuple[int, int], rows: int, groups: int, s: int) -> None:
    keep, of = nm
    # few values, so that many are equal
    score = torch.randint(0, 3, (rows, groups * of), generator=torch.Generator().manual_seed(s)).float()
    mask = Pattern(keep, of).mask(score)
    for row, group in itertools.product(range(rows), range(groups)):
        values = score[row, group * of : (group + 1) * of].tolist()
        best = sorted(range(of), key=lambda i: (-values[i], i))[:keep]
        assert mask[row, group * of : (group + 1) * of].nonzero().flatten().tolist() == sorted(best)


@given(st.integers(1, 5), st.integers(1, 30), st.floats(0, 1))
def test_rows_lose_the_same_number(rows: int, width: int, sparsity: float) -> None:
    score = torch.rand(rows, width)
    mask = row_mask(score, sparsity)
    assert (mask.sum(1) == width - round(sparsity * width)).all()
    for values, kept in zip(score, mask, strict=True):
        if kept.any() and not kept.all():
            assert values[kept].min() >= values[~kept].max()


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:2", "2", "a:b", "2:4:8", ""])
def test_bad_patterns(text: str) -> None:
    with pytest.raises(ShearlingError, match="such as 2:4"):
        Pattern.parse(text)


def test_a_pattern_that_does_not_divide() -> None:
    with pytest.raises(ShearlingError, match="10 inputs are no multiple of 4"):
        Pattern.parse("2:4").mask(torch.rand(3, 10))


def test_wanda_by_definition() -> None:
    weight, x = torch.randn(3, 5), torch.randn(40, 5)
    expected = np.abs(weight.numpy().astype(float)) * np.linalg.norm(x.numpy().astype(float), axis=0)
    np.testing.assert_allclose(wanda_score(weight, x.double().norm(dim=0)).numpy(), expected, rtol=1e-6)


def brute_force(
    weight: np.ndarray, gram: np.ndarray, pattern: Pattern | float, damping: float, block: int
) -> np.ndarray:
    """The method by its definition: after each column, OBS with the inverse of what is left, computed anew."""
    w = weight.astype(float).copy()
    h = gram + damping * np.mean(np.diag(gram)) * np.eye(len(gram))
    inputs = len(h)
    left = {i: np.linalg.inv(h[i:, i:]) for i in range(inputs)}
    mask = np.zeros(w.shape, bool)
    for i in range(inputs):
        size = block if isinstance(pattern, float) else pattern.of
        if i % size == 0:
            stop = min(i + size, inputs)
            score = np.stack([w[:, j] ** 2 / left[j][0, 0] for j in range(i, stop)], 1)
            keep = stop - i - round(pattern * (stop - i)) if isinstance(pattern, float) else pattern.keep
            for row, values in enumerate(score):
                mask[row, i + np.argsort(-values, kind="stable")[:keep]] = True
        error = np.where(mask[:, i], 0, w[:, i]) / left[i][0, 0]
        w[:, i:] -= error[:, None] * left[i][0]
    return w * mask


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8), Pattern(1, 4), Pattern(2, 3), 0.5])
def test_sparsegpt_is_obs_column_by_column(pattern: Pattern | float) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = 144 if isinstance(pattern, Pattern) else 160
    x = torch.randn(400, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, inputs, generator=generator, dtype=torch.float64)
    found = sparsegpt(weight, x.T @ x, pattern)
    expected = brute_force(weight.numpy(), (x.T @ x).numpy(), pattern, 0.01, 128)
    np.testing.assert_allclose(found.weight.numpy(), expected, atol=1e-8)
    assert torch.equal(found.mask, torch.from_numpy(expected != 0))
    assert found.damping == 0.01
    assert not (torch.signbit(found.weight) & (found.weight == 0)).any()


def test_sparsegpt_loses_less_than_wanda_and_magnitude() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    weight = torch.randn(16, 64, generator=generator)

    def error(pruned: torch.Tensor) -> float:
        return float((x @ (pruned - weight).T).square().sum())

    pattern = Pattern(2, 4)
    wanda = error(weight * pattern.mask(wanda_score(weight, x.norm(dim=0))))
    assert error(sparsegpt(weight, x.T @ x, pattern).weight) < 0.7 * wanda
    assert wanda < error(weight * pattern.mask(weight.abs()))


@given(st.integers(1, 400), st.integers(0, 1000))
@hypothesis_settings(max_examples=20, deadline=None)
def test_triangular_matrices_are_inverted(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    upper = torch.randn(size, size, dtype=torch.float64, generator=generator).triu() / size
    upper.diagonal().add_(1)
    inverse = upper.clone()
    invert_triangular_(inverse)
    torch.testing.assert_close(inverse @ upper, torch.eye(size, dtype=torch.float64))
    assert not inverse.tril(-1).any()


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_a_share_is_met_in_every_row_though_blocks_round(sparsity: float) -> None:
    x = torch.randn(700, 576)
    mask = sparsegpt(torch.randn(3, 576), x.T @ x, sparsity).mask
    assert (mask.sum(1) == 576 - round(sparsity * 576)).all()


def best_of_all(weight: np.ndarray, gram: np.ndarray) -> float:
    """Least error of a row over all masks 2:4, each with the values that least squares gives it."""
    groups = [list(itertools.combinations(range(start, start + 4), 2)) for start in range(0, len(weight), 4)]
    found = np.inf
    for pairs in itertools.product(*groups):
        stays = np.array(sorted(itertools.chain(*pairs)))
        values = np.linalg.solve(gram[np.ix_(stays, stays)], gram[stays] @ weight)
        gap = -weight.copy()
        gap[stays] += values
        found = min(found, float(gap @ gram @ gap))
    return found


def test_alps_comes_nearer_to_the_best_of_all_masks_than_sparsegpt() -> None:
    excess: dict[Any, float] = {alps: 0.0, sparsegpt: 0.0}
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(60, 12, generator=generator, dtype=torch.float64)
        x = x @ torch.randn(12, 12, generator=generator, dtype=torch.float64)
        weight = torch.randn(8, 12, generator=generator, dtype=torch.float64)
        gram = x.T @ x
        best = sum(best_of_all(row, gram.numpy()) for row in weight.numpy())
        for method in excess:
            gap = method(weight, gram, Pattern(2, 4), damping=1e-9).weight - weight
            error = float((gap @ gram * gap).sum())
            assert error >= best * (1 - 1e-9)
            excess[method] += error / best - 1
    assert excess[alps] < 0.2 * excess[sparsegpt]


def test_alps_leaves_least_squares_on_what_stays() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 48, generator=generator, dtype=torch.float64)
    x[:, 5] = 0
    weight = torch.randn(4, 48, generator=generator, dtype=torch.float64)
    given_gram = x.T @ x
    found = alps(weight, given_gram, 0.5)
    assert torch.equal(given_gram, x.T @ x)
    assert (found.mask.sum(1) == 24).all() and (found.weight[:, 5] == 0).all()
    gram = x.T @ x
    gram += 0.01 * gram.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    dense = weight.clone()
    dense[:, 5] = 0
    for row, mask, value in zip(dense, found.mask, found.weight, strict=True):
        expected = torch.linalg.solve(gram[mask][:, mask], gram[mask] @ row)
        torch.testing.assert_close(value[mask], expected, rtol=1e-6, atol=1e-8)
    with pytest.raises(ShearlingError, match="all zero or not finite"):
        alps(weight, torch.zeros(48, 48), 0.5)


def test_damping_rises_and_is_told() -> None:
    gram = torch.zeros(8, 8, dtype=torch.float64)
    gram[0, 0] = 1.0
    gram[1:, 1:] = -0.02 + 0.0 * torch.eye(7)
    upper, share = inverse_factor(gram, 0.01)
    assert share > 0.01
    lam = share * gram.diagonal().mean()
    product = (upper.T @ upper) @ (gram + lam * torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(product, torch.eye(8, dtype=torch.float64))
    with pytest.raises(ShearlingError, match="use more text"):
        inverse_factor(torch.tensor([[1.0, 9.0], [9.0, 1.0]]), 1e-6)
    with pytest.raises(ShearlingError, match="all zero or not finite"):
        inverse_factor(torch.zeros(4, 4), 0.01)


def test_dead_inputs_lose_their_weights() -> None:
    x = torch.randn(50, 8)
    x[:, 3] = 0
    found = sparsegpt(torch.randn(4, 8), x.T @ x, Pattern(2, 4))
    assert (found.weight[:, 3] == 0).all()
    assert (found.mask.view(4, 2, 4).sum(-1) == 2).all()


def linears(model: Any) -> dict[str, torch.Tensor]:
    """Weights of all linears of the blocks as [out, in]."""
    anatomy = anatomy_of(model.config)
    found = {}
    for layer in range(anatomy.num_layers):
        for inner in anatomy.family.linears:
            weight = model.get_parameter(f"{anatomy.path(layer, inner)}.weight").detach()
            found[anatomy.path(layer, inner)] = weight.T if anatomy.family.model_type == "gpt2" else weight
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        Sparsify(method="magnitude"),
        Sparsify(method="wanda", pattern="1:4"),
        Sparsify(method="sparsegpt", pattern="4:8"),
        Sparsify(method="sparsegpt", statistics="dense", reconstruct=Reconstruct(steps=3)),
        Sparsify(method="wanda", pattern="unstructured", sparsity=0.25),
        Sparsify(method="alps", pattern="1:4"),
        Sparsify(method="alps", pattern="unstructured", sparsity=0.25, statistics="block"),
    ],
    ids=lambda s: f"{s.method}-{s.pattern}-{s.statistics}",
)
def test_every_linear_follows_the_pattern_and_reloads(family: str, settings: Sparsify, tmp_path: Path) -> None:
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    edits = plan_masks(model, tiny_tokens(6, 24), settings, batch=2).edits
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    save_edits(edits, tmp_path / "edits")
    cut_(model, load_edits(tmp_path / "edits"))
    for name, weight in linears(model).items():
        if settings.pattern == "unstructured":
            assert ((weight != 0).sum(1) == weight.shape[1] - round(0.25 * weight.shape[1])).all(), name
        else:
            pattern = Pattern.parse(settings.pattern)
            assert ((weight.unflatten(1, (-1, pattern.of)) != 0).sum(-1) == pattern.keep).all(), name
        assert not (torch.signbit(weight) & (weight == 0)).any()
    save_model(model, None, tmp_path / "model", provenance={})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert not type(again).__name__.startswith("Shearling")
    with torch.no_grad():
        assert torch.equal(again(tiny_tokens()).logits, model(tiny_tokens()).logits)


def inputs_of(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, n=name: seen.__setitem__(n, args[0].flatten(0, 1).double())
        )
        for name in linears(model)
    ]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_wanda_with_dense_statistics_is_its_formula(family: str) -> None:
    model, tokens = tiny_model(family, seed=4), tiny_tokens(6, 24, seed=5)
    (edit,) = plan_masks(model, tokens, Sparsify(method="wanda", statistics="dense"), batch=3).edits
    assert isinstance(edit, Masks) and edit.pattern == "2:4"
    inputs = inputs_of(model, tokens)
    for name, weight in linears(model).items():
        score = weight.double().abs() * inputs[name].norm(dim=0)
        top = score.unflatten(1, (-1, 4)).topk(2, dim=-1).indices
        expected = torch.zeros(weight.shape[0], weight.shape[1] // 4, 4, dtype=torch.bool).scatter_(-1, top, True)
        mask = edit.kept[f"{name}.weight"]
        assert torch.equal(mask.T if family == "gpt2" else mask, expected.flatten(1)), name


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("statistics", ["sequential", "block"])
def test_statistics_are_those_of_the_pruned_model(method: Any, statistics: Any) -> None:
    """Each linear is pruned as if the model had been measured with all linears, or all blocks, before it pruned."""
    model, tokens = tiny_model("llama", seed=6), tiny_tokens(8, 32, seed=7)
    edits = plan_masks(model, tokens, Sparsify(method=method, statistics=statistics), batch=4).edits
    pruned = copy.deepcopy(model)
    cut_(pruned, edits)
    work = copy.deepcopy(model)
    groups: list[tuple[str, ...]] = [
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ]
    if statistics == "block":
        groups = [tuple(itertools.chain(*groups))]
    dense, result = linears(model), linears(pruned)
    for layer, group in itertools.product(range(3), groups):
        inputs = inputs_of(work, tokens)
        for name in dense:
            if name.startswith(f"model.layers.{layer}.") and name.endswith(group):
                x = inputs[name]
                if method == "wanda":
                    new = dense[name] * Pattern(2, 4).mask(wanda_score(dense[name], x.norm(dim=0)))
                else:
                    new = sparsegpt(dense[name], x.T @ x, Pattern(2, 4)).weight
                torch.testing.assert_close(result[name], new, atol=2e-4, rtol=2e-3)
                work.get_submodule(name).weight.data.copy_(result[name])


@pytest.mark.parametrize("statistics", ["sequential", "dense"])
def test_magnitude_alone_reads_no_text(statistics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a block was run")

    model = tiny_model("llama")
    monkeypatch.setattr(type(model.model.layers[0]), "forward", read)
    outcome = plan_masks(model, tiny_tokens(4, 24), Sparsify(method="magnitude", statistics=statistics), batch=2)
    (masks,) = outcome.edits
    for name, mask in masks.kept.items():
        assert torch.equal(mask, Pattern(2, 4).mask(model.get_parameter(name).abs()))
    with pytest.raises(AssertionError, match="a block was run"):
        plan_masks(model, tiny_tokens(4, 24), Sparsify(method="wanda", statistics=statistics), batch=2)


def test_each_step_brings_the_output_nearer() -> None:
    model, tokens = tiny_model("llama", seed=7), tiny_tokens(24, 32, seed=7)

    def error(settings: Sparsify) -> float:
        pruned = copy.deepcopy(model)
        cut_(pruned, plan_masks(model, tokens, settings, batch=4).edits)
        with torch.no_grad():
            return float((pruned.model(tokens)[0] - model.model(tokens)[0]).square().mean())

    magnitude = error(Sparsify(method="magnitude"))
    mended = error(Sparsify(method="sparsegpt"))
    trained = error(Sparsify(method="sparsegpt", reconstruct=Reconstruct(steps=80)))
    assert trained < mended < magnitude


@pytest.mark.parametrize("trained", [False, True])
def test_interrupted_masks_go_on_to_the_same_edits(trained: bool, tmp_path: Path) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(6, 24)
    settings = Sparsify(reconstruct=Reconstruct(steps=3) if trained else None)
    whole = plan_masks(model, tokens, settings, batch=2).edits

    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["block"] == 1:
            raise Stop

    with pytest.raises(Stop):
        plan_masks(model, tokens, settings, batch=2, state_dir=tmp_path, on_event=stop)
    rest = plan_masks(model, tokens, settings, batch=2, state_dir=tmp_path).edits
    for ours, theirs in zip(rest, whole, strict=True):
        assert ours.tensors().keys() == theirs.tensors().keys()
        for name, tensor in theirs.tensors().items():
            assert torch.equal(ours.tensors()[name], tensor), name


def test_inputs_that_are_not_finite_are_named() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = torch.inf
    with pytest.raises(ShearlingError, match=r"model.layers.1.mlp.down_proj: its inputs are not finite"):
        plan_masks(model, tiny_tokens(), Sparsify(method="wanda"))


def test_masks_that_do_not_divide_are_refused_before_anything_is_measured() -> None:
    with pytest.raises(ShearlingError, match="32 inputs are no multiple of 5"):
        plan_masks(tiny_model("llama"), tiny_tokens(), Sparsify(pattern="2:5"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "unstructured"])
def test_preview_tells_what_planning_finds(family: str, pattern: str) -> None:
    model, settings = tiny_model(family), Sparsify(method="magnitude", pattern=pattern, sparsity=0.3)
    with torch.device("meta"):
        planned = preview_masks(AutoModelForCausalLM.from_config(tiny_config(family)).float(), settings)
    outcome = plan_masks(model, tiny_tokens(), settings, batch=2)
    assert planned == outcome.plan
    cut_(model, outcome.edits)
    masked = outcome.plan.masked
    assert masked is not None
    assert masked.kept == sum(int((weight != 0).sum()) for weight in linears(model).values())
    assert masked.of == sum(weight.numel() for weight in linears(model).values())
    assert outcome.plan.before == outcome.plan.after
