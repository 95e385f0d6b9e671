"""Products of few tokens with 2:4 weights on a CPU: the kernels against float64, and when they are not there."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.errors import ShearlingError
from shearling.export.compact import block_weights
from shearling.kernels import compiled_c, expand24
from shearling.kernels.compact24 import pack24, unpack24, unpack24_int4
from shearling.kernels.expand24 import inflated, inflated_reference, masked24, masked_product, obstacle
from shearling.runtime import (
    Branch,
    Key,
    Path,
    Route,
    Table,
    Timing,
    accelerate_,
    cached_table,
    copy_of,
    measure_table,
    paths,
    product,
    random_24,
    table_file,
)
from shearling.runtime.timing import CPU_COPIES, CPU_TURNED_OVER, cpu_rounds, interleaved
from tests.tiny import tiny_model, tiny_tokens

#: one rounding of a result, and what float32 sums leave
ERRORS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
GROUPS = (0, 32, 64, 128)
SOURCE = "int one(void) { return 1; }\n"


@pytest.fixture
def usable():
    if (why := obstacle()) is not None:
        pytest.skip(why)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing is compiled yet: an empty cache folder, and nothing remembered."""
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path))
    expand24._library.cache_clear()
    yield tmp_path
    expand24._library.cache_clear()


def compared(weight, group, x):
    """The product's distance from that of float64 numbers, of what its terms would be without signs."""
    compact = copy_of("compact", weight, group)
    exact = (unpack24_int4(compact) if group else weight).double()
    wanted = x.double() @ exact.T
    found = product(Path("expand"), x, copy_of("masked", weight, group))
    assert found.dtype == weight.dtype and found.shape == wanted.shape
    return float(((found.double() - wanted).abs() / (x.double().abs() @ exact.T.abs()).clamp(min=1e-30)).max())


@pytest.mark.usefixtures("usable")
@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("tokens", range(1, 17))
def test_products_of_all_numbers_of_tokens(dtype, group, tokens):
    # rows are taken by fours, inputs by 64
    for outputs, inputs in ((1, 128), (11, 384), (130, 1024)):
        x = torch.randn(tokens, inputs).to(dtype)
        assert compared(random_24(outputs, inputs, dtype, "cpu"), group, x) < ERRORS[dtype]


@pytest.mark.usefixtures("usable")
@given(
    outputs=st.integers(1, 40),
    fours=st.integers(1, 70),
    tokens=st.integers(1, 16),
    dtype=st.sampled_from(list(ERRORS)),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_products_of_any_shape(outputs, fours, tokens, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, fours, 4, generator=generator)
    # from no weight to two of every four
    ranks = torch.rand(outputs, fours, 4, generator=generator).argsort(-1)
    stays = ranks < torch.randint(0, 3, (outputs, fours, 1), generator=generator)
    weight = torch.where(stays, weight, 0.0).flatten(1).to(dtype)
    x = torch.randn(tokens, 4 * fours, generator=generator).to(dtype)
    assert compared(weight, 0, x) < ERRORS[dtype]
    copied = copy_of("masked", weight)
    assert torch.equal(inflated(copied), weight) and torch.equal(inflated_reference(copied), weight)


@pytest.mark.usefixtures("usable")
@given(
    outputs=st.integers(1, 20),
    groups=st.integers(1, 9),
    group=st.sampled_from([32, 64, 128]),
    tokens=st.integers(1, 16),
    dtype=st.sampled_from(list(ERRORS)),
)
@settings(max_examples=40, deadline=None)
def test_products_of_codes_of_any_shape(outputs, groups, group, tokens, dtype):
    weight = random_24(outputs, groups * group, dtype, "cpu")
    assert compared(weight, group, torch.randn(tokens, groups * group).to(dtype)) < ERRORS[dtype]
    copied = copy_of("masked", weight, group)
    exact = unpack24_int4(copy_of("compact", weight, group), dtype)
    assert torch.equal(inflated(copied), exact) and torch.equal(inflated_reference(copied), exact)


@pytest.mark.usefixtures("usable")
@pytest.mark.parametrize("dtype", ERRORS)
def test_weights_come_back_to_the_bit(dtype):
    weight = random_24(9, 132, dtype, "cpu")
    weight[0] = 0
    weight[1, :8] = torch.tensor([0, 0, 0, -1.0, -0.0, 0, 2, 0])
    weight[2, 128:] = torch.tensor([-0.0, 0, 0, 0])
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    found = inflated(masked24(pack24(weight)))
    assert torch.equal(found.view(bits), weight.view(bits))
    found = inflated_reference(masked24(pack24(weight)))
    assert torch.equal(found.view(bits), weight.view(bits))


@pytest.mark.usefixtures("usable")
def test_every_code_counts():
    codes = torch.tensor([[code, 0, 0, code] for code in range(-8, 8)], dtype=torch.int8).repeat(1, 8)
    weight = codes.float() * 0.5
    compact = copy_of("compact", weight, 32)
    copied = masked24(compact._replace(scales=torch.full_like(compact.scales, 0.25)))
    assert torch.equal(inflated(copied), unpack24_int4(compact._replace(scales=torch.full_like(compact.scales, 0.25))))
    torch.testing.assert_close(masked_product(torch.eye(32)[:16], copied), inflated(copied).T[:16])


@pytest.mark.usefixtures("usable")
def test_what_is_no_number_stays_none_and_what_is_beyond_is_infinite():
    weight = torch.zeros(2, 64, dtype=torch.bfloat16)
    weight[0, 0] = weight[1, 4] = 3e38
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, 0], x[0, 4] = float("nan"), 2
    assert masked_product(x, masked24(pack24(weight))).isnan().tolist() == [[True, True]]
    x[0, 0] = 0
    assert masked_product(x, masked24(pack24(weight))).tolist() == [[0.0, float("inf")]]


