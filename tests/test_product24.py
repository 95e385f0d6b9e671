"""Products on sparse tensor cores: packing and the CUDA kernels themselves, emulated from NVIDIA's manual on a CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from shearling.kernels import product24 as kernels
from shearling.kernels.compact24 import pack24, pack24_int4, unpack24_int4
from shearling.kernels.nvrtc import compiled, obstacle
from shearling.kernels.product24 import (
    TOKENS,
    Config,
    configs,
    dense24,
    fragments_of,
    launch_of,
    product24,
    unpack_arguments,
    unpacked,
    up_fragments,
)
from tests.test_compact import random_24

HERE = Path(__file__).parent
SOURCE = Path(kernels.__file__).with_name("product24.cu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or obstacle(torch.device("cuda", 0)) is not None, reason="needs a Hopper GPU"
)

#: outputs, inputs, tokens, group (0: bfloat16), branch (None, given, or block), 8 bits, how
CASES = [
    (16, 64, 1, 0, None, False, Config(1, 1, 1, 1)),
    (40, 200, 3, 0, None, False, Config(2, 2, 1, 1)),
    (32, 512, 8, 0, None, False, Config(1, 2, 2, 2)),
    (16, 384, 11, 0, None, False, Config(1, 2, 2, 3)),
    (16, 640, 2, 0, "given", False, Config(1, 2, 2, 2)),
    (24, 1040, 2, 0, "block", False, Config(1, 2, 3, 2)),
    (16, 1024, 1, 0, "block", True, Config(1, 2, 2, 2)),
    (16, 128, 1, 128, None, False, Config(1, 1, 1, 1)),
    (40, 384, 9, 128, None, False, Config(2, 2, 1, 1)),
    (16, 576, 2, 64, None, False, Config(1, 2, 2, 2)),
    (16, 256, 1, 32, "given", True, Config(1, 2, 1, 1)),
    (16, 1152, 2, 128, "block", True, Config(1, 2, 2, 2)),
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
        block, rank = (16, inputs // 16) if branch == "block" else (0, 20)
        matrix = normal(outputs, rank).bfloat16()
        up = up_fragments(matrix.to(device), block=block, eight_bits=eight_bits)
        if eight_bits:
            # as they are stored
            matrix = (matrix / up.scales[:, None].cpu()).round().double() * up.scales[:, None].double().cpu()
        t = x.double().unflatten(1, (-1, 16)).sum(-1) if block else normal(tokens, rank).bfloat16().double()
        inner = None if block else t.bfloat16().to(device)
        y += t @ matrix.double().T
        # t is rounded to bfloat16
        size += 2.0**8 * t.abs() @ matrix.double().abs().T if block else t.abs() @ matrix.double().abs().T
    # the result is rounded to bfloat16, and float32 sums lose little beside
    off = y.abs() * 2.0**-8 + size * 2.0**-16
    return x.to(device), type(compact)(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in compact)), up, (
        inner
    ), bias.to(device), y.to(device), off.to(device)


@cache
def emulator(folder, macros):
    """The kernels compiled for this machine, with threads for threads."""
    library = folder / ("k" + "".join(f"_{v}" for _, v in macros) + ".so")
    given = [f"-D{name}={value}" for name, value in macros]
    subprocess.run(
        ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f'-DSOURCE="{SOURCE}"', *given]
        + [str(HERE / "emulated.cpp"), "-o", str(library)],
        check=True,
    )
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


def fragments(compact):
    return fragments_of(compact)


@pytest.mark.parametrize("sizes", [c[:4] for c in CASES], ids=str)
def test_fragments_hold_the_weight(sizes):
    _, compact, *_ = case(*sizes, None, False)
    exact = random_24(sizes[0], sizes[1] // 4, sizes[2]).bfloat16()
    if sizes[3]:
        exact = unpack24_int4(compact, torch.bfloat16)
    assert torch.equal(unpacked(fragments_of(compact)), exact)


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
