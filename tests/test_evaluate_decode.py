"""Samples and speed, both through the key/value cache."""

from __future__ import annotations

import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from shearling.errors import ShearlingError
from shearling.evaluate import generate_samples, speed
from tests.tiny import FAMILIES, VOCAB, tiny_model

WORDS = ["<s>", *(f"▁w{index}" for index in range(1, VOCAB))]
OWN = {
    "opt": {"max_position_embeddings": 32},
    "gpt2": {"n_positions": 32},
    # windows shorter than what is written
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
}


def make(family: str = "llama") -> PreTrainedModel:
    # a tied head would mostly repeat the last word
    model = tiny_model(family, tie_word_embeddings=False, **OWN.get(family, {}))
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words after a space, the first of which is dropped on decoding, as sentencepiece does."""
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


@torch.no_grad()
def greedy_without_cache(model: PreTrainedModel, ids: list[int], num: int) -> list[int]:
    ids = list(ids)
    for _ in range(num):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-num:]


def written(ids: list[int]) -> str:
    return "".join(WORDS[index].replace("▁", " ") for index in ids if index >= 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_equal_decoding_without_a_cache(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make(family)
    prompts = ["w3 w4 w5", "w9"]
    samples = generate_samples(model, tokenizer, prompts, 6)
    expected = [greedy_without_cache(model, tokenizer.encode(prompt), 6) for prompt in prompts]
    assert samples == [written(ids) for ids in expected]
    assert any(len(set(ids)) > 1 for ids in expected), "the model repeats one word; the test would say little"


def test_samples_stop_at_an_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make()
    ids = greedy_without_cache(model, tokenizer.encode("w3 w4 w5"), 6)
    stop = next(index for index in range(1, 6) if ids[index] not in ids[:index])
    for ends in (ids[stop], [1, ids[stop]]):
        model.generation_config.eos_token_id = ends
        assert generate_samples(model, tokenizer, ["w3 w4 w5"], 6) == [written(ids[:stop])]


def test_empty_prompt_starts_at_the_start_token(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make()
    assert generate_samples(model, tokenizer, [""], 3) == [written(greedy_without_cache(model, [0], 3)).lstrip()]
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ShearlingError, match="no start token"):
        generate_samples(model, bare, [""], 3)


def test_samples_refuse(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ShearlingError, match="max_new_tokens 0"):
        generate_samples(make(), tokenizer, ["w3"], 0)
    with pytest.raises(ShearlingError, match="33 tokens exceed the 32 learned positions"):
        generate_samples(make("opt"), tokenizer, ["w3 w4 w5"], 30)


def test_training_mode_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make().train()
    generate_samples(model, tokenizer, ["w3"], 1)
    speed(model, prompt=2, generate=1, repeats=1)
    assert model.training


class Clock:
    """Time that only passes inside the model: a prefill and a decode step take as long as the test says."""

    def __init__(self, model: PreTrainedModel, prefills: list[float], steps: list[float], num_steps: int) -> None:
        self.now, self.lengths, self.rows = 100.0, [], set()
        self._plan = [
            cost for prefill, step in zip(prefills, steps, strict=True) for cost in [prefill] + [step] * num_steps
        ]
        model.register_forward_pre_hook(self._pass, with_kwargs=True)

    def _pass(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.now += self._plan[len(self.lengths)]
        self.lengths.append(kwargs["input_ids"].shape[1])
        self.rows.add(kwargs["input_ids"].shape[0])

    def __call__(self) -> float:
        return self.now


def test_speed_is_the_median_of_the_measured_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    # the first run only warms up, and the slow third one is no median
    clock = Clock(model, prefills=[50.0, 2.0, 9.0, 4.0], steps=[70.0, 0.5, 3.0, 0.25], num_steps=5)
    monkeypatch.setattr(time, "perf_counter", clock)
    measured = speed(model, prompt=7, generate=5, batch=3, repeats=3)
    assert measured.prefill_tokens_per_second == pytest.approx(3 * 7 / 4.0)
    assert measured.decode_tokens_per_second == pytest.approx(3 * 5 / (5 * 0.5))
    # the cache holds what was read: every step reads one token
    assert clock.lengths == [7, 1, 1, 1, 1, 1] * 4
    assert clock.rows == {3}
    assert (measured.prompt, measured.generate, measured.batch, measured.repeats) == (7, 5, 3, 3)


def test_speed_reads_the_same_prompts_for_a_seed() -> None:
    model, seen = make(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    for seed in (0, 0, 1):
        speed(model, prompt=9, generate=1, repeats=1, seed=seed)
    prompts = [ids for ids in seen if ids.shape[1] == 9][::2]
    assert torch.equal(prompts[0], prompts[1])
    assert not torch.equal(prompts[0], prompts[2])


def test_peak_memory_on_a_cpu_covers_what_was_held() -> None:
    held = torch.ones(16 * 2**20)
    measured = speed(make(), prompt=2, generate=1, repeats=1)
    assert measured.peak_bytes > held.nbytes
    assert measured.device.startswith("cpu")


@pytest.mark.parametrize("name", ["prompt", "generate", "batch", "repeats"])
def test_speed_refuses_nothing(name: str) -> None:
    with pytest.raises(ShearlingError, match=f"{name} 0 must be at least 1"):
        speed(make(), **{"prompt": 2, "generate": 2, name: 0})


def test_speed_refuses_more_than_the_learned_positions() -> None:
    with pytest.raises(ShearlingError, match="33 tokens exceed the 32 learned positions"):
        speed(make("gpt2"), prompt=30, generate=3)
