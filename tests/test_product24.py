"""Products on sparse tensor cores: packing and the CUDA kernels themselves, emulated from NVIDIA's manual on a CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from shearling.errors import ShearlingError
from shearling.kernels import product24 as kernels
from shearling.kernels.compact24 import pack24, pack24_int4, unpack24_int4
from shearling.kernels.nvrtc import compiled, obstacle
from shearling.kernels.product24 import (
    TOKENS,
    Config,
    compile_all,
    configs,
    dense24,
    fragments_of,
    in_8_bits,
    launch_of,
    product24,
    unpack_arguments,
    unpacked,
    up_fragments,
)
from shearling.runtime import branch_of
from tests.test_compact import random_24

EMULATED = Path(__file__).with_name("emulated.cpp")
SOURCE = Path(kernels.__file__).with_name("product24.cu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or obstacle(torch.device("cuda", 0)) is not None, reason="needs a Hopper GPU"
)

#: outputs, inputs, tokens, group (0: bfloat16), branch (None, given, or inputs that are summed up), 8 bits, how
CASES = [
    (16, 64, 1, 0, None, False, Config(1, 1, 1, 1, 1)),
    (40, 200, 3, 0, None, False, Config(2, 2, 1, 1, 1)),
    (32, 512, 8, 0, None, False, Config(1, 2, 1, 2, 2)),
    (16, 384, 11, 0, None, False, Config(1, 2, 1, 2, 3)),
    (16, 640, 2, 0, "given", False, Config(1, 2, 1, 2, 2)),
    (24, 1040, 2, 0, 16, False, Config(1, 2, 1, 3, 2)),
    (16, 1024, 1, 0, 16, True, Config(1, 2, 1, 2, 2)),
    (16, 128, 1, 128, None, False, Config(1, 1, 1, 1, 1)),
    (40, 384, 9, 128, None, False, Config(2, 2, 1, 1, 1)),
    (16, 576, 2, 64, None, False, Config(1, 2, 1, 2, 2)),
    (16, 256, 1, 32, "given", True, Config(1, 2, 1, 1, 1)),
    (16, 1152, 2, 128, 16, True, Config(1, 2, 1, 2, 2)),
    (40, 320, 3, 0, None, False, Config(1, 2, 2, 2, 1)),
    (72, 640, 11, 0, 16, False, Config(1, 4, 2, 1, 3)),
    (64, 512, 9, 0, "given", True, Config(2, 2, 2, 2, 2)),
    (96, 1408, 1, 0, 16, True, Config(1, 2, 2, 2, 4)),
    (32, 1152, 2, 0, 64, False, Config(1, 2, 1, 2, 2)),
    (40, 768, 3, 128, 8, True, Config(2, 2, 1, 2, 2)),
    (32, 1024, 9, 128, 32, False, Config(1, 4, 2, 3, 4)),
    (48, 512, 9, 128, "given", True, Config(1, 2, 1, 2, 2)),
    # more of S than a warp begins with
    (16, 2048, 1, 0, 16, False, Config(1, 1, 1, 2, 1)),
    (16, 2048, 2, 128, 16, False, Config(1, 2, 1, 1, 1)),
    (16, 2048, 1, 128, 8, True, Config(1, 1, 1, 1, 1)),
    (72, 640, 10, 128, 16, False, Config(2, 4, 2, 1, 2)),
    (48, 768, 17, 64, "given", False, Config(1, 2, 2, 1, 2)),
]
LARGE = [(4096, 4096), (1024, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (4096, 14336), (576, 1536)]


def case(outputs, inputs, tokens, group, branch, eight_bits, device="cpu"):
    """x, the weight, a branch, a bias, and the product in float64 with what it may be off by."""
    generator = torch.Generator().manual_seed(inputs + tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    dense = random_24(outputs, inputs // 4, tokens).bfloat16()
    compact = pack24(dense)
    exact = dense.double()
    if group:
        codes = dense.float().div(8).round().clamp(-8, 7).to(torch.int8)
        compact = pack24_int4(codes, (normal(outputs, inputs // group) / 10).bfloat16())
        exact = unpack24_int4(compact).double()
    x, bias = normal(tokens, inputs).bfloat16(), normal(outputs).bfloat16()
    y = x.double() @ exact.T + bias.double()
    size = x.double().abs() @ exact.abs().T + bias.double().abs()
    up = inner = None
    if branch:
        block, rank = (branch, inputs // branch) if branch != "given" else (0, 24)
        matrix = normal(outputs, rank).bfloat16()
        up = up_fragments(matrix.to(device), block=block, eight_bits=eight_bits)
        if eight_bits:
            # as they are stored
            codes, scales = in_8_bits(matrix)
            matrix = (codes * scales[:, None]).bfloat16()
        t = x.double().unflatten(1, (-1, block)).sum(-1) if block else normal(tokens, rank).bfloat16().double()
        inner = None if block else t.bfloat16().to(device)
        y += t @ matrix.double().T
        # t is rounded to bfloat16
        size += 2.0**8 * t.abs() @ matrix.double().abs().T if block else t.abs() @ matrix.double().abs().T
    # the result is rounded to bfloat16, and float32 sums lose little beside
    off = y.abs() * 2.0**-8 + size * 2.0**-16
    return (
        x.to(device),
        type(compact)(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in compact)),
        up,
        (inner),
        bias.to(device),
        y.to(device),
        off.to(device),
    )


@cache
def emulator(folder, macros):
    """The kernels compiled for this machine, with threads for threads."""
    library = folder / ("k" + "".join(f"_{v}" for _, v in macros) + ".so")
    given = [f"-D{name}={value}" for name, value in macros]
    subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", "-pthread", f'-DSOURCE="{SOURCE}"', *given, EMULATED, "-o", library],
        check=True,
    )
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.mark.parametrize("sizes", [c[:4] for c in CASES], ids=str)
def test_fragments_hold_the_weight(sizes):
    _, compact, *_ = case(*sizes, None, False)
    exact = random_24(sizes[0], sizes[1] // 4, sizes[2]).bfloat16()
    if sizes[3]:
        exact = unpack24_int4(compact, torch.bfloat16)
    assert torch.equal(unpacked(fragments_of(compact)), exact)


def test_8_bits_are_the_nearest_with_the_scale_that_is_kept():
    up = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 64)[:, None]
    codes, scales = in_8_bits(up)
    assert codes.abs().max() <= 127 and torch.equal(codes, codes.round())
    largest = up.abs().amax(1) / 127
    # a bfloat16 has 8 bits
    assert scales.dtype == torch.bfloat16 and ((scales.float() - largest).abs() <= largest * 2**-8).all()
    assert ((codes * scales[:, None].float() - up).abs() <= 0.5001 * scales[:, None].float()).all()


@needs_compiler
@pytest.mark.parametrize("given", CASES, ids=str)
def test_kernel_by_the_manual(given, folder):
    *sizes, config = given
    x, compact, up, inner, bias, y, off = case(*sizes)
    weight = fragments_of(compact)
    found = torch.full(y.shape, torch.nan, dtype=torch.bfloat16)
    launch = launch_of(x, weight, config, up, inner, bias, found)
    library = emulator(folder, tuple(sorted(launch.macros.items())))
    by_value = [ctypes.byref(launch.arguments[0]), ctypes.byref(launch.arguments[1]), *launch.arguments[2:]]
    library.product(*launch.grid, launch.shared, *by_value)
    assert ((found.double() - y).abs() <= off).all()
    if up is None:
        dense = torch.full(weight.shape, torch.nan, dtype=torch.bfloat16)
        first, *rest = unpack_arguments(weight, dense)
        tiles, steps = weight.values.shape[:2]
        library.unpack(-(-tiles // config.row_tiles), -(-steps // config.warps), ctypes.byref(first), *rest)
        assert torch.equal(dense, unpacked(weight))


@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 16, TOKENS])
@pytest.mark.parametrize("shape", [*LARGE, (64, 128)])
def test_every_shape_has_ways_whose_blocks_share_all_inputs(shape, tokens, int4):
    outputs, inputs = shape
    step = 128 if int4 else 64
    for config in configs(outputs, inputs, tokens, int4):
        assert config.ranks in (1, 2, 4, 8) and config.warps <= 32 and config.warps % config.spread == 0
        assert config.ranks <= -(-inputs // step)


def test_source_compiles_for_hopper():
    try:
        compiled("", {})
    except ShearlingError as error:
        pytest.skip(str(error))
    for given in CASES:
        *sizes, config = given
        x, compact, up, inner, bias, y, _ = case(*sizes)
        macros = launch_of(x, fragments_of(compact), config, up, inner, bias, y).macros
        assert compiled(kernels.source(), macros).startswith(b"\x7fELF")


def test_source_that_does_not_compile():
    try:
        compiled("", {})
    except ShearlingError as error:
        pytest.skip(str(error))
    with pytest.raises(RuntimeError, match="identifier .*nothing"):
        compiled("void f() { nothing(); }", {})


def test_what_stands_in_the_way_of_a_cpu():
    assert obstacle(torch.device("cpu")) == "cpu: is no NVIDIA GPU"


@pytest.mark.parametrize(("rank", "block"), [(4, 16), (8, 8), (5, 0), (64, 0)])
def test_branches_that_sum_up_blocks_are_seen(rank, block):
    up = torch.randn(6, rank)
    down = torch.eye(rank).repeat_interleave(block, 1) if block else torch.randn(rank, 64)
    branch = branch_of(down, up, ["compact", "fragments"])
    assert branch.fragments is not None and branch.fragments.block == block
    # one that is given is read 16 bytes at a time
    assert block or branch.fragments.rank % 8 == 0
    torch.testing.assert_close(branch.up @ branch.down, up @ down)
    assert branch_of(down, up, ["compact"]) == (down, up, None)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("given", CASES, ids=str)
def test_small_products_on_a_gpu(given):
    *sizes, config = given
    # clusters are of 1, 2, 4 or 8
    check_on_gpu([config._replace(ranks=min(config.ranks, 2), early=early) for early in (False, True)], *sizes)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("branch", [None, 16, "given"])
@pytest.mark.parametrize("tokens", [1, 8, 16, 32])
@pytest.mark.parametrize("shape", LARGE)
def test_every_way_on_a_gpu(shape, tokens, branch, group):
    if group and shape[1] % group:
        pytest.skip("does not fill the inputs")
    # some of them: what they have in common is the same
    some = configs(*shape, tokens, group > 0)[:: 8 if branch else 3]
    check_on_gpu(some, *shape, tokens, group, branch, tokens == 8)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("branch", [None, 16, "given"])
def test_products_compile_whole_on_a_gpu(branch):
    x, compact, up, inner, bias, *_ = case(512, 1024, 3, 0, branch, False, "cuda")
    weight = fragments_of(compact)

    def work(x):
        return product24(2 * x, weight, Config(1, 4, 2, 2, 2), up, inner, bias).relu(), dense24(weight) + 1

    found = torch.compile(work, fullgraph=True)(x)
    assert all(torch.equal(one, other) for one, other in zip(found, work(x), strict=True))


def check_on_gpu(some, *sizes):
    x, compact, up, inner, bias, y, off = case(*sizes, "cuda")
    weight = fragments_of(compact)
    compile_all(weight, [(config, len(x), up) for config in some])
    assert torch.equal(dense24(weight), unpacked(weight))
    for config in some:
        for _ in range(3):
            found = product24(x, weight, config, up, inner, bias)
            assert ((found.double() - y).abs() <= off).all(), config
            # one after another, without waiting: the next starts before this has ended
            again = [product24(x, weight, config, up, inner, bias) for _ in range(5)]
            assert all(torch.equal(other, found) for other in again), config
