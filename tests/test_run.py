"""Runs: what they leave behind, and that a killed one ends as an undisturbed one."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import shearling
from shearling.commands import cut
from shearling.data import PackedTokens, corpus_tokens, pack
from shearling.errors import ShearlingError
from shearling.evaluate import perplexity
from shearling.methods import teaching
from shearling.methods.corpora import separator_of, training_windows, validation_windows
from shearling.models import load_model, load_tokenizer
from shearling.plan import Structure, load_edits
from shearling.recipe import LoRA, Recipe, load_recipe, parse_recipe
from shearling.run import Interrupted, run
from shearling.train import LayerwiseDistillation
from tests.tiny import tiny_folder, tiny_tokenizer, tiny_tokens

WORDS = "the sheep stood on the hill and the wind went over the grass while the shearer counted them one by one. "


def make_recipe(tmp_path: Path, **changes: Any) -> Path:
    """A recipe file over a tiny model and text files beside it."""
    model = tiny_folder(tmp_path / "dense")
    for name, times in (("calibration", 8), ("recovery", 16), ("evaluation", 6)):
        (tmp_path / f"{name}.txt").write_text(WORDS * times)
    content: dict[str, Any] = {
        "model": str(model),
        "device": "cpu",
        "calibration": {"text": str(tmp_path / "calibration.txt"), "sequences": 6, "length": 32, "batch": 2},
        "evaluate": {"text": str(tmp_path / "evaluation.txt"), "context": 32, "stride": 32, "samples": ["the sheep"]},
        "stages": [
            {"stage": "prune", "method": "cfsp", "sparsity": 0.3},
            {
                "stage": "recover",
                "method": "lora",
                "text": str(tmp_path / "recovery.txt"),
                "tokens": 768,
                "length": 32,
                "batch": 4,
                "micro_batch": 2,
                "learning_rate": 0.01,
                "mean_rank": 2,
                "checkpoint_every": 1,
            },
        ],
    }
    content.update(changes)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(make_recipe(tmp_path))


@pytest.mark.parametrize(
    "stage",
    [
        {"method": "minitron", "target": {"layers": 2, "heads": 2, "ffn": 20}},
        {"method": "shortgpt", "target": {"layers": 1}},
        {"method": "random-shape", "target": {"kv_heads": 1}},
    ],
    ids=lambda stage: stage["method"],
)
def test_a_run_to_an_exact_shape(tmp_path: Path, stage: dict[str, Any]) -> None:
    content = yaml.safe_load(make_recipe(tmp_path).read_text())
    content["stages"][0] = {"stage": "prune", **stage}
    content["calibration"]["stream"] = True
    metrics = run(parse_recipe(content), tmp_path / "out")
    shape = {"layers": 3, "heads": 2 if "kv_heads" in stage["target"] else 4, "kv_heads": 2, "ffn": 48} | stage[
        "target"
    ]
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    fields = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert [config[field] for field in fields] == [shape[size] for size in ("layers", "heads", "kv_heads", "ffn")]
    assert config["model_type"] == "llama"
    assert metrics["recovered"]["parameters"] == metrics["pruned"]["parameters"] < metrics["dense"]["parameters"]
    assert (tmp_path / "out" / "report.html").exists()


def comparable(metrics: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on how often a run was stopped."""
    return {key: value for key, value in metrics.items() if key != "stages"}


