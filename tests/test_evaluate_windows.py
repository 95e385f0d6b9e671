"""Perplexity and divergence against full logits in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from shearling.errors import ShearlingError
from shearling.evaluate import divergence, logits, perplexity
from shearling.evaluate.logits import evaluating, logits_in_pieces
from tests.tiny import FAMILIES, VOCAB, tiny_model

# a cap this low changes every logit; a projection behind the last block must run too
OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 0.5},
    "gemma3_text": {"final_logit_softcapping": 0.5},
    "opt": {"word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "gpt2": {"n_positions": 64},
}


def make(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    return tiny_model(family, seed, **{"tie_word_embeddings": False, **OWN.get(family, {}), **overrides})


def make_tokens(num: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (num,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def full_log_probs(model: PreTrainedModel, ids_T: Tensor) -> Tensor:
    return model.double()(ids_T[None], use_cache=False).logits[0].log_softmax(-1)


def naive_nll(model: PreTrainedModel, tokens: Tensor, context: int, stride: int) -> list[float]:
    """Every token once, by the first whole window that predicts it."""
    losses: dict[int, float] = {}
    for start in range(0, len(tokens) - context + 1, stride):
        log_probs_TV = full_log_probs(model, tokens[start : start + context])
        for position in range(context - 1):
            target = start + position + 1
            losses.setdefault(target, -log_probs_TV[position, tokens[target]].item())
    return list(losses.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_equal_the_full_forward(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "PIECE", 3 * VOCAB)
    model = make(family)
    ids_BT = make_tokens(24).view(2, 12)
    select_BT = make_tokens(24, seed=1).view(2, 12) % 2 == 0
    with evaluating(model):
        pieces = list(logits_in_pieces(model, ids_BT, select_BT))
        expected_NV = model(ids_BT).logits[select_BT]
    assert max(len(piece) for piece in pieces) == 3
    torch.testing.assert_close(torch.cat(pieces), expected_NV, atol=1e-5, rtol=1e-5)
    # the borrowed decoder works again
    with torch.no_grad():
        torch.testing.assert_close(model(ids_BT).logits[select_BT], expected_NV)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_equals_float64(family: str) -> None:
    model, tokens = make(family), make_tokens(75)
    measured = perplexity(model, tokens, context=16, stride=16, batch=3)
    losses = naive_nll(model, tokens, 16, 16)
    assert measured.tokens == len(losses) == 4 * 15
    assert measured.nll == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert measured.value == pytest.approx(torch.tensor(sum(losses) / len(losses)).exp().item(), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(context=st.integers(2, 12), data=st.data(), batch=st.integers(1, 4))
def test_sliding_windows_score_each_token_once(context: int, data: st.DataObject, batch: int) -> None:
    stride = data.draw(st.integers(1, context))
    tokens = make_tokens(data.draw(st.integers(context, 40)))
    model = make().double()
    measured = perplexity(model, tokens, context=context, stride=stride, batch=batch)
    losses = naive_nll(model, tokens, context, stride)
    assert measured.tokens == len(losses)
    # a double model keeps its precision
    assert measured.nll == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    model = make()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, make_tokens(64), context=16, stride=16).value == pytest.approx(VOCAB, rel=1e-6)


def test_bfloat16_logits_are_upcast() -> None:
    model = make().bfloat16()
    tokens = make_tokens(32)
    with torch.no_grad():
        log_probs = model(tokens.view(2, 16)).logits.double().log_softmax(-1)
    expected = -log_probs[:, :-1].gather(-1, tokens.view(2, 16)[:, 1:, None]).mean().item()
    assert perplexity(model, tokens, context=16, stride=16, batch=2).nll == pytest.approx(expected, rel=1e-5)


def test_training_mode_and_gradients_come_back() -> None:
    model = make().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    perplexity(model, make_tokens(32), context=16, stride=16)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    model(make_tokens(8)[None]).logits.sum().backward()


def test_dropout_is_off() -> None:
    torch.manual_seed(0)
    model = make("gpt2", resid_pdrop=0.9)
    tokens = make_tokens(32)
    first, second = (perplexity(model.train(), tokens, context=16, stride=16).nll for _ in range(2))
    assert first == second


def test_progress_counts_windows() -> None:
    seen: list[tuple[int, int]] = []
    perplexity(
        make(), make_tokens(80), context=16, stride=16, batch=2, on_progress=lambda done, of: seen.append((done, of))
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("num", "context", "stride", "message"),
    [
        (15, 16, 16, "15 tokens do not fill one window"),
        (64, 16, 17, "stride 17 must lie in 1..16"),
        (64, 16, 0, "stride 0 must lie in 1..16"),
        (64, 1, 1, "context >= 2"),
    ],
)
def test_perplexity_refuses(num: int, context: int, stride: int, message: str) -> None:
    with pytest.raises(ShearlingError, match=message):
        perplexity(make(), make_tokens(num), context=context, stride=stride)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_learned_positions_bound_the_context(family: str) -> None:
    model = make(family)
    assert perplexity(model, make_tokens(64), context=64, stride=64).tokens == 63
    with pytest.raises(ShearlingError, match="65 tokens exceed the 64 learned positions"):
        perplexity(model, make_tokens(65), context=65, stride=65)
    # rotary positions have no end
    assert perplexity(make("llama"), make_tokens(65), context=65, stride=65).tokens == 64


def test_token_outside_the_vocabulary() -> None:
    tokens = make_tokens(32)
    tokens[5] = VOCAB
    with pytest.raises(ShearlingError, match=f"token id {VOCAB} lies outside the model's 0..{VOCAB - 1}"):
        perplexity(make(), tokens, context=16, stride=16)


def test_non_finite_loss_names_the_windows() -> None:
    model, tokens = make(), make_tokens(48) % 96
    with torch.no_grad():
        model.model.embed_tokens.weight[96] = float("nan")
    tokens[40] = 96
    with pytest.raises(ShearlingError, match=r"not finite in windows 3\.\.3 of 3"):
        perplexity(model, tokens, context=16, stride=16)


def test_model_without_head() -> None:
    with pytest.raises(ShearlingError, match="no language-modelling head"):
        perplexity(make().model, make_tokens(32), context=16, stride=16)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_divergence_by_definition(family: str) -> None:
    model, reference, tokens = make(family, seed=0), make(family, seed=1), make_tokens(50)
    measured = divergence(model, reference, tokens, context=16, batch=2)
    kl, agreed = [], []
    for window in tokens[:48].view(3, 16):
        log_q, log_p = full_log_probs(model, window)[:-1], full_log_probs(reference, window)[:-1]
        kl += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
        agreed += (log_p.argmax(-1) == log_q.argmax(-1)).tolist()
    assert measured.tokens == len(kl) == 45
    assert measured.kl == pytest.approx(sum(kl) / 45, rel=1e-5)
    assert measured.agreement == pytest.approx(sum(agreed) / 45)


def test_divergence_has_a_direction() -> None:
    uniform, peaked, tokens = make(), make(), make_tokens(32)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    log_probs = torch.stack([full_log_probs(make(), window)[:-1] for window in tokens.view(2, 16)])
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean().item()
    logarithm = torch.tensor(VOCAB, dtype=torch.float64).log().item()
    # against a uniform model: log V - H(p); the other way round: -log V - mean log p
    assert divergence(uniform, peaked, tokens, context=16).kl == pytest.approx(logarithm - entropy, rel=1e-5)
    assert divergence(peaked, uniform, tokens, context=16).kl == pytest.approx(
        -logarithm - log_probs.mean().item(), rel=1e-5
    )


def test_divergence_from_itself_is_nothing() -> None:
    model, tokens = make(), make_tokens(32)
    same = divergence(model, model, tokens, context=16)
    assert same.kl == 0.0
    assert same.agreement == 1.0


def test_divergence_refuses_other_vocabularies() -> None:
    with pytest.raises(ShearlingError, match="97 logits and its reference 98"):
        divergence(make(), make(vocab_size=VOCAB + 1), make_tokens(32), context=16)


def test_divergence_that_is_not_finite() -> None:
    model = make()
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(ShearlingError, match="not finite"):
        divergence(model, make(), make_tokens(32), context=16)
