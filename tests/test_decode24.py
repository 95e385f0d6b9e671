"""Products of a few tokens with compact 2:4 weights: every kernel against the dense product in float64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shearling.kernels.compact24 import compact_product, pack24, pack24_int4, unpack24, unpack24_int4
from shearling.plan import Grid
from tests.test_compact import random_24

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

#: outputs, inputs, tokens, in 4 bits, rank: whole and broken blocks and words, one token to all
CASES = [
    (6, 160, 1, False, 0),
    (9, 164, 3, False, 5),
    (16, 128, 16, False, 0),
    (5, 256, 2, True, 70),
    (17, 128, 5, True, 0),
]
LARGE = [(4096, 4096, 1), (1024, 4096, 8), (4096, 11008, 16), (14336, 4096, 2), (4096, 14336, 4)]


def case(outputs, inputs, tokens, int4, rank, device="cpu"):
    """Inputs, a compact weight, a branch, and what the product must be and may be off by, in float64."""
    generator = torch.Generator().manual_seed(inputs + tokens)
    dense = (random_24(outputs, inputs // 4, tokens) / 20).to(device, torch.bfloat16)
    x = torch.randn(tokens, inputs, generator=generator).to(device, torch.bfloat16)
    if int4:
        codes, scales, _ = Grid("int4", 128).quantise(dense)
        weight = pack24_int4(codes, scales.bfloat16())
        exact = unpack24_int4(weight, torch.float64)
    else:
        weight = pack24(dense)
        exact = unpack24(weight).double()
    y = x.double() @ exact.T
    size = x.double().abs() @ exact.abs().T
    branch = None
    if rank:
        inner = torch.randn(tokens, rank, generator=generator).to(device, torch.bfloat16)
        up = torch.randn(outputs, rank, generator=generator).to(device, torch.bfloat16)
        branch = inner, up
        y += inner.double() @ up.double().T
        size += inner.double().abs() @ up.double().abs().T
    # the sum is rounded to bfloat16 once, by the interpreter towards zero; float32 sums of products lose less than this
    # of their absolute values; and the weights of tiles are bfloat16, whatever their codes and scales multiply to
    return x, weight, branch, y, y.abs() * 2.0 ** (-7 if INTERPRETED else -8) + size * (2.0**-9 if int4 else 2.0**-16)


def check(candidate, *sizes, device="cpu"):
    from shearling.kernels.decode24 import decode24, workspace_of

    x, weight, branch, y, off = case(*sizes, device=device)
    workspace = workspace_of(sizes[0], x.device)
    for _ in range(2):
        found = decode24(x, weight, candidate, workspace, branch)
        assert found.dtype == torch.bfloat16 and found.shape == y.shape
        assert ((found.double() - y).abs() <= off).all()
    # counters are ready for the next launch
    assert not workspace[: -(-sizes[0] // candidate.rows)].any() or candidate.split == 1


@pytest.mark.parametrize("sizes", CASES)
def test_reference_is_the_dense_product(sizes):
    x, weight, _, _, _ = case(*sizes)
    exact = unpack24_int4(weight, torch.float64) if sizes[3] else unpack24(weight).double()
    down, up = torch.randn(3, sizes[1]), torch.randn(sizes[0], 3)
    y = x.double() @ exact.T + x.double() @ down.double().T @ up.double().T
    torch.testing.assert_close(compact_product(x, weight, (down, up)).double(), y, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.skipif(INTERPRETED, reason="is the other process")
def test_kernels_in_tritons_interpreter():
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
    ("how", "sizes"),
    [
        (("lanes", 4, 32, 1, 1), CASES[0]),
        (("lanes", 8, 4, 2, 1), CASES[1]),
        (("lanes", 8, 8, 2, 1), CASES[3]),
        (("tiles", 16, 16, 2, 1), CASES[1]),
        (("tiles", 16, 16, 1, 1), CASES[2]),
        (("tiles", 16, 16, 1, 1), CASES[3]),
        (("tiles", 16, 16, 2, 1), CASES[4]),
    ],
    ids=str,
)
def test_interpreted_decode(how, sizes):
    from shearling.kernels.decode24 import Candidate

    check(Candidate(*how, select="where"), *sizes)


def check_expand(outputs, inputs, int4, device="cpu"):
    from shearling.kernels.decode24 import expand24

    weight = case(outputs, inputs, 1, int4, 0, device)[1]
    exact = unpack24_int4(weight, torch.bfloat16) if int4 else unpack24(weight)
    assert torch.equal(expand24(weight), exact)


@interpreted
@pytest.mark.parametrize(("inputs", "int4"), [(160, False), (164, False), (2304, True)])
def test_interpreted_expansion(inputs, int4):
    check_expand(3, inputs, int4)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("inputs", "int4"), [(164, False), (11008, False), (384, True), (11008, True)])
def test_expansion_on_a_gpu(inputs, int4):
    pytest.importorskip("triton")
    check_expand(300, inputs, int4, "cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize(("outputs", "inputs", "tokens"), [*(c[:3] for c in CASES), *LARGE])
def test_decode_on_a_gpu(outputs, inputs, tokens, int4):
    pytest.importorskip("triton")
    from shearling.kernels.decode24 import candidates

    if int4 and inputs % 128:
        pytest.skip("groups of 128 do not fill it")
    for number, candidate in enumerate(candidates(tokens)):
        for select in ("permute", "where")[: 2 if number == 0 else 1]:
            check(candidate._replace(select=select), outputs, inputs, tokens, int4, 64 * (number % 2), device="cuda")