def test_a_run_leaves_what_it_promises(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    metrics = run(recipe, out)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    for name in ("recipe.yaml", "plan.json", "metrics.jsonl", "report.html", "log.txt", "model/shearling.json"):
        assert (out / name).stat().st_size > 0
    assert load_recipe(out / "recipe.yaml") == recipe
    plan = json.loads((out / "plan.json").read_text())
    for name, side in (("dense", "before"), ("pruned", "after"), ("recovered", "after")):
        row = metrics[name]
        assert row["parameters"] == plan[side]["parameters"]
        assert row["bytes"] == plan[side]["bytes"]
        assert (row["context"], row["stride"], row["corpus"]) == (32, 32, str(tmp_path / "evaluation.txt"))
        assert row["tokens"] > 0
    assert metrics["recovered"]["perplexity"] < metrics["pruned"]["perplexity"]
    assert {stage["name"] for stage in metrics["stages"]} == {"dense", "measure", "pruned", "recover", "recovered"}
    assert all(stage["seconds"] > 0 and stage["peak_bytes"] > 0 for stage in metrics["stages"])
    assert set(metrics["samples"][0]) == {"prompt", "dense", "pruned", "recovered"}
    card = (out / "model" / "README.md").read_text()
    assert f"{metrics['recovered']['perplexity']:.3f}" in card
    assert not list(out.rglob("*.unfinished"))
    assert sorted(entry.name for entry in (out / "state").iterdir() if entry.is_dir()) == ["edits"]


def test_the_saved_model_is_the_one_that_was_scored(recipe: Recipe, tmp_path: Path) -> None:
    metrics = run(recipe, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").eval()
    tokenizer = shearling.load_tokenizer(str(tmp_path / "out" / "model"))
    tokens = shearling.corpus_tokens(tmp_path / "evaluation.txt", tokenizer, whole=True)
    found = shearling.perplexity(model, tokens, context=32, stride=32)
    assert found.value == pytest.approx(metrics["recovered"]["perplexity"], rel=1e-6)


def test_streaming_changes_where_weights_lie_and_nothing_else(recipe: Recipe, tmp_path: Path) -> None:
    streamed = load_recipe(tmp_path / "recipe.yaml", ["calibration.stream=true"])
    expected = run(recipe, tmp_path / "resident")
    assert comparable(run(streamed, tmp_path / "streamed")) == comparable(expected)
    cut(streamed, tmp_path / "cut")
    ours = load_file(tmp_path / "cut" / "model.safetensors")
    cut(recipe, tmp_path / "plain")
    theirs = load_file(tmp_path / "plain" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_full_recovery_in_half_precision(tmp_path: Path) -> None:
    file = make_recipe(tmp_path, dtype="bfloat16")
    content = yaml.safe_load(file.read_text())
    content["stages"][1] = {**content["stages"][1], "method": "full", "distill": 0.5}
    del content["stages"][1]["mean_rank"]
    file.write_text(yaml.safe_dump(content))
    metrics = run(load_recipe(file), tmp_path / "out")
    assert metrics["recovered"]["perplexity"] < metrics["pruned"]["perplexity"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_recovery_validates_and_keeps_the_best(tmp_path: Path) -> None:
    file = make_recipe(tmp_path)
    content = yaml.safe_load(file.read_text())
    more = {"validate_every": 1, "distill": 0.5, "divergence": "jensen-shannon", "recompute": True, "keep": "best"}
    content["stages"][1].update(more)
    with pytest.raises(ShearlingError, match="keep = 'best' needs a validation text"):
        parse_recipe(content)
    content["stages"][1]["validation"] = str(tmp_path / "calibration.txt")
    run(parse_recipe(content), tmp_path / "out")
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [event["validation_loss"] for event in events if "validation_loss" in event]
    assert len(losses) == 6
    recorded = json.loads((tmp_path / "out" / "state" / "recover.json").read_text())
    assert recorded["best_step"] == 1 + losses.index(min(losses))


def with_teacher(tmp_path: Path, **changes: Any) -> Recipe:
    """The small recipe, distilled."""
    content = yaml.safe_load(make_recipe(tmp_path).read_text())
    content["stages"][1].update({"distill": 0.5, **changes})
    return parse_recipe(content)


def final_weights(recipe: Recipe, out: Path) -> dict[str, torch.Tensor]:
    run(recipe, out)
    return load_file(out / "model" / "model.safetensors")


def test_where_a_teacher_lies_and_what_it_is_called_change_no_bit(tmp_path: Path) -> None:
    expected = final_weights(with_teacher(tmp_path), tmp_path / "plain")
    named = with_teacher(tmp_path, teacher=str(tmp_path / "dense"), teacher_offload=True)
    for name, recipe in (("away", with_teacher(tmp_path, teacher_offload=True)), ("named", named)):
        found = final_weights(recipe, tmp_path / name)
        assert found.keys() == expected.keys() and all(torch.equal(t, expected[k]) for k, t in found.items())


def test_documents_apart_in_text_teacher_and_cache(tmp_path: Path) -> None:
    texts = ["some short words", "a b c", "more and more of them"] * 60
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "short.jsonl").write_text(lines)
    text = str(tmp_path / "short.jsonl")

    def first_loss(name: str, **changes: Any) -> float:
        run(with_teacher(tmp_path, text=text, validation=text, validation_windows=2, **changes), tmp_path / name)
        events = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return next(event["loss"] for event in events if "loss" in event)

    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_top_k": 97}
    apart = first_loss("apart", documents="apart")
    assert abs(first_loss("together") - apart) > 1e-3
    assert first_loss("cached", documents="apart", **cache) == pytest.approx(apart, rel=1e-3)
    with pytest.raises(ShearlingError, match="a cache with separator=2, not None"):
        first_loss("other", **cache)


def test_documents_apart_need_a_token_that_ends_them() -> None:
    stage = LoRA(documents="apart")
    tokenizer = tiny_tokenizer()
    assert separator_of(stage, tokenizer) == 2 and separator_of(LoRA(), tokenizer) is None
    tokenizer.eos_token = None
    with pytest.raises(ShearlingError, match=r"^documents = 'apart': the tokenizer has no end-of-sequence token"):
        separator_of(stage, tokenizer)


def test_what_is_scored_is_spread_over_what_is_held_out(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    texts = [f"the {'sheep' * number} stood on the hill" for number in range(120)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:3]))
    pack(tmp_path / "long.jsonl", tokenizer, tmp_path / "shards", shard_tokens=1000)
    whole = PackedTokens(tmp_path / "shards").windows(8)
    stream = corpus_tokens(tmp_path / "long.jsonl", tokenizer)
    assert len(stream) > 20 * 3 * 8

    def found(name: str) -> torch.Tensor:
        scored = validation_windows(LoRA(validation=str(tmp_path / name), validation_windows=3, length=8), tokenizer)
        assert isinstance(scored, torch.Tensor)
        return scored

    # of 16 x 3 windows the first, the 24th (23.5 goes to the even one) and the last
    read = stream[: 16 * 3 * 8].view(48, 8)
    assert torch.equal(found("long.jsonl"), read[[0, 24, 47]])
    # of a packed corpus, over all of it
    middle = round((len(whole) - 1) / 2)
    assert torch.equal(found("shards"), whole[torch.tensor([0, middle, len(whole) - 1])])
    # less than is wanted
    few = corpus_tokens(tmp_path / "short.jsonl", tokenizer)
    number = len(few) // 8
    assert torch.equal(found("short.jsonl")[[0, -1]], few[: number * 8].view(number, 8)[[0, -1]])


@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 5, "vocab_size": 120}, {"hidden_size": 64}])
def test_recovery_layerwise_from_a_larger_teacher(tmp_path: Path, sizes: dict[str, int]) -> None:
    larger = str(tiny_folder(tmp_path / "larger", **sizes))
    recipe = with_teacher(tmp_path, layerwise=0.1, teacher=larger, teacher_dtype="bfloat16")
    run(recipe, tmp_path / "out")
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if "layerwise" in event]
    assert len(steps) == 6 and steps[-1]["layerwise"] < steps[0]["layerwise"]
    for step in steps:
        assert step["loss"] == pytest.approx(step["cross_entropy"] + step["distillation"] + step["layerwise"], rel=1e-4)


