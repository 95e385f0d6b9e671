"""Zero-shot tasks: files into items, items into likelihoods, likelihoods into results."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shearling.errors import ShearlingError
from shearling.evaluate import TASKS, evaluate_tasks, logits
from shearling.evaluate.tasks.files import read_items
from shearling.evaluate.tasks.likelihood import log_likelihoods
from shearling.evaluate.tasks.score import result

# made-up lines in each task's published form
LINES: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [
        {"question": "Which is warm?", "choices": {"text": ["ice", "the sun"], "label": ["A", "B"]}, "answerKey": "B"},
        {
            "question": "What flies?",
            "choices": {"text": ["a rook", "a rock", "mud"], "label": list("123")},
            "answerKey": "1",
        },
    ],
    "arc_challenge": [
        {"question": "Why rust?", "choices": {"text": ["water", "luck"], "label": ["A", "B"]}, "answerKey": "A"}
    ],
    "piqa": [
        {"goal": "dry a cup", "sol1": "use a towel", "sol2": "use soup"},
        {"goal": "cool tea", "sol1": "boil it", "sol2": "wait"},
    ],
    "hellaswag": [
        {
            "activity_label": "Shearing",
            "ctx_a": "A man holds a sheep.",
            "ctx_b": "he",
            "endings": ["cuts  wool.", "[step] sings [title] Loudly."],
            "label": 0,
        }
    ],
    "winogrande": [
        {"sentence": "Ann thanked Eve because _ helped her.", "option1": "Ann", "option2": "Eve", "answer": "2"}
    ],
    "boolq": [{"question": "is wool warm", "answer": True, "passage": "Wool keeps heat."}],
    "openbookqa": [
        {"question_stem": "Sheep eat", "choices": {"text": ["grass", "iron"], "label": ["A", "B"]}, "answerKey": " A"}
    ],
    "lambada_openai": [{"text": "the lamb looked for its mother"}],
    "copa": [
        {
            "premise": "It rained.",
            "choice1": "The wool got wet.",
            "choice2": "Sand fell.",
            "question": "effect",
            "label": 0,
        },
        {"premise": "It slept. ", "choice1": "It ran.", "choice2": "It tired.", "question": "cause", "label": 1},
    ],
    "sciq": [
        {
            "question": "What grows wool?",
            "distractor1": "fish",
            "distractor2": "ants",
            "distractor3": "oak",
            "correct_answer": "sheep",
            "support": " Sheep grow wool.",
        }
    ],
}

# what a reader of each task's description would write down by hand: (pairs, gold)
ITEMS: dict[str, list[tuple[list[tuple[str, str]], int]]] = {
    "arc_easy": [
        ([("Question: Which is warm?\nAnswer:", " ice"), ("Question: Which is warm?\nAnswer:", " the sun")], 1),
        ([("Question: What flies?\nAnswer:", choice) for choice in (" a rook", " a rock", " mud")], 0),
    ],
    "arc_challenge": [([("Question: Why rust?\nAnswer:", " water"), ("Question: Why rust?\nAnswer:", " luck")], 0)],
    "piqa": [
        ([("Question: dry a cup\nAnswer:", " use a towel"), ("Question: dry a cup\nAnswer:", " use soup")], 0),
        ([("Question: cool tea\nAnswer:", " boil it"), ("Question: cool tea\nAnswer:", " wait")], 1),
    ],
    "hellaswag": [
        (
            [
                ("Shearing: A man holds a sheep. He", " cuts wool."),
                ("Shearing: A man holds a sheep. He", "  sings. Loudly."),
            ],
            0,
        )
    ],
    "winogrande": [
        ([("Ann thanked Eve because Ann", " helped her."), ("Ann thanked Eve because Eve", " helped her.")], 1)
    ],
    "boolq": [
        ([("Wool keeps heat.\nQuestion: is wool warm?\nAnswer:", answer) for answer in (" no", " yes")], 1),
    ],
    "openbookqa": [([("Sheep eat", " grass"), ("Sheep eat", " iron")], 0)],
    "lambada_openai": [([("the lamb looked for its", " mother")], 0)],
    "copa": [
        ([("It rained therefore", "  the wool got wet."), ("It rained therefore", "  sand fell.")], 0),
        ([("It slept because", "  it ran."), ("It slept because", "  it tired.")], 1),
    ],
    "sciq": [
        (
            [
                ("Sheep grow wool.\nQuestion: What grows wool?\nAnswer:", f" {choice}")
                for choice in ("fish", "ants", "oak", "sheep")
            ],
            3,
        )
    ],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, lines in LINES.items():
        path = tmp_path / TASKS[name].files[-1]
        path.parent.mkdir()
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "piqa" / "valid-labels.lst").write_text("0\n1\n")
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Characters, and a few pairs of them, so that context and continuation can merge."""
    alphabet = sorted(set(map(chr, range(32, 127))) | {"\n"})
    vocab = {token: index for index, token in enumerate(["<s>", *alphabet, "th", " t", "ing"])}
    inner = Tokenizer(
        models.WordPiece(vocab, unk_token="<s>", continuing_subword_prefix="", max_input_chars_per_word=9999)
    )
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("$^"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=48,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model


@torch.no_grad()
def full_likelihood(model: LlamaForCausalLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One pair alone from its full logits in float64."""
    ids = torch.tensor([context + continuation])[:, -49:]
    log_probs_TV = model(ids[:, :-1]).logits[0, -len(continuation) :].double().log_softmax(-1)
    targets = torch.tensor(continuation)
    log = log_probs_TV.gather(-1, targets[:, None]).sum().item()
    return log, bool((log_probs_TV.argmax(-1) == targets).all())


@pytest.mark.parametrize("name", TASKS)
def test_items_are_worded_by_hand(name: str, data: Path) -> None:
    items = read_items(name, data)
    assert [(list(item.pairs), item.gold) for item in items] == ITEMS[name]


def test_lengths_are_characters_of_the_choice(data: Path) -> None:
    assert read_items("arc_easy", data)[1].lengths == (6, 6, 3)


def test_hellaswag_already_joined(data: Path) -> None:
    line = {"query": "Shearing: A man", "endings": ["cuts.", "sings."], "label": 1}
    (data / TASKS["hellaswag"].files[-1]).write_text(json.dumps(line))
    (item,) = read_items("hellaswag", data)
    assert item.pairs == (("Shearing: A man", " cuts."), ("Shearing: A man", " sings."))
    assert item.gold == 1


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_likelihoods_equal_full_logits(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits, "PIECE", 4 * len(tokenizer))
    encode = tokenizer.encode
    pairs = [("a b", " c"), ("a b", " d"), ("a b", " cd"), ("ab", "xyz"), ("q", " w w w"), ("a b", " c"), ("zz", "!")]
    measured = log_likelihoods(model, tokenizer, pairs, batch=batch)
    for (context, continuation), got in zip(pairs, measured, strict=True):
        log, greedy = full_likelihood(model, encode(context), encode(continuation))
        assert got.log == pytest.approx(log, abs=1e-4)
        assert got.greedy == greedy


def test_greedy_continuations_are_recognised(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("a lamb")
    written = []
    with torch.no_grad():
        for _ in range(2):
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    continuation = tokenizer.convert_ids_to_tokens(written)
    assert all(len(token) == 1 for token in continuation), "choose another prompt"
    other = "x" if continuation[1] != "x" else "y"
    right, wrong = log_likelihoods(
        model, tokenizer, [("a lamb", "".join(continuation)), ("a lamb", continuation[0] + other)], batch=2
    )
    assert right.greedy
    assert not wrong.greedy


def test_spaces_that_end_a_context_are_scored(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    moved, plain = log_likelihoods(model, tokenizer, [("sheep ", "run"), ("sheep", " run")], batch=2)
    assert moved == plain


def test_tokens_are_split_after_joining(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    th = tokenizer.convert_tokens_to_ids("th")
    assert tokenizer.encode("at" + "he") == [*tokenizer.encode("a"), th, *tokenizer.encode("e")]
    # "at" is two tokens, so of a-th-e the last one is the continuation
    (split, merged) = log_likelihoods(model, tokenizer, [("at", "he"), ("at", "h")], batch=2)
    a, e = tokenizer.encode("a"), tokenizer.encode("e")
    assert split.log == pytest.approx(full_likelihood(model, [*a, th], e)[0], abs=1e-4)
    # nothing is left after "at" in a-th: the merged token is scored
    assert merged.log == pytest.approx(full_likelihood(model, a, [th])[0], abs=1e-4)


def test_empty_context_is_the_start_token(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    (got,) = log_likelihoods(model, tokenizer, [("", "abc")], batch=1)
    assert got.log == pytest.approx(full_likelihood(model, [0], tokenizer.encode("abc"))[0], abs=1e-4)


def test_long_contexts_lose_their_beginning(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    long, short = "x" * 20 + "wool" * 15, "wool" * 15
    got_long, got_short = log_likelihoods(model, tokenizer, [(long, " is"), (short, " is")], batch=2)
    assert got_long.log == got_short.log
    expected, _ = full_likelihood(model, tokenizer.encode(long), tokenizer.encode(" is"))
    assert got_long.log == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ShearlingError, match="49 tokens exceeds the model's context of 48"):
        log_likelihoods(model, tokenizer, [("a", "b" * 49)], batch=1)


def test_results_by_hand(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Path) -> None:
    results = evaluate_tasks(model, tokenizer, list(TASKS), data=data, batch=4)
    for name, measured in results.items():
        right, right_norm = [], []
        for pairs, gold in ITEMS[name]:
            scores = []
            for context, continuation in pairs:
                whole, split = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
                scores.append(full_likelihood(model, whole[:split], whole[split:]))
            logs = torch.tensor([log for log, _ in scores])
            lengths = torch.tensor([len(continuation) - 1 for _, continuation in pairs])
            right.append(scores[0][1] if name == "lambada_openai" else int(logs.argmax()) == gold)
            right_norm.append(int((logs / lengths).argmax()) == gold)
        assert measured["num"] == len(LINES[name])
        assert measured["accuracy"] == sum(right) / len(right), name
        normalised = {"arc_easy", "arc_challenge", "piqa", "hellaswag", "openbookqa", "sciq"}
        assert ("accuracy_norm" in measured) == (name in normalised)
        if name in normalised:
            assert measured["accuracy_norm"] == sum(right_norm) / len(right_norm), name


def test_standard_error_is_that_of_the_mean() -> None:
    right = [True, False, True, True, False, True]
    deviation = torch.tensor(right, dtype=torch.float64).std().item()
    assert result(right) == {
        "accuracy": pytest.approx(4 / 6),
        "stderr": pytest.approx(deviation / 6**0.5),
        "num": 6,
    }
    assert result([True])["stderr"] is None


def test_limit_keeps_the_first(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Path) -> None:
    path = data / TASKS["arc_easy"].files[0]
    path.write_text(path.read_text() + "{broken\n")
    assert evaluate_tasks(model, tokenizer, ["arc_easy"], data=data, limit=2)["arc_easy"]["num"] == 2


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["arc_esy"], "unknown task 'arc_esy'; did you mean arc_easy?"),
        (["copa", "??"], r"unknown task '\?\?'; there are arc_challenge, arc_easy, boolq"),
    ],
)
def test_unknown_task(
    tasks: list[str], message: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Path
) -> None:
    with pytest.raises(ShearlingError, match=message):
        evaluate_tasks(model, tokenizer, tasks, data=data)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("copa", "{not json}\n", r"dev\.jsonl:1: not a line of task copa"),
        ("copa", '\n{"premise": "It."}\n', r"dev\.jsonl:2: task copa needs the field 'question'"),
        ("copa", "[1]\n", r"dev\.jsonl:1: not a line of task copa"),
        ("copa", "\n", "holds no items of task copa"),
        ("winogrande", json.dumps({**LINES["winogrande"][0], "sentence": "No gap."}), "sentence has no gap"),
        ("winogrande", json.dumps({**LINES["winogrande"][0], "answer": ""}), r"dev\.jsonl:1: not a line"),
        ("boolq", json.dumps({**LINES["boolq"][0], "answer": "maybe"}), r"dev\.jsonl:1: not a line"),
        ("copa", json.dumps({**LINES["copa"][0], "label": 2}), "label 2 with 2 choices"),
        ("lambada_openai", '{"text": "alone"}', "text has no last word"),
        ("sciq", json.dumps({**LINES["sciq"][0], "distractor1": ""}), "a choice is empty"),
        ("piqa", json.dumps(LINES["piqa"][0]), "2 labels for the 1 lines of valid.jsonl"),
    ],
)
def test_malformed_files(name: str, text: str, message: str, data: Path) -> None:
    (data / TASKS[name].files[-1]).write_text(text)
    with pytest.raises(ShearlingError, match=message):
        read_items(name, data)


def test_missing_files(data: Path) -> None:
    (data / "sciq" / "valid.jsonl").unlink()
    with pytest.raises(ShearlingError, match=r"task sciq: no file .*test\.jsonl or .*valid\.jsonl"):
        read_items("sciq", data)
    (data / "piqa" / "valid-labels.lst").unlink()
    with pytest.raises(ShearlingError, match=r"labels are missing; no file .*valid-labels\.lst"):
        read_items("piqa", data)
    (data / "copa" / "dev.jsonl").write_bytes(b'{"premise": "\xff"}')
    with pytest.raises(ShearlingError, match="not UTF-8"):
        read_items("copa", data)


def test_sizes_below_one(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Path) -> None:
    with pytest.raises(ShearlingError, match="limit 0"):
        evaluate_tasks(model, tokenizer, ["copa"], data=data, limit=0)


def test_lm_eval_stays_out_of_the_import() -> None:
    code = "import sys, shearling.evaluate; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_lm_eval(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ShearlingError, match=r"pip install 'shearling\[eval\]'"):
        evaluate_tasks(model, tokenizer, ["copa"])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An lm-eval that reports fixed metrics and remembers how it was called."""
    seen: dict[str, Any] = {}
    report = {
        "results": {
            "arc_easy": {"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25, "sample_len": 9},
            "gsm8k": {"exact_match,strict": 0.1, "exact_match_stderr,strict": 0.1, "sample_len": 9},
            "mmlu": {"acc,none": 1.0, "acc_stderr,none": "N/A", "sample_len": 18},
        }
    }

    def simple_evaluate(**kwargs: Any) -> dict[str, Any]:
        seen.update(kwargs)
        return report

    manager = type("TaskManager", (), {"all_subtasks": ["arc_easy", "gsm8k"], "all_groups": ["mmlu"]})
    for name, members in {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **kwargs: kwargs},
        "lm_eval.tasks": {"TaskManager": manager},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_lm_eval_results(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stand_in: dict[str, Any]) -> None:
    results = evaluate_tasks(model, tokenizer, ["arc_easy", "mmlu"], limit=9, batch=5)
    assert results == {
        "arc_easy": {"accuracy": 0.5, "accuracy_norm": 0.25, "stderr": 0.1, "num": 9},
        "mmlu": {"accuracy": 1.0, "stderr": None, "num": 18},
    }
    assert stand_in["model"] == {"pretrained": model, "tokenizer": tokenizer, "batch_size": 5}
    assert (stand_in["tasks"], stand_in["limit"], stand_in["num_fewshot"]) == (["arc_easy", "mmlu"], 9, 0)


def test_lm_eval_refusals(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stand_in: dict[str, Any]
) -> None:
    with pytest.raises(ShearlingError, match="did you mean arc_easy"):
        evaluate_tasks(model, tokenizer, ["arc_easi"])
    assert not stand_in
    with pytest.raises(ShearlingError, match="task gsm8k: lm-eval reports exact_match and no accuracy"):
        evaluate_tasks(model, tokenizer, ["gsm8k"])
