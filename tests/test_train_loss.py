from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from shearling.nn import LoRABranch, wrap_
from shearling.train import chunked_cross_entropy, chunked_divergence
from shearling.train.documents import next_tokens
from shearling.train.head import Head, hidden_states, output_head
from tests.tiny import FAMILIES, tiny_model, tiny_tokens


def full_logits(hidden, weight, bias, softcap):
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def relative(got, expected):
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-12))


def case(seed, tokens, width, vocab, ignored):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    # logits of order one: float32 carries an error of their size, which a saturated softmax's tiny gradient would not
    weight = torch.randn(vocab, width, generator=generator) / width**0.5
    bias = torch.randn(vocab, generator=generator)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    return hidden, weight, bias, labels


def leaves(*tensors, dtype):
    return [
        None if t is None else t.to(dtype).requires_grad_() for t in (t if t is None else t.clone() for t in tensors)
    ]


@hypothesis_settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 40),
    width=st.integers(1, 20),
    vocab=st.integers(2, 60),
    ignored=st.sampled_from([0.0, 0.3]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    with_bias=st.booleans(),
    chunk=st.integers(1, 50),
)
def test_cross_entropy_equals_full_logits_in_float64(seed, tokens, width, vocab, ignored, softcap, with_bias, chunk):
    hidden, weight, bias, labels = case(seed, tokens, width, vocab, ignored)
    labels[0] = 0
    bias = bias if with_bias else None
    exact = leaves(hidden, weight, bias, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(full_logits(*exact, softcap), labels)
    (3 * expected).backward()
    ours = leaves(hidden, weight, bias, dtype=torch.float32)
    loss = chunked_cross_entropy(ours[0], ours[1], labels, softcap, chunk, bias=ours[2])
    (3 * loss).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(ours, exact, strict=True):
        if got is not None:
            # the floor: a gradient that vanishes has no relative error
            assert (got.grad.double() - want.grad).norm() <= 1e-5 * want.grad.norm() + 1e-6


def test_cross_entropy_in_float64_passes_gradcheck():
    hidden, weight, bias, labels = case(0, 5, 4, 7, 0.0)
    labels[2] = -100
    inputs = leaves(hidden, weight, bias, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda h, w, b: chunked_cross_entropy(h, w, labels, 4.0, 2, bias=b), inputs, raise_exception=True
    )


def per_token_divergence(kind, student, teacher):
    """By definition, from probabilities."""

    def kl(p, q):
        return (p * (p.log() - q.log())).sum(1)

    middle = (student + teacher) / 2
    return {
        "forward": lambda: kl(teacher, student),
        "reverse": lambda: kl(student, teacher),
        "jensen-shannon": lambda: (kl(student, middle) + kl(teacher, middle)) / 2,
    }[kind]()


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen-shannon"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("more", [0, 14])
def test_divergence_equals_full_logits_in_float64(kind, temperature, softcap, more):
    hidden, weight, bias, labels = case(0, 33, 16, 50, 0.2)
    # the teacher may know more tokens
    taught, teacher_weight, teacher_bias, _ = case(1, 33, 24, 50 + more, 0.0)
    exact = leaves(hidden, weight, bias, dtype=torch.float64)
    student = torch.softmax(full_logits(*exact, softcap) / temperature, 1)
    teacher_logits = full_logits(taught.double(), teacher_weight.double(), teacher_bias.double(), 6.0)[:, :50]
    teacher = torch.softmax(teacher_logits / temperature, 1)
    expected = temperature**2 * per_token_divergence(kind, student, teacher)[labels != -100].mean()
    expected.backward()
    ours = leaves(hidden, weight, bias, dtype=torch.float32)
    heads = Head(ours[1], ours[2], softcap), Head(teacher_weight, teacher_bias, 6.0)
    loss = chunked_divergence(ours[0], heads[0], taught, heads[1], labels, temperature, 7, kind)
    loss.backward()
    assert relative(loss.detach(), expected.detach()) < 1e-5
    for got, want in zip(ours, exact, strict=True):
        assert relative(got.grad, want.grad) < 1e-5


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen-shannon"])
def test_divergence_through_a_tied_head(kind):
    """The embedding's gradient is the sum of what comes through the input and through the head."""
    model, teacher, ids = tiny_model("llama", tie_word_embeddings=True), tiny_model("llama", seed=1), tiny_tokens()
    exact = tiny_model("llama", tie_word_embeddings=True).double()
    labels = next_tokens(ids)
    student = torch.softmax(exact(ids).logits, -1)[:, :-1].flatten(0, 1)
    with torch.no_grad():
        taught = torch.softmax(teacher.double()(ids).logits, -1)[:, :-1].flatten(0, 1)
    per_token_divergence(kind, student, taught).mean().backward()
    states = hidden_states(teacher.float(), ids)
    chunked_divergence(
        hidden_states(model, ids), output_head(model), states, output_head(teacher), labels, chunk=5, kind=kind
    ).backward()
    got, want = (m.model.embed_tokens.weight.grad for m in (model, exact))
    assert relative(got, want) < 1e-4


def test_all_ignored_is_zero_with_zero_gradient():
    hidden, weight, _, labels = case(0, 6, 4, 9, 1.1)
    h, w = leaves(hidden, weight, dtype=torch.float32)
    loss = chunked_cross_entropy(h, w, labels)
    loss.backward()
    assert loss.item() == 0 and not h.grad.any() and not w.grad.any()


def test_no_full_logits_and_no_gradient_nobody_asked_for():
    """Nothing as long as vocabulary x tokens is made, and a frozen head costs no gradient of its size."""
    hidden, weight, _, labels = case(0, 64, 8, 100, 0.0)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    hidden.requires_grad_()
    with Sizes():
        chunked_cross_entropy(hidden, weight, labels, chunk=4).backward()
    assert max(sizes) == 800  # views of the weight itself; logits of 4 tokens are 400
    assert weight.grad is None


def test_without_gradients_nothing_is_kept():
    hidden, weight, _, labels = case(0, 8, 8, 10, 0.0)
    hidden.requires_grad_()
    with torch.no_grad():
        assert chunked_cross_entropy(hidden, weight, labels).grad_fn is None


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32():
    hidden, weight, _, labels = case(0, 32, 16, 40, 0.0)
    h, w = leaves(hidden, weight, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(h, w, labels)
    loss.backward()
    rounded = full_logits(hidden.bfloat16(), weight.bfloat16(), None, None).double()
    expected = torch.nn.functional.cross_entropy(rounded, labels)
    assert loss.dtype == h.grad.dtype == w.grad.dtype == torch.float32
    assert relative(loss.detach(), expected) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_head_give_the_models_own_loss(family):
    model, tokens = tiny_model(family), tiny_tokens()
    expected = model(tokens, labels=tokens).loss
    head = output_head(model)
    loss = chunked_cross_entropy(hidden_states(model, tokens), head.weight, next_tokens(tokens), head.softcap, 5)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_a_wrapped_head_is_seen_by_the_loss():
    model, tokens = tiny_model("llama"), tiny_tokens()
    linear = wrap_(model, ["lm_head"])["lm_head"]
    branch = LoRABranch(32, 97, 2, 4.0)
    torch.nn.init.normal_(branch.up)
    linear.branches.append(branch)
    head = output_head(model)
    loss = chunked_cross_entropy(hidden_states(model, tokens), head.weight, next_tokens(tokens))
    torch.testing.assert_close(loss, model(tokens, labels=tokens).loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert branch.up.grad.any() and branch.down.grad.any()