def with_domains(tmp_path: Path, **changes: Any) -> Recipe:
    """The small recipe on prose, digits and packed prose of a domain each."""
    content = yaml.safe_load(make_recipe(tmp_path).read_text())
    (tmp_path / "digits.txt").write_text("".join(str(n) for n in range(700)))
    if not (tmp_path / "shards").exists():
        pack(tmp_path / "recovery.txt", load_tokenizer(str(tmp_path / "dense")), tmp_path / "shards")
    prose, digits, shards = (str(tmp_path / name) for name in ("calibration.txt", "digits.txt", "shards"))
    stage = content["stages"][1]
    del stage["text"]
    stage["domains"] = {
        "prose": {"text": prose, "validation": str(tmp_path / "evaluation.txt"), "weight": 2},
        "digits": {"text": digits, "validation": digits, "weight": 1},
        "packed": {"text": shards, "validation": shards, "weight": 1},
    }
    stage.update({"validate_every": 2, "validation_windows": "auto", **changes})
    return parse_recipe(content)


def test_domains_without_weights_are_read_by_the_roots_of_their_sizes(tmp_path: Path) -> None:
    recipe = with_domains(tmp_path)
    stage = recipe.recover
    bare = {name: domain.model_copy(update={"weight": None}) for name, domain in stage.domains.items()}
    tokenizer = load_tokenizer(str(tmp_path / "dense"))
    read = training_windows(recipe, stage.model_copy(update={"domains": bare}), tokenizer)
    roots = {name: math.sqrt(len(part)) for name, part in read.parts.items()}
    assert len({*roots.values()}) > 1
    assert read.weights == pytest.approx({name: root / sum(roots.values()) for name, root in roots.items()})