@pytest.mark.usefixtures("usable")
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for outputs in (1, 3, 5, 4097):
            x = torch.randn(2, 1028)
            assert compared(random_24(outputs, 1028, torch.float32, "cpu"), 0, x) < ERRORS[torch.float32]
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("usable")
def test_tokens_without_end_and_without_any():
    weight, x = random_24(12, 64, torch.float32, "cpu"), torch.randn(40, 64)
    copied = copy_of("masked", weight)
    for path in (Path("expand"), Path("inflate")):
        torch.testing.assert_close(product(path, x, copied), x @ weight.T)
        assert product(path, x[:0], copied).shape == (0, 12)


@pytest.mark.usefixtures("usable")
def test_branches_are_added():
    weight, x = random_24(12, 64, torch.float32, "cpu"), torch.randn(3, 64)
    branch = Branch(torch.randn(5, 64), torch.randn(12, 5))
    found = product(Path("expand"), x, copy_of("masked", weight), branch)
    torch.testing.assert_close(found, x @ (weight + branch.up @ branch.down).T, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("usable")
def test_ways_are_for_few_tokens_of_two_types():
    def names(dtype, tokens):
        return {path.name for path in paths(8, 64, tokens, torch.zeros(1, dtype=dtype))}

    for dtype in ERRORS:
        assert names(dtype, 16) == {"dense", "decompress", "inflate", "expand"}
        assert names(dtype, 17) == {"dense", "decompress", "inflate"}
    assert names(torch.float16, 1) == {"dense", "decompress"}


def test_a_copy_holds_what_it_says():
    weight = random_24(8, 1024, torch.bfloat16, "cpu")
    copied = copy_of("masked", weight)
    assert copied.shape == (8, 1024) and copied.bytes == weight.nbytes // 2 + weight.numel() // 8
    codes = copy_of("masked", weight, 128)
    assert codes.bytes == weight.numel() // 4 + weight.numel() // 8 + 4 * weight.numel() // 128
    assert torch.equal(inflated_reference(copied), weight)


@pytest.mark.usefixtures("usable")
@pytest.mark.parametrize("group", [0, 32])
@torch.no_grad()
def test_an_accelerated_model_computes_what_it_did(group):
    model, ids = tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16), tiny_tokens()
    for weight in block_weights(model).values():
        weight.copy_(random_24(*weight.shape, torch.float32, "cpu") * 3)
    rounded, table = copy.deepcopy(model), Table("cpu", torch.__version__)
    for weight in block_weights(rounded).values():
        weight.copy_(unpack24_int4(copy_of("compact", weight, group)) if group else weight)
        for tokens, ways in ((1, {"expand": 1.0, "inflate": 3.0}), (64, {"inflate": 2.0})):
            times = {Path(name): Timing(s, s, s) for name, s in {"dense": 2.0, **ways}.items()}
            table.times[Key(*weight.shape, "float32", group, tokens)] = times
    done = accelerate_(model, table, int4=group or None, tokens=(1, 64))
    # the one copy that is held serves both
    assert set(done.routes.values()) == {(Route(1, Path("expand")), Route(64, Path("inflate")))}
    assert done.bytes == sum(copy_of("masked", w, group).bytes for w in block_weights(rounded).values())
    for some in (ids, ids[:1, :1]):
        torch.testing.assert_close(model(some).logits, rounded(some).logits, rtol=1e-3, atol=1e-3)


