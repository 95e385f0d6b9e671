"""Documents of a packed window kept apart, beside each of them run alone."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shearling.errors import ShearlingError
from shearling.train import (
    CachedTeacher,
    Distillation,
    LayerwiseDistillation,
    Policy,
    TrainSettings,
    cache_teacher,
    train,
)
from shearling.train.documents import document_positions, next_tokens
from shearling.train.head import blocks_of, hidden_states
from shearling.train.validation import validation_loss
from shearling.train.world import World
from tests.tiny import FAMILIES, VOCAB, tiny_model, tiny_tokens

LENGTH, END = 40, 2
SETTINGS = TrainSettings(
    tokens=4 * LENGTH, length=LENGTH, batch=4, micro_batch=2, learning_rate=1e-2, log_every=1, clip=None, separator=END
)
#: where documents end: none, in few and in many places, at once after another, at the first and at the last token
ENDS = [(), (5, 30, 31), (0, 39), (2, 3, 4, 9, 17, 21, 28, 33)]
SLIDING = {
    "mistral-sliding": ("mistral", {"sliding_window": 8}),
    "phi3-sliding": ("phi3", {"sliding_window": 8}),
    "qwen2-sliding": ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    "gemma2-sliding": ("gemma2", {"sliding_window": 8}),
    "gemma3-sliding": ("gemma3_text", {"sliding_window": 8}),
    "gemma3-eager": ("gemma3_text", {"sliding_window": 8, "attn_implementation": "eager"}),
}
KINDS = (*FAMILIES, *SLIDING)


def a_model(kind, seed=0):
    family, options = SLIDING.get(kind, (kind, {}))
    if family == "gpt2":
        options = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return tiny_model(family, seed=seed, **options)


def some_windows():
    windows = tiny_tokens(len(ENDS), LENGTH, seed=5)
    for row, ends in zip(windows, ENDS, strict=True):
        row[list(ends)] = END
    return windows


def documents(windows):
    """(row, its tokens from, to) of every document."""
    for row, ends in enumerate(ENDS[: len(windows)]):
        cuts = [0, *(end + 1 for end in ends if end + 1 < LENGTH), LENGTH]
        for start, stop in pairwise(cuts):
            yield row, start, stop


def alone(model, windows):
    """States of every document run by itself through transformers, put together again."""
    states = []
    for row, start, stop in documents(windows):
        states.append(model.base_model(windows[row : row + 1, start:stop]).last_hidden_state[0])
    return torch.cat(states).view(*windows.shape, -1)


def entropy_alone(model, windows):
    """Mean next-token loss, every document by itself."""
    total, count = 0.0, 0
    for row, start, stop in documents(windows):
        ids = windows[row : row + 1, start:stop]
        if stop - start > 1:
            logits = model(ids).logits[0, :-1]
            total = total + nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            count += stop - start - 1
    return total / count


class Gradients(Policy):
    """Keeps the gradients of the first step."""

    def after_backward(self, ctx):
        self.found = {name: p.grad.clone() for name, p in ctx.model.named_parameters() if p.grad is not None}


# --- positions and labels


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_positions_and_labels_token_by_token(tokens):
    positions, labels, place = [], [], 0
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        positions.append(place)
        labels.append(-100 if token == END or after is None else after)
        place = 0 if token == END else place + 1
    ids = torch.tensor([tokens])
    assert document_positions(ids, END).tolist() == [positions]
    assert next_tokens(ids, END).tolist() == [labels]
    assert document_positions(ids, None) is None


# --- one forward pass


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_each_document_alone(kind):
    model, windows = a_model(kind), some_windows()
    with torch.no_grad():
        states = hidden_states(model, windows, document_positions(windows, END))
        torch.testing.assert_close(states, alone(model, windows), rtol=0, atol=1e-5)
        together = hidden_states(model, windows)
    # the window without separators, and only that one, is the same together
    torch.testing.assert_close(states[0], together[0], rtol=0, atol=1e-5)
    assert (states[1:] - together[1:]).abs().amax((1, 2)).min() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_each_document_alone(kind):
    windows, gradients = some_windows(), Gradients()
    result = train(a_model(kind), windows, [gradients], SETTINGS)
    model = a_model(kind)
    loss = entropy_alone(model, windows)
    loss.backward()
    assert result.losses[0] == pytest.approx(loss.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        # a matrix that only tokens without a label read has none
        if parameter.grad is not None:
            torch.testing.assert_close(gradients.found[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("changes", [{"recompute": True}, {"autocast": torch.bfloat16}])
def test_with_other_options(changes):
    windows = some_windows()
    plain = train(a_model("llama"), windows, [], SETTINGS).losses
    other = train(a_model("llama"), windows, [], dataclasses.replace(SETTINGS, **changes)).losses
    assert other == (plain if "recompute" in changes else pytest.approx(plain, rel=2e-2))


def test_a_compiled_model_gives_the_same_losses():
    def losses(compile):
        model = tiny_model("gemma3_text", num_hidden_layers=2, sliding_window=8)
        return train(model, some_windows(), [], dataclasses.replace(SETTINGS, compile=compile)).losses

    assert losses(True) == pytest.approx(losses(False), rel=1e-5)


# --- means over documents of uneven number


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_micro_batch_does_not_matter(micro_batch):
    def start(micro_batch):
        settings = dataclasses.replace(SETTINGS, micro_batch=micro_batch, tokens=3 * 4 * LENGTH)
        model = a_model("llama")
        return train(model, some_windows(), [Distillation(a_model("llama", 1))], settings), model

    (one, model), (other, again) = start(4), start(micro_batch)
    assert one.losses == pytest.approx(other.losses, rel=1e-5)
    for got, want in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_validation_is_the_mean_over_all_that_is_predicted(micro_batch):
    model, windows = a_model("gemma2"), some_windows()
    settings = dataclasses.replace(SETTINGS, micro_batch=micro_batch)
    with torch.no_grad():
        expected = entropy_alone(model, windows).item()
    assert validation_loss(model, windows, settings, World()) == pytest.approx(expected, abs=1e-5)
    together = dataclasses.replace(settings, separator=None)
    assert abs(validation_loss(model, windows, together, World()) - expected) > 1e-3


def test_text_without_anything_to_predict_trains_nothing():
    model = a_model("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    windows = torch.full((4, LENGTH), END)
    assert train(model, windows, [], SETTINGS).losses == (0.0,)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert math.isnan(validation_loss(model, windows, SETTINGS, World()))


# --- teachers


@pytest.mark.parametrize("kind", ["llama", "gemma2-sliding", "opt"])
def test_a_teacher_keeps_documents_apart_too(kind):
    windows, settings = some_windows(), dataclasses.replace(SETTINGS, cross_entropy=0.0, micro_batch=4)
    model, teacher = a_model(kind), a_model(kind, 1)
    with torch.no_grad():
        # logits as the heads give them to states of documents alone
        own, taught = (m.get_output_embeddings()(alone(m, windows)) for m in (model, teacher))
    cap = getattr(model.config, "final_logit_softcapping", None)
    own, taught = (t if cap is None else cap * torch.tanh(t / cap) for t in (own, taught))
    counted = next_tokens(windows, END) != -100
    own, taught = own.log_softmax(-1), taught.log_softmax(-1)
    expected = ((taught.exp() * (taught - own)).sum(-1))[counted].mean().item()
    found = train(a_model(kind), windows, [Distillation(teacher)], settings).losses[0]
    assert found == pytest.approx(expected, rel=1e-5)


def test_layerwise_states_are_those_of_documents_alone():
    windows = some_windows()
    settings = dataclasses.replace(SETTINGS, cross_entropy=0.0, micro_batch=4)

    def last_states(model):
        kept = []
        handle = blocks_of(model)[2].register_forward_hook(lambda module, args, out: kept.append(out))
        with torch.no_grad():
            alone(model, windows)
        handle.remove()
        return torch.cat([states[0] for states in kept])

    own, taught = last_states(a_model("llama")), last_states(a_model("llama", 1))
    expected = ((own - taught).square().sum(-1) / taught.square().sum(-1)).mean().item()
    policy = LayerwiseDistillation(a_model("llama", 1), layers=[(2, 2)])
    assert train(a_model("llama"), windows, [policy], settings).losses[0] == pytest.approx(expected, rel=1e-5)


def test_a_cached_teacher_says_whether_it_kept_them_apart(tmp_path):
    windows, teacher = some_windows(), a_model("llama", 1)
    settings = dataclasses.replace(SETTINGS, cross_entropy=0.0)
    apart = cache_teacher(teacher, windows, tmp_path / "apart", k=VOCAB, separator=END)
    got = train(a_model("llama"), windows, [Distillation(apart)], settings)
    want = train(a_model("llama"), windows, [Distillation(teacher)], settings)
    assert got.losses == pytest.approx(want.losses, rel=2e-3)
    together = cache_teacher(teacher, windows, tmp_path / "together", k=4)
    with pytest.raises(ShearlingError, match="a cache with separator=None, not 2; give another folder"):
        train(a_model("llama"), windows, [Distillation(together)], settings)
    with pytest.raises(ShearlingError, match="a cache with separator=2, this one has None"):
        cache_teacher(teacher, windows, tmp_path / "apart", k=VOCAB)
    assert CachedTeacher(tmp_path / "apart", windows).separator == END


# --- refusals


def test_what_cannot_be_apart_is_refused():
    with pytest.raises(ShearlingError, match=r"^separator=-1: must be a token id"):
        dataclasses.replace(SETTINGS, separator=-1)
    with pytest.raises(ShearlingError, match=r"^capture: [^\n]*leave documents together or capture off$"):
        dataclasses.replace(SETTINGS, capture=True)
    model = a_model("llama")
    # as it is called where the package is installed
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(
        ShearlingError, match=r"^documents apart: attention by flash_attention_2 [^\n]*use sdpa or eager$"
    ):
        train(model, some_windows(), [], SETTINGS)