def test_recovery_on_domains_by_what_the_source_model_reaches(tmp_path: Path) -> None:
    recipe = with_domains(tmp_path, distill=0.5, loading={"reference": "source", "clamp": False, "floor": 0.05})
    out = tmp_path / "out"
    metrics = run(recipe, out)
    assert metrics["recovered"]["perplexity"] < metrics["pruned"]["perplexity"]
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if "loss" in event]
    assert {name: steps[0][f"weight/{name}"] for name in ("prose", "digits", "packed")} == {
        "prose": 0.5, "digits": 0.25, "packed": 0.25
    }  # fmt: skip
    scored = [event for event in events if "validation_loss" in event]
    dense = load_model(str(tmp_path / "dense"))
    digits = corpus_tokens(tmp_path / "digits.txt", load_tokenizer(str(tmp_path / "dense")))[:64].view(-1, 32)
    # a twentieth of two passes over 2 x 4 windows is less than one window of each, and one there must be
    with torch.no_grad():
        own = dense(digits[:1], labels=digits[:1]).loss.item()
    for event in scored:
        assert event["excess_loss/digits"] == pytest.approx(event["validation_loss/digits"] - own, rel=1e-4)
    recorded = json.loads((out / "state" / "recover.json").read_text())
    assert recorded["weights"] != {"prose": 0.5, "digits": 0.25, "packed": 0.25}
    assert sum(recorded["weights"].values()) == pytest.approx(1) and min(recorded["weights"].values()) >= 0.05
    page = (out / "report.html").read_text()
    assert "Weights of domains in stage recover." in page
    assert "Losses of domains minus their references in stage recover." in page


def test_references_from_a_file_are_extrapolated_and_doubted(tmp_path: Path) -> None:
    table = tmp_path / "reference.json"
    recipe = with_domains(tmp_path, validation_windows=2, loading={"reference": str(table)})
    with pytest.raises(ShearlingError, match=r"reference\.json': cannot be read"):
        run(recipe, tmp_path / "out")
    for content, what in (
        ("[", "is neither YAML nor JSON"),
        ("[1]", "must be a table"),
        ('{"prose": 1, "digits": 1}', "misses the domain 'packed'"),
    ):
        table.write_text(content)
        with pytest.raises(ShearlingError, match=f"^reference .*{what}[^\n]*$"):
            run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    family = {"1e6": 3.0, "1e7": 2.5, "1e8": 1.0}
    table.write_text(json.dumps({"prose": 1.0, "digits": 2.0, "packed": family}))
    run(recipe, tmp_path / "out")
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    doubts = [event["warning"] for event in events if event.get("step") == 0]
    assert len(doubts) == 1 and doubts[0].startswith("scaling law of domain 'packed': b = 0.001 lies outside")
    scored = [event for event in events if "validation_loss" in event]
    assert scored[0]["excess_loss/prose"] == pytest.approx(scored[0]["validation_loss/prose"] - 1)