def test_without_a_compiler_nothing_is_offered(fresh, monkeypatch):
    if set(expand24._NEEDS) - compiled_c.cpu_flags():
        pytest.skip("the processor stands in the way first")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert obstacle() == "expand24: no C compiler; install gcc or clang, or name one in CC"
    assert {path.name for path in paths(8, 64, 1, torch.zeros(1))} == {"dense", "decompress"}
    table = measure_table([(8, 64)], device="cpu", dtype=torch.float32, tokens=(1,), replays=1)
    assert table.best(Key(8, 64, "float32", 0, 1)).name in ("dense", "decompress")
    with pytest.raises(ShearlingError, match="no C compiler"):
        masked_product(torch.zeros(1, 64), masked24(pack24(torch.zeros(8, 64))))


def test_tables_are_those_of_what_can_be_compiled(fresh, monkeypatch):
    if (why := obstacle()) is not None:
        pytest.skip(why)
    there = table_file("cpu")
    measure_table([(8, 64)], device="cpu", dtype=torch.float32, tokens=(1,), replays=1)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    expand24._library.cache_clear()
    assert there.exists() and table_file("cpu") != there and not cached_table("cpu").times


def test_what_the_processor_and_the_machine_lack(monkeypatch):
    with pytest.raises(ShearlingError, match="^one: the processor lacks avx4096$"):
        compiled_c.library(SOURCE, "one", ["avx4096"])
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    with pytest.raises(ShearlingError, match="^one: is for x86-64, this is arm64$"):
        compiled_c.library(SOURCE, "one", [])


def compilable():
    try:
        compiled_c.library(SOURCE, "one", [])
    except ShearlingError as error:
        pytest.skip(str(error))


def test_a_source_that_is_refused_is_one_line(fresh):
    compilable()
    with pytest.raises(ShearlingError, match=r"^wrong: \w+: wrong\.c:1:\d+: error: .*$"):
        compiled_c.library("int one(void) { return nothing; }\n", "wrong", [])
    assert not list((fresh / "compiled").glob("*wrong*"))


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "text"])
def test_a_damaged_library_is_compiled_anew(fresh, damage):
    compilable()
    (file,) = (fresh / "compiled").iterdir()
    whole = file.read_bytes()
    # another file: the one that is loaded must not change
    file.unlink()
    middle = len(whole) // 2
    file.write_bytes(
        {
            "truncated": whole[:middle],
            "changed": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "empty": b"",
            "text": b"no library",
        }[damage]
    )
    assert compiled_c.library(SOURCE, "one", []).one() == 1
    assert compiled_c._whole(file)


def test_a_library_that_is_whole_is_not_compiled_again(fresh, monkeypatch):
    compilable()
    monkeypatch.setattr(compiled_c, "_compile", None)
    assert compiled_c.library(SOURCE, "one", []).one() == 1


def test_copies_are_more_than_a_cache_holds_within_limits():
    assert (cpu_rounds(2**10), cpu_rounds(2**40)) == (CPU_COPIES[1], CPU_COPIES[0])
    assert 0 <= cpu_rounds(2**26) * 2**26 - CPU_TURNED_OVER < 2**26


def test_ways_take_turns_over_all_copies():
    done = []
    ways = {way: [lambda way=way, n=n: done.append((way, n)) for n in range(3)] for way in "ab"}
    times = interleaved(ways, 3)
    # one each to begin with
    assert done[2:8] == [("a", 0), ("b", 1), ("a", 1), ("b", 2), ("a", 2), ("b", 0)]
    assert {way: len(seconds) for way, seconds in times.items()} == {"a": 3, "b": 3}


def test_the_reference_is_that_of_the_compact_copy():
    weight = random_24(6, 192, torch.bfloat16, "cpu")
    compact = pack24(weight)
    assert torch.equal(inflated_reference(masked24(compact)), unpack24(compact))
