from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shearling.kernels import IGNORE, Terms
from shearling.kernels.head_loss_reference import head_loss_reference
from shearling.kernels.tables import table_of
from shearling.methods.ast import Strength, annealed_adam_
from shearling.methods.sparsegpt import inverse_factor, sweep_reference
from shearling.plan.patterns import Pattern
from shearling.train import chunked_cross_entropy, chunked_divergence, chunked_head_loss
from shearling.train.head import Head

KINDS = ["forward", "reverse", "jensen-shannon"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TERMS = [
    Terms(),
    Terms(softcap=3.0),
    *(Terms(0.0, 1.0, kind, temperature) for kind in KINDS for temperature in (0.7, 1.0, 2.5)),
    *(Terms(0.3, 0.6, kind, temperature) for kind in KINDS for temperature in (1.0, 2.5)),
    *(Terms(0.3, 0.6, kind, 2.5, 3.0, 2.0) for kind in KINDS),
    *(Terms(0.3, 0.6, kind, 1.0, 3.0) for kind in KINDS),
]

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def case(rows, vocab, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    student = 2 * torch.randn(rows, vocab, generator=generator)
    teacher = student + torch.randn(rows, vocab, generator=generator)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[1::3] = IGNORE
    count = (labels != IGNORE).sum().double()
    student, teacher = (t.to(device, dtype) for t in (student, teacher))
    return student, teacher, labels.to(device), count.to(device)


def by_definition(student, teacher, labels, terms):
    """Cross-entropy and divergence [n] from probabilities."""

    def cap(logits, c):
        return logits if c is None else c * torch.tanh(logits / c)

    def kl(p, q):
        return (p * (p.log() - q.log())).sum(1)

    counted = (labels != IGNORE).to(student.dtype)
    z, u = cap(student, terms.softcap), cap(teacher, terms.teacher_softcap)
    entropy = torch.nn.functional.cross_entropy(z, labels, reduction="none", ignore_index=IGNORE)
    s, t = (torch.softmax(x / terms.temperature, 1) for x in (z, u))
    value = {
        "forward": lambda: kl(t, s),
        "reverse": lambda: kl(s, t),
        "jensen-shannon": lambda: (kl(s, (s + t) / 2) + kl(t, (s + t) / 2)) / 2,
    }[terms.kind]()
    return entropy * counted, value * counted


def expected(student, teacher, labels, count, terms):
    """Values and slope in float64, by automatic differentiation."""
    leaf = student.clone().double().requires_grad_()
    entropy, divergence = by_definition(leaf, teacher.double(), labels, terms)
    weighted = terms.cross_entropy * entropy + terms.divergence * terms.temperature**2 * divergence
    (weighted.sum() / count).backward()
    return entropy.detach() * bool(terms.cross_entropy), divergence.detach() * bool(terms.divergence), leaf.grad


def check(head_loss, terms, student, teacher, labels, count, tolerance, slope_tolerance):
    before = student.clone()
    want = expected(student, teacher, labels, count, terms)
    values = head_loss(student, labels, count, terms, teacher, with_slope=False)
    assert torch.equal(student, before)
    again = head_loss(student, labels, count, terms, teacher)
    for got, same, exact in zip(values, again, want[:2], strict=True):
        assert torch.equal(got, same)
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)
    assert student.dtype == before.dtype
    assert (student.double() - want[2]).norm() <= slope_tolerance * want[2].norm()
    assert not student[labels == IGNORE].any()


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_reference_equals_automatic_differentiation(terms, dtype, tolerance):
    check(head_loss_reference, terms, *case(7, 50, dtype), tolerance, tolerance)


def assert_not_finite(head_loss, bad, terms):
    """A logit that is not finite shows in its row alone, in every term; ``terms`` have both."""
    for broken in range(2 if terms.divergence else 1):
        student, teacher, labels, count = case(4, 300, torch.float32)
        (student, teacher)[broken][2, 270] = bad
        values = head_loss(student, labels, count, terms, teacher)
        shown = values[1] if broken else torch.stack(values[: 1 + bool(terms.divergence)])
        assert not shown[..., 2].isfinite().any()
        assert shown[..., [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "terms", [Terms(), *(Terms(1.0, 1.0, k, 2.0, c, c) for k in KINDS for c in (None, 5.0))], ids=str
)
def test_reference_hides_nothing(terms, bad):
    assert_not_finite(head_loss_reference, bad, terms)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.skipif(INTERPRETED, reason="is the other process")
def test_kernel_in_tritons_interpreter():
    """Triton reads the variable when it decorates a function, so the tests below run in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreted", __file__]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@interpreted
@pytest.mark.parametrize(
    ("terms", "dtype", "slope"),
    [
        *((terms, torch.float32, 1e-5) for terms in TERMS),
        *((terms, torch.bfloat16, 1e-2) for terms in TERMS[::5]),
        *((terms, torch.float16, 2e-3) for terms in TERMS[1::5]),
    ],
    ids=str,
)
def test_interpreted(terms, dtype, slope):
    from shearling.kernels.head_loss import head_loss

    def blocks(*args, **options):
        return head_loss(*args, **options, block=256)

    check(blocks, terms, *case(5, 1000, dtype), 1e-5, slope)


@interpreted
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "terms", [Terms(), *(Terms(1.0, 1.0, k, 2.0, c, c) for k in KINDS for c in (None, 5.0))], ids=str
)
def test_interpreted_hides_nothing(terms, bad):
    from shearling.kernels.head_loss import head_loss

    assert_not_finite(lambda *args: head_loss(*args, block=64), bad, terms)


@interpreted
def test_interpreted_rows_that_are_apart():
    from shearling.kernels.head_loss import head_loss

    student, teacher, labels, count = case(5, 300, torch.float32)
    wide = torch.full((5, 400), 7.0)
    wide[:, :300] = student
    values = head_loss(wide[:, :300], labels, count, TERMS[-1], teacher, block=128)
    other = head_loss(student, labels, count, TERMS[-1], teacher, block=128)
    assert torch.equal(wide[:, :300], student) and bool((wide[:, 300:] == 7).all())
    assert all(torch.equal(a, b) for a, b in zip(values, other, strict=True))


def through_heads(dtype, device="cpu", tokens=33, width=16, vocab=50, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = [normal(tokens, width), normal(vocab, width) / width**0.5, normal(vocab)]
    taught = [normal(tokens, 24), normal(vocab + 7, 24) / 24**0.5, normal(vocab + 7)]
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::5] = IGNORE
    own = [t.to(device, dtype).requires_grad_() for t in tensors]
    return own, [t.to(device, dtype) for t in taught], labels.to(device)


def check_one_pass(own, taught, labels, kind, tolerance, slope_tolerance):
    """chunked_head_loss against the definition in float64."""
    hidden, weight, bias = own
    exact = [t.detach().double().requires_grad_() for t in own]
    terms = Terms(0.3, 0.6, kind, 2.0, 5.0, 6.0)
    student = exact[0] @ exact[1].T + exact[2]
    vocab = len(weight)
    teacher = (taught[0].double() @ taught[1].double().T + taught[2].double())[:, :vocab]
    entropy, divergence = (v.sum() / (labels != IGNORE).sum() for v in by_definition(student, teacher, labels, terms))
    divergence = divergence * 4
    (3 * (0.3 * entropy + 0.6 * divergence)).backward()
    heads = Head(weight, bias, 5.0), Head(taught[1], taught[2], 6.0)
    found = chunked_head_loss(
        hidden, heads[0], taught[0], heads[1], labels, 2.0, 8, kind, cross_entropy_weight=0.3, divergence_weight=0.6
    )
    (3 * found.total).backward()
    assert not found.cross_entropy.requires_grad and not found.divergence.requires_grad
    for got, want in zip(found, (0.3 * entropy + 0.6 * divergence, entropy, divergence), strict=True):
        torch.testing.assert_close(got.detach().double(), want.detach(), rtol=tolerance, atol=0)
    for got, want in zip(own, exact, strict=True):
        assert (got.grad.double() - want.grad).norm() <= slope_tolerance * want.grad.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_equals_the_definition(kind):
    check_one_pass(*through_heads(torch.float32), kind, 1e-5, 1e-5)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_interpreted_one_pass_equals_the_definition(kind, dtype, tolerance):
    check_one_pass(*through_heads(dtype), kind, tolerance, tolerance)


def test_one_pass_gives_both_losses():
    own, taught, labels = through_heads(torch.float32)
    heads = Head(own[1], own[2]), Head(taught[1], taught[2])
    found = chunked_head_loss(
        own[0], heads[0], taught[0], heads[1], labels, cross_entropy_weight=0.5, divergence_weight=2.0
    )
    entropy = chunked_cross_entropy(own[0], own[1], labels, bias=own[2])
    divergence = chunked_divergence(own[0], heads[0], taught[0], heads[1], labels)
    assert torch.equal(found.cross_entropy, entropy) and torch.equal(found.divergence, divergence)
    torch.testing.assert_close(found.total, 0.5 * entropy + 2 * divergence)


# every one is compiled
@pytest.mark.parametrize(
    "terms", [TERMS[0], TERMS[3], *(Terms(0.3, 0.6, k, 2.5, c, c) for k in KINDS for c in (None, 3.0))], ids=str
)
@pytest.mark.parametrize(
    ("dtype", "vocab", "slope"),
    [
        (torch.float32, 49152, 1e-4),
        (torch.float32, 128256, 1e-4),
        (torch.bfloat16, 49152, 1e-2),
        (torch.bfloat16, 128256, 1e-2),
        (torch.float16, 50257, 1e-2),
    ],
)
@pytest.mark.gpu
@needs_gpu
def test_kernel_on_a_gpu(terms, dtype, vocab, slope):
    pytest.importorskip("triton")
    from shearling.kernels.head_loss import head_loss

    check(head_loss, terms, *case(5, vocab, dtype, "cuda"), 1e-4, slope)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.gpu
@needs_gpu
def test_one_pass_on_a_gpu(kind, dtype, tolerance):
    sizes = {"tokens": 300, "width": 64, "vocab": 1000}
    check_one_pass(*through_heads(dtype, "cuda", **sizes), kind, tolerance, tolerance)


# --- SparseGPT's sweep over columns

SWEEPS = [(128, (2, 4)), (128, (4, 8)), (100, (1, 4)), (126, (2, 3)), (48, (1, 16)), (128, None), (5, None)]
#: the interpreter takes a tenth of a second a column
FEW_COLUMNS = [(32, (2, 4)), (32, (4, 8)), (20, (1, 4)), (27, (2, 3)), (32, (1, 16)), (32, None), (5, None)]


def check_sweep(columns, pattern, device="cpu", outputs=45):
    from shearling.kernels.column_sweep import column_sweep

    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(2 * columns, columns, generator=generator) * (0.2 + torch.rand(columns, generator=generator))
    inputs += inputs.roll(1, 1)
    # a corner of a larger factor
    corner = torch.full((columns + 3, columns + 3), torch.nan)
    corner[:columns, :columns] = inverse_factor(inputs.T @ inputs, 0.01)[0].float()
    part = torch.randn(columns, outputs, generator=generator)
    stays = torch.zeros(columns, outputs, dtype=torch.bool)
    if pattern is None:
        stays = torch.rand(columns, outputs, generator=generator) < 0.5
    case = [t.to(device) for t in (part, corner, stays)]
    case[1] = case[1][:columns, :columns]
    exact = [t.double() if t.is_floating_point() else t.clone() for t in case]
    errors, found = sweep_reference(*exact, pattern), column_sweep(*case, pattern)
    assert torch.equal(case[2], exact[2])
    torch.testing.assert_close(case[0].double(), exact[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.double(), errors, rtol=1e-4, atol=1e-4)
    assert not case[0][~case[2]].any() and not torch.signbit(case[0][~case[2]]).any()


def check_sweep_ties(device="cpu"):
    """With a factor of 1 nothing is mended, and equal weights stay in their order."""
    from shearling.kernels.column_sweep import column_sweep

    part = torch.tensor([2.0, -1, 1, -2, 1, 1, 1, 1], device=device)[:, None].repeat(1, 9)
    stays = torch.zeros_like(part, dtype=torch.bool)
    errors = column_sweep(part.clone(), torch.eye(8, device=device), stays, (3, 4))
    assert stays.T.tolist() == [[True, True, False, True, True, True, True, False]] * 9
    assert torch.equal(errors, part.masked_fill(stays, 0))


@interpreted
@pytest.mark.parametrize(("columns", "pattern"), FEW_COLUMNS)
def test_interpreted_sweep(columns, pattern):
    check_sweep(columns, pattern)


@interpreted
def test_interpreted_sweep_of_equal_weights():
    check_sweep_ties()


@pytest.mark.parametrize(("columns", "pattern"), SWEEPS)
@pytest.mark.gpu
@needs_gpu
def test_sweep_on_a_gpu(columns, pattern):
    check_sweep(columns, pattern, "cuda", 1000)


@pytest.mark.gpu
@needs_gpu
def test_sweep_of_equal_weights_on_a_gpu():
    check_sweep_ties("cuda")


# --- many tensors at once

SHAPES = [(7, 16), (40, 256), (1, 8), (33, 48)]


def check_annealed_adam(how, second_moment, device="cpu"):
    from shearling.kernels.annealed_adam import BLOCK, annealed_adam

    generator = torch.Generator().manual_seed(0)
    weights, gradients = ([torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(2))
    masks = [torch.rand(shape, generator=generator) < 0.5 for shape in SHAPES]
    exact = [[w.double(), torch.zeros_like(w).double(), torch.zeros_like(w).double()] for w in weights]
    own = [t.to(device) for t in weights]
    moments = [[torch.zeros_like(t) for t in own] for _ in range(2)]
    options = {"rate": 0.01, "decay": 0.3, "how": how, "second_moment": second_moment, "weight_decay": 0.1}
    numbers = {"betas": (0.9, 0.95), "eps": 1e-8}
    table = None
    for step in (1, 2, 3):
        gradients = [torch.randn(shape, generator=generator) for shape in SHAPES]
        there = [g.to(device) for g in gradients]
        table = table_of([own, there, *moments, [m.to(device) for m in masks]], BLOCK, table)
        annealed_adam(table, step, **options, **numbers)
        for (weight, first, second), gradient, mask in zip(exact, gradients, masks, strict=True):
            annealed_adam_(weight, gradient.double(), first, second, mask, step, Strength(**options, **numbers))
    for number, wanted in enumerate(exact):
        for found, want in zip((own[number], moments[0][number], moments[1][number]), wanted, strict=True):
            other = ~torch.isclose(found.double().cpu(), want, rtol=1e-3, atol=1e-4)
            # where gradient and decay nearly cancel, a single weight may go another way
            assert other.sum() <= 1 + 1e-5 * want.numel()


def check_nm_masks(keep, of, device="cpu"):
    from shearling.kernels.nm_masks import GROUPS, nm_masks

    generator = torch.Generator().manual_seed(of)
    shapes = [(5, 4 * of), (300, 8 * of), (1, of)]
    # half of them with ties
    weights = [torch.randn(shape, generator=generator).mul(3) for shape in shapes]
    weights = [weight.round() if number % 2 else weight for number, weight in enumerate(weights)]
    before, start = ([torch.rand(shape, generator=generator) < 0.5 for shape in shapes] for _ in range(2))
    kinds = [[t.to(device, copy=True) for t in kind] for kind in (weights, before, start)]
    counts = nm_masks(table_of(kinds, GROUPS * of), keep, of).tolist()
    expected = [Pattern(keep, of).mask(weight.abs()) for weight in weights]
    assert all(torch.equal(mask.cpu(), want) for mask, want in zip(kinds[1], expected, strict=True))
    assert counts == [
        sum(int((a ^ b).sum()) for a, b in zip(expected, other, strict=True)) for other in (before, start)
    ]


HOWS = [("decoupled", "adam"), ("decoupled", "ast"), ("coupled", "adam"), ("l1", "adam")]
PATTERNS = [(2, 4), (1, 4), (4, 8), (2, 3), (1, 16)]


@interpreted
@pytest.mark.parametrize(("how", "second_moment"), HOWS)
def test_interpreted_annealed_adam(how, second_moment):
    check_annealed_adam(how, second_moment)


@interpreted
@pytest.mark.parametrize(("keep", "of"), PATTERNS)
def test_interpreted_nm_masks(keep, of):
    check_nm_masks(keep, of)


@pytest.mark.parametrize(("how", "second_moment"), HOWS)
@pytest.mark.gpu
@needs_gpu
def test_annealed_adam_on_a_gpu(how, second_moment):
    check_annealed_adam(how, second_moment, "cuda")


@pytest.mark.parametrize(("keep", "of"), PATTERNS)
@pytest.mark.gpu
@needs_gpu
def test_nm_masks_on_a_gpu(keep, of):
    check_nm_masks(keep, of, "cuda")


def test_a_table_is_made_again_only_for_other_tensors():
    tensors = [torch.zeros(5), torch.zeros(9)]
    table = table_of([tensors, tensors], 4)
    assert table.owners.tolist() == [0, 0, 1, 1, 1] and table.starts.tolist() == [0, 4, 0, 4, 8]
    assert table.sizes.tolist() == [5, 9] and table.addresses.tolist() == [[t.data_ptr() for t in tensors]] * 2
    assert table_of([tensors, tensors], 4, table) is table
    others = [torch.zeros(5), torch.zeros(9)]
    assert table_of([tensors, others], 4, table).addresses[1].tolist() == [t.data_ptr() for t in others]