def test_retraining_under_masks_that_follow(tmp_path: Path) -> None:
    content = yaml.safe_load(make_recipe(tmp_path).read_text())
    common = {key: value for key, value in content["stages"][1].items() if key not in ("method", "mean_rank")}
    ast = {"method": "ast", "distill": 1.0, "refresh_every": 2, "score": "activation", "decay": 1e-3}
    content["stages"] = [
        {"stage": "sparsify", "method": "wanda", "pattern": "2:4"},
        {**common, **ast, "slorb": {"start": "activation-svd", "size": 8}},
    ]
    metrics = run(parse_recipe(content), tmp_path / "out")
    assert metrics["recovered"]["perplexity"] < metrics["pruned"]["perplexity"]
    folder = tmp_path / "out" / "model"
    stock = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in stock.named_parameters():
        if "_proj" in name:
            assert ((weight.detach().unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all(), name
    # with its adapter it is the model that was scored
    tokens = corpus_tokens(content["evaluate"]["text"], load_tokenizer(folder), whole=True)
    found = perplexity(load_model(str(folder)), tokens, context=32, stride=32)
    assert found.value == pytest.approx(metrics["recovered"]["perplexity"], rel=1e-5)
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if "loss" in event]
    assert len(steps) == 6 and all({"decay", "distillation", "cross_entropy"} <= set(event) for event in steps)
    assert all("flip_rate" in event for event in steps[1:])


@pytest.mark.parametrize("named", [False, True])
def test_a_narrowed_model_follows_the_dense_one_from_what_was_kept(
    tmp_path: Path, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    class Recorded(LayerwiseDistillation):
        def __init__(self, *args: Any, kept: Any) -> None:
            given.append(kept)
            super().__init__(*args, kept=kept)

    monkeypatch.setattr(teaching, "LayerwiseDistillation", Recorded)
    content = yaml.safe_load(make_recipe(tmp_path).read_text())
    content["stages"][0] = {"stage": "prune", "method": "minitron", "target": {"hidden": 16, "layers": 2}}
    changes = {"teacher": str(tmp_path / "dense")} if named else {}
    content["stages"][1] |= {"method": "full", "layerwise": 1.0, "cross_entropy": 0.0, **changes}
    del content["stages"][1]["mean_rank"]
    run(parse_recipe(content), tmp_path / "out")
    (structure,) = load_edits(tmp_path / "out" / "state" / "edits")
    assert isinstance(structure, Structure) and len(structure.kept["hidden"]) == 16
    # another model may have other dimensions, whatever its name
    assert given == [None if named else structure.kept["hidden"]]
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if "loss" in event]
    assert losses[-1] < losses[0]


def test_recovery_from_a_cache_that_is_made_once(tmp_path: Path) -> None:
    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_top_k": 20}
    events: list[dict[str, Any]] = []
    metrics = run(with_teacher(tmp_path, **cache), tmp_path / "one", on_event=events.append)
    told = [event for event in events if event["stage"] == "teacher"]
    assert told[-1]["done"] == told[-1]["total"] > 0
    events.clear()
    again = run(with_teacher(tmp_path, **cache), tmp_path / "two", on_event=events.append)
    assert comparable(again) == comparable(metrics) and not any(event["stage"] == "teacher" for event in events)
    other = str(tiny_folder(tmp_path / "other"))
    for changes, what in (({"teacher": other}, "a cache with teacher="), ({"teacher_top_k": 21}, "with k=20, not 21")):
        with pytest.raises(ShearlingError, match=what):
            run(with_teacher(tmp_path, **{**cache, **changes}), tmp_path / f"three-{len(changes)}-{what[-2:]}")


def test_a_teacher_that_does_not_fit_is_refused_before_anything(tmp_path: Path) -> None:
    teacher = str(tiny_folder(tmp_path / "teacher", vocab_size=60))
    with pytest.raises(ShearlingError, match="^teacher .*vocabulary of 60, the model's is 97[^\n]*$"):
        run(with_teacher(tmp_path, teacher=teacher), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def only_training(tmp_path: Path, **changes: Any) -> Recipe:
    """The small recipe without its pruning."""
    content = yaml.safe_load(make_recipe(tmp_path).read_text())
    stage = {key: value for key, value in content["stages"][1].items() if key != "mean_rank"}
    model = changes.pop("model", content["model"])
    return parse_recipe({**content, "model": model, "stages": [{**stage, **changes}]})


def test_a_smaller_model_is_trained_on_towards_another(recipe: Recipe, tmp_path: Path) -> None:
    cut(recipe, tmp_path / "cut")
    names = {"model": str(tmp_path / "cut"), "teacher": str(tmp_path / "dense")}
    out = tmp_path / "out"
    metrics = run(only_training(tmp_path, method="full", distill=1.0, **names), out)
    assert "pruned" not in metrics
    assert [stage["name"] for stage in metrics["stages"]] == ["dense", "recover", "recovered"]
    assert set(metrics["samples"][0]) == {"prompt", "dense", "recovered"}
    assert metrics["recovered"]["perplexity"] < metrics["dense"]["perplexity"]
    assert metrics["recovered"]["kl"] > 0
    plan = json.loads((out / "plan.json").read_text())
    assert plan["method"] == "full" and plan["before"] == plan["after"]
    assert plan["after"]["parameters"] == metrics["recovered"]["parameters"] == metrics["dense"]["parameters"]
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "cut", out / "model"))
    assert {name: tensor.shape for name, tensor in before.items()} == {name: t.shape for name, t in after.items()}
    assert not any(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert list((out / "state").glob("*/")) == []
    card, page = ((out / name).read_text() for name in ("model/README.md", "report.html"))
    for text in (card, page):
        assert f"{tmp_path / 'cut'}, trained" in text
        assert "original" in text and "pruned" not in text and "dense</" not in text
    assert "tags: [shearling, trained]" in card and "train (full)" in card and "import shearling" in card
    assert "Trained; all " in page and "unchanged" in page


def test_a_dense_model_is_trained_towards_itself(tmp_path: Path) -> None:
    # at the start it predicts what its teacher does, so the text alone moves it
    metrics = run(only_training(tmp_path, distill=0.5), tmp_path / "out")
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    divergences = [event["distillation"] for event in events if "loss" in event]
    assert divergences[0] == pytest.approx(0, abs=1e-6) and divergences[-1] > 1e-4
    assert metrics["recovered"]["perplexity"] < metrics["dense"]["perplexity"]


def test_stopped_training_goes_on(tmp_path: Path) -> None:
    recipe = only_training(tmp_path, method="full")
    expected = run(recipe, tmp_path / "undisturbed")

    def strike(event: dict[str, Any]) -> None:
        if event.get("step") == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "out", on_event=strike)
    assert comparable(run(recipe, tmp_path / "out", resume=True)) == comparable(expected)
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "undisturbed"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_recipe_that_only_trains_cuts_nothing(tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match="recover trains, and nothing is pruned at once"):
        cut(only_training(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def sheared(tmp_path: Path) -> Recipe:
    """The small recipe, its pruning learned and its recovery of all parameters."""
    content = yaml.safe_load(make_recipe(tmp_path).read_text())
    recover = {key: value for key, value in content["stages"][1].items() if key != "mean_rank"}
    shear = {**recover, "stage": "shear", "method": "sheared-llama", "target": SMALL_TARGET, "distill": 1.0}
    shear["gate_start"] = "ranked"
    return parse_recipe({**content, "stages": [shear, {**recover, "method": "full"}]})


def test_shearing_ends_in_the_exact_shape_also_when_stopped(tmp_path: Path) -> None:
    recipe = sheared(tmp_path)
    expected = run(recipe, tmp_path / "undisturbed")
    assert [stage["name"] for stage in expected["stages"]] == ["dense", "shear", "pruned", "recover", "recovered"]
    config = json.loads((tmp_path / "undisturbed" / "model" / "config.json").read_text())
    fields = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert [config[field] for field in fields] == list(SMALL_TARGET.values())
    assert config["model_type"] == "llama" and "shearling" not in config
    assert "gates" in (tmp_path / "undisturbed" / "report.html").read_text()
    for stage in ("shear", "recover"):

        def strike(event: dict[str, Any], stage: str = stage) -> None:
            if event.get("stage") == stage and event.get("step") == 3:
                signal.raise_signal(signal.SIGTERM)

        with pytest.raises(Interrupted):
            run(recipe, tmp_path / "out", resume=True, on_event=strike)
    assert comparable(run(recipe, tmp_path / "out", resume=True)) == comparable(expected)
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "undisturbed"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("stage", ["shear", "prune"])
def test_a_run_within_a_budget_is_one_to_its_shape(tmp_path: Path, stage: str) -> None:
    content = yaml.safe_load(sheared(tmp_path).dump())
    if stage == "prune":
        content["stages"][0] = {"stage": "prune", "method": "minitron"}
    shape = {"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 48}
    content["stages"][0]["target"] = shape
    expected = run(parse_recipe(content), tmp_path / "shape")
    content["stages"][0]["target"] = {"parameters": 0.7}
    within = parse_recipe(content)

    def strike(event: dict[str, Any]) -> None:
        if event.get("stage") == "recover" and event.get("step") == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(within, tmp_path / "budget", on_event=strike)
    assert comparable(run(within, tmp_path / "budget", resume=True)) == comparable(expected)
    texts = [(tmp_path / name / "recipe.yaml").read_text() for name in ("shape", "budget")]
    assert texts[0] == texts[1]
    assert expected["pruned"]["parameters"] <= 0.7 * expected["dense"]["parameters"]


def adapting(tmp_path: Path, *stages: dict[str, Any]) -> Recipe:
    """The small recipe with an adapt stage, and others in place of its own."""
    content = yaml.safe_load(make_recipe(tmp_path).read_text())
    train = {key: value for key, value in content["stages"][1].items() if key not in ("method", "mean_rank")}
    adapt, recover = {**train, "stage": "adapt"}, {**train, "learning_rate": 1e-3}
    return parse_recipe(
        {
            **content,
            "stages": [adapt, *({**recover, **stage} if stage["stage"] == "recover" else stage for stage in stages)],
        }
    )


#: read the dense model in all ways: norms and masks, a teacher, what unmasked weights become, where branches start
MASKED = {"stage": "sparsify", "method": "wanda", "pattern": "2:4"}
FOLLOWING = {
    "stage": "recover", "method": "ast", "distill": 1.0, "cross_entropy": 0.0, "refresh_every": 2,
    "slorb": {"start": "activation-svd", "size": 8},
}  # fmt: skip


def test_adapting_first_is_a_run_that_trains_and_one_that_prunes_what_it_left(tmp_path: Path) -> None:
    recipe = adapting(tmp_path, MASKED, FOLLOWING)
    metrics = run(recipe, tmp_path / "one")
    assert recipe.adapt is not None
    alone = recipe.adapt.model_dump(mode="json") | {"stage": "recover"}
    first = {**recipe.model_dump(mode="json"), "stages": [alone]}
    trained = run(parse_recipe(first), tmp_path / "first")
    second = {**recipe.model_dump(mode="json"), "model": str(tmp_path / "first" / "model")}
    rest = run(parse_recipe({**second, "stages": second["stages"][1:]}), tmp_path / "second")
    assert metrics["dense"] == trained["dense"] and metrics["adapted"] == rest["dense"]
    assert metrics["adapted"]["perplexity"] < metrics["dense"]["perplexity"]
    assert all(metrics[name] == rest[name] for name in ("pruned", "recovered"))
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(tmp_path / place / "model" / name) for place in ("one", "second"))
        assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_what_a_run_that_adapts_leaves(tmp_path: Path) -> None:
    out = tmp_path / "out"
    metrics = run(adapting(tmp_path, MASKED), out)
    assert [stage["name"] for stage in metrics["stages"]] == ["dense", "adapt", "adapted", "measure", "pruned"]
    assert list(metrics["samples"][0]) == ["prompt", "dense", "adapted", "pruned"]
    assert "kl" in metrics["pruned"] and "kl" not in metrics["adapted"]
    record = json.loads((out / "state" / "adapt.json").read_text())
    assert (record["steps"], record["tokens"]) == (6, 768) and record["seconds"] > 0
    assert [entry.name for entry in (out / "state").iterdir() if entry.is_dir()] == ["edits"]
    assert json.loads((out / "plan.json").read_text())["method"] == "wanda"
    card, page = ((out / name).read_text() for name in ("model/README.md", "report.html"))
    assert "adapt (full), then sparsify (wanda)" in card
    assert f"| adapted | {metrics['adapted']['perplexity']:.3f} |" in card
    assert "against the adapted model" in page and "Loss of stage adapt" in page


@pytest.mark.parametrize("later", ["recover", "shear"])
def test_a_run_that_adapts_ends_the_same_when_stopped(tmp_path: Path, later: str) -> None:
    shear = {**sheared(tmp_path).model_dump(mode="json")["stages"][0], "target": {"parameters": 0.7}}
    recipe = adapting(tmp_path, *([MASKED, FOLLOWING] if later == "recover" else [shear]))
    expected = run(recipe, tmp_path / "undisturbed")
    done: list[list[int]] = []
    for where in ("adapt", "adapt", "adapted", later):
        done.append([])

        def strike(event: dict[str, Any], where: str = where) -> None:
            if event["stage"] == "adapt" and "loss" in event:
                done[-1].append(event["step"])
            if event["stage"] == where and "loss" in event and event["step"] == 3:
                signal.raise_signal(signal.SIGTERM)
            if event["stage"] == where and event.get("finished"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "out", resume=True, on_event=strike)
    # struck on its way, and when it was done; never again after that
    assert done == [[1, 2, 3], [4, 5, 6], [], []]
    assert comparable(run(recipe, tmp_path / "out", resume=True)) == comparable(expected)
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "undisturbed"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_adapting_prunes_nothing_at_once(tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match="adapt trains, and nothing is pruned at once"):
        cut(adapting(tmp_path, MASKED), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_that_does_not_fit_is_named_before_training(tmp_path: Path) -> None:
    content = yaml.safe_load(sheared(tmp_path).dump())
    content["stages"][0]["target"] = {"layers": 9}
    with pytest.raises(ShearlingError, match="target.layers = 9: the model has 3"):
        run(parse_recipe(content), tmp_path / "out")


def test_a_masked_model_is_not_trained_without_its_masks(tmp_path: Path) -> None:
    content = yaml.safe_load(make_recipe(tmp_path).read_text())
    content["stages"] = [{"stage": "sparsify", "method": "magnitude", "pattern": "2:4"}]
    cut(parse_recipe(content), tmp_path / "masked")
    with pytest.raises(ShearlingError, match=r"is masked \(2:4\), and training alone would fill its zeros"):
        run(only_training(tmp_path, method="full", model=str(tmp_path / "masked")), tmp_path / "out")
    adapts = adapting(tmp_path, MASKED).model_copy(update={"model": str(tmp_path / "masked")})
    with pytest.raises(ShearlingError, match=r"is masked \(2:4\), and training alone would fill its zeros"):
        run(adapts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_not_done_again(recipe: Recipe, tmp_path: Path) -> None:
    first = run(recipe, tmp_path / "out")
    events: list[dict[str, Any]] = []
    assert run(recipe, tmp_path / "out", resume=True, on_event=events.append) == first
    assert events == []


def test_another_recipe_does_not_resume(recipe: Recipe, tmp_path: Path) -> None:
    run(recipe, tmp_path / "out")
    with pytest.raises(ShearlingError, match=r"already holds a run"):
        run(recipe, tmp_path / "out")
    other = load_recipe(tmp_path / "recipe.yaml", ["prune.sparsity=0.4"])
    with pytest.raises(ShearlingError, match=r"stages\.0\.sparsity=0\.3, this recipe says 0\.4"):
        run(other, tmp_path / "out", resume=True)


def test_foreign_files_are_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ShearlingError, match="holds files but no run"):
        run(recipe, tmp_path / "out", resume=True)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["notes.txt"]


SMALL_TARGET = {"layers": 2, "hidden": 16, "heads": 2, "kv_heads": 2, "ffn": 20}


def made_small(content: dict[str, Any], tmp_path: Path, *, compiled: bool = False) -> dict[str, Any]:
    """A shipped recipe with its own stages and options, on a tiny model and little text."""
    small = yaml.safe_load(make_recipe(tmp_path).read_text())
    changes: dict[str, Any] = {"text": str(tmp_path / "recovery.txt"), "length": 32, "batch": 4, "micro_batch": 2}
    for stage in content["stages"]:
        if "target" in stage:
            budget = "parameters" in stage["target"]
            stage["target"] = {"parameters": 0.7} if budget else {size: SMALL_TARGET[size] for size in stage["target"]}
        if stage["stage"] in ("adapt", "shear", "recover"):
            stage.update({**changes, "tokens": 256})
            if "domains" in stage:
                text = {"text": stage.pop("text"), "validation": changes["text"]}
                stage.update(domains=dict.fromkeys(stage["domains"], text), validation_windows=2, validate_every=1)
            if "validation" in stage:
                stage.update(validation=changes["text"], validation_windows=2, validate_every=1)
            # needs a GPU; and compiling takes longer than all else: one recipe does it
            stage.pop("capture", None)
            if not compiled:
                stage.pop("compile", None)
                stage.pop("teacher_compile", None)
        stage.pop("round_to", None)
        if "sampled" in stage:
            stage["sampled"] = 2
        if stage.get("reconstruct"):
            stage["reconstruct"]["steps"] = 3
    content["calibration"] = {**content.get("calibration", {}), **small["calibration"]}
    content["evaluate"].update(small["evaluate"])
    return {**content, "model": small["model"], "device": "cpu"}


@pytest.mark.parametrize("file", sorted(Path("recipes").glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_recipes_run(file: Path, tmp_path: Path) -> None:
    content = made_small(yaml.safe_load(file.read_text()), tmp_path, compiled=file.stem == "ast-smollm2-gpu")
    metrics = run(parse_recipe(content), tmp_path / "out")
    masks = json.loads((tmp_path / "out" / "plan.json").read_text()).get("masks")
    fewer = metrics["pruned"]["parameters"] < metrics["dense"]["parameters"]
    assert fewer if masks is None else 2 * masks["kept"] == masks["of"]
    assert ("recovered" in metrics) == (len(content["stages"]) > 1)


#: imports once, which takes longer than all that is struck; nothing runs before processes are forked
DRIVER = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    from shearling.recipe import load_recipe
    from shearling.run import run

    def struck(stage, key, count):
        def strike(event):
            if event.get("stage") == stage and event.get(key) == int(count):
                os.kill(os.getpid(), int(sys.argv[3]))

        try:
            run(load_recipe(sys.argv[1]), Path(sys.argv[2]), resume=True, on_event=strike)
        except KeyboardInterrupt:
            return 130
        return 0

    for place in sys.argv[4:]:
        process = os.fork()
        if not process:
            code = 1
            try:
                code = struck(*place.split())
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), (Path(sys.argv[2]) / "model").exists(), flush=True)
    """
)
#: where a run is struck: (stage, key of the event, its value)
PLACES = [("measure", "block", 1), ("pruned", "finished", True), ("recover", "step", 3)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_a_struck_run_resumes_to_the_same_result(tmp_path: Path, number: signal.Signals) -> None:
    file = make_recipe(tmp_path)
    undisturbed = run(load_recipe(file), tmp_path / "undisturbed")
    out = tmp_path / "struck"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    places = [f"{stage} {key} {int(count)}" for stage, key, count in PLACES]
    command = [sys.executable, "-c", DRIVER, str(file), str(out), str(int(number)), *places]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    code = -9 if number == signal.SIGKILL else 130
    assert ended.stdout.splitlines() == [f"{code} False"] * len(PLACES), ended.stderr
    events: list[dict[str, Any]] = []
    resumed = run(load_recipe(file), out, resume=True, on_event=events.append)
    assert comparable(resumed) == comparable(undisturbed)
    assert not any(event.get("stage") == "measure" for event in events)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
        for folder in (out, tmp_path / "undisturbed")
    )
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    steps = [json.loads(line).get("step") for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {step for step in steps if step} == set(range(1, 7))


def test_the_api_does_the_same_in_five_lines(tmp_path: Path) -> None:
    folder = str(tiny_folder(tmp_path / "dense"))
    model, tokenizer = shearling.load_model(folder), shearling.load_tokenizer(folder)
    outcome = shearling.plan_structured(model, tiny_tokens(4, 24), shearling.CFSP(sparsity=0.25), batch=2)
    shearling.cut_(model, outcome.edits)
    shearling.save_model(model, tokenizer, tmp_path / "pruned", provenance={})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    torch.testing.assert_close(again(tiny_tokens()).logits, model(tiny_tokens()).logits)
