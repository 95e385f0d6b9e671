"""The 2:4 runtime on a CPU: every way gives the dense product, and a model computes what it did."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shearling.errors import ShearlingError
from shearling.export import load_codes, save_model
from shearling.export.compact import block_weights
from shearling.kernels import nvrtc
from shearling.kernels.compact24 import pack24, unpack24_int4
from shearling.kernels.expand24 import obstacle
from shearling.kernels.product24 import Config, dense24, fragments_of, product24, unpacked, up_fragments
from shearling.methods.quantise import plan_quantised
from shearling.models import load_model
from shearling.plan import Adapters, Quant
from shearling.recipe import Quantise
from shearling.runtime import (
    COPIES,
    Beside,
    Key,
    Path,
    Route,
    RoutedLinear,
    Table,
    Timing,
    accelerate_,
    beside_of,
    cached_table,
    copy_of,
    measure_table,
    paths,
    product,
    random_24,
    random_branch,
    table_file,
)
from shearling.runtime.paths import _algorithms
from shearling.surgery import attach_adapters_, cut_
from tests.tiny import FAMILIES, tiny_model, tiny_tokens


def sparse_model(family="llama", **overrides):
    model = tiny_model(family, **overrides)
    with torch.no_grad():
        for weight in block_weights(model).values():
            weight.copy_(random_24(*weight.shape, torch.float32, "cpu") * 3)
    return model


def table_of(model, seconds, group=0, tokens=(1, 8), beside=None):
    """A table that says of every shape of a model, and a branch beside it, how long ways take, by their names."""
    table = Table("cpu", torch.__version__)
    for weight in block_weights(model).values():
        for count in tokens:
            key = Key(*weight.shape, "float32", group, count, beside)
            table.times[key] = {Path(name): Timing(s, s, s) for name, s in seconds[count].items()}
    return table


DENSE_FIRST = {1: {"dense": 1.0, "decompress": 2.0}, 8: {"dense": 1.0, "decompress": 2.0}}
COMPACT_FIRST = {1: {"dense": 4.0, "decompress": 1.0}, 8: {"dense": 1.0, "decompress": 2.0}}


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("name", ["dense", "decompress"])
def test_ways_give_the_dense_product(name, group):
    weight = random_24(12, 256, torch.float32, "cpu")
    x = torch.randn(5, 256)
    exact = unpack24_int4(copy_of("compact", weight, group)) if group else weight
    found = product(Path(name), x, copy_of(COPIES[name], weight, group))
    torch.testing.assert_close(found, x @ exact.T)


@pytest.mark.parametrize("kind", ["dense", "compact", "cusparselt"])
def test_no_copy_of_what_is_not_24(kind):
    with pytest.raises(ShearlingError, match="is not 2:4"):
        copy_of(kind, torch.ones(16, 16))


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("missing", ["nothing", "nvrtc", "hopper", "nvrtc, cusparselt"])
def test_what_a_gpu_without_our_kernels_falls_back_to(missing, group, monkeypatch):
    def compiler():
        if "nvrtc" in missing:
            raise ShearlingError("no NVRTC")

    monkeypatch.setattr(nvrtc, "_compiler", compiler)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0) if missing == "hopper" else (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "GPU")
    algorithms = () if "cusparselt" in missing else ((0, 1, -1), (3, 2, 1))
    monkeypatch.setitem(paths.__globals__, "_algorithms", lambda *of: algorithms)
    like = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda", 0), is_cuda=True)
    found = paths(64, 256, 1, like, group)
    # cuSPARSELt has no values of 4 bits
    others = [] if group else [Path("cusparselt", option) for option in algorithms]
    rest = [path for path in found if path.name not in ("mma", "unpack")]
    assert rest == [Path("dense"), Path("decompress"), *others]
    assert ({path.name for path in found} >= {"mma", "unpack"}) == (missing == "nothing")
    # a table that was measured with them is not taken without them
    assert ("mma" in table_file(like.device).name) == (missing == "nothing")
    key = Key(64, 256, "bfloat16", group, 1)
    table = Table("GPU", "0", {key: {path: Timing(float(n), 0.0, 0.0) for n, path in enumerate(reversed(rest))}})
    assert table.best(key) == rest[-1] and table.best(key, ["compact"]) == Path("decompress")


def test_cusparselt_is_searched_by_the_function_that_there_is(monkeypatch):
    like = torch.zeros(1, dtype=torch.bfloat16)
    # not in a build for CPUs
    assert _algorithms(16, 32, 3, like) == ()

    def searched(packed, x_IM, bias, alpha, dtype, transposed):
        assert packed.shape == (16, 32) and x_IM.shape == (32, 8) and (bias, alpha, dtype) == (None, None, None)
        assert transposed
        return 5

    monkeypatch.setattr("torch._cslt_compress", lambda weight: weight)
    monkeypatch.setattr("torch._cslt_sparse_mm_search", searched)
    monkeypatch.setattr("torch._C._cusparselt", SimpleNamespace(), raising=False)
    assert _algorithms(16, 32, 3, like) == ((0, 1, -1), (5, 1, -1))
    newer = SimpleNamespace(mm_search=lambda *given: (searched(*given) + 1, 2, 0, 9))
    monkeypatch.setattr("torch._C._cusparselt", newer, raising=False)
    assert _algorithms(16, 32, 3, like) == ((0, 1, -1), (6, 2, 0))


@pytest.mark.parametrize("seconds", [DENSE_FIRST, COMPACT_FIRST])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_accelerated_model_computes_what_it_did(family, seconds):
    model, ids = sparse_model(family), tiny_tokens()
    before, table = model(ids).logits, table_of(model, seconds)
    weights = block_weights(model)
    done = accelerate_(model, table, tokens=(1, 8))
    assert done.routes.keys() == weights.keys() and not done.left
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(ids[:1, :1]).logits, before[:1, :1], rtol=1e-4, atol=1e-4)
    dense = sum(weight.nbytes for weight in weights.values())
    compact = sum(pack24(weight).bytes for weight in weights.values())
    assert (done.dense_bytes, done.bytes) == (dense, dense if seconds is DENSE_FIRST else compact)


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("name", ["dense", "decompress", "expand", "inflate"])
@torch.no_grad()
def test_a_linear_compiles_whole(name, group):
    if COPIES[name] == "masked" and obstacle() is not None:
        pytest.skip(str(obstacle()))
    weight, bias = random_24(12, 256, torch.float32, "cpu"), torch.randn(12)
    linear = RoutedLinear({COPIES[name]: copy_of(COPIES[name], weight, group)}, [Route(8, Path(name))], bias)
    x = torch.randn(2, 3, 256)
    found = torch.compile(linear, fullgraph=True, backend="aot_eager")(x)
    exact = unpack24_int4(copy_of("compact", weight, group)) if group else weight
    torch.testing.assert_close(found, x @ exact.T + bias)


def test_what_compiling_knows_of_products_on_a_gpu(monkeypatch):
    fragments = fragments_of(pack24(random_24(40, 256, torch.float32, "cpu").bfloat16()))
    up = up_fragments(torch.randn(40, 16), block=16)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        x = fake.from_tensor(torch.randn(3, 256).bfloat16())
        for branch in (None, up):
            found = product24(x, fragments, Config(1, 2, 1, 2, 1), branch)
            assert found.shape == (3, 40) and found.dtype == torch.bfloat16
        assert dense24(fragments).shape == (40, 256) and dense24(fragments).dtype == torch.bfloat16


def test_one_copy_or_the_fastest_ways():
    one, both = sparse_model(), sparse_model()
    table = table_of(one, COMPACT_FIRST)
    (routes,) = set(accelerate_(one, table, tokens=(1, 8)).routes.values())
    # 4 times as slow at one number of tokens weighs more than twice at the other
    assert routes == (Route(8, Path("decompress")),)
    done = accelerate_(both, table, tokens=(1, 8), copies="fastest")
    assert set(done.routes.values()) == {(Route(1, Path("decompress")), Route(8, Path("dense")))}
    weights = block_weights(sparse_model()).values()
    assert done.bytes == sum(weight.nbytes + pack24(weight).bytes for weight in weights)
    linear = next(m for m in both.modules() if isinstance(m, RoutedLinear))
    assert [linear.path(count).name for count in (1, 2, 8, 9)] == ["decompress", "dense", "dense", "dense"]


@torch.no_grad()
def test_branches_go_along():
    model, ids = sparse_model(), tiny_tokens()
    name = next(iter(block_weights(model)))
    outputs, inputs = model.get_submodule(name).weight.shape
    adapters = Adapters({name: torch.randn(3, inputs)}, {name: torch.randn(outputs, 3)}, {name: 0.1})
    attach_adapters_(model, adapters)
    before = model(ids).logits
    plain = sparse_model()(ids).logits
    table = table_of(sparse_model(), COMPACT_FIRST)
    table.times |= table_of(sparse_model(), DENSE_FIRST, beside=Beside(3, 0)).times
    routes = accelerate_(model, table, tokens=(1, 8)).routes
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, before, rtol=1e-2, atol=1e-2)
    # the one with a branch takes what was the fastest with that
    assert {of for of, (route,) in routes.items() if route.path.name == "dense"} == {name}


@pytest.mark.parametrize("eight_bits", [False, True])
@torch.no_grad()
def test_ways_are_those_of_the_branch(eight_bits):
    model, ids = sparse_model(hidden_size=64, intermediate_size=128, head_dim=16), tiny_tokens()
    bare, bits, weights = copy.deepcopy(model), 8 if eight_bits else 16, block_weights(model)
    down, up = {}, {}
    # sums of 16 inputs, as SLoRB has them, at every other
    for name, weight in list(weights.items())[::2]:
        branch = random_branch(*weight.shape, Beside(weight.shape[1] // 16, 16), weight, [])
        # 8 bits hold these as they are
        down[name], up[name] = branch.down, branch.up.sign() * 127 / 64
    attach_adapters_(model, Adapters(down, up, dict.fromkeys(up, 0.5)))
    before, table = model(ids).logits, table_of(bare, COMPACT_FIRST)
    for inputs in (64, 128):
        table.times |= table_of(bare, DENSE_FIRST, beside=Beside(inputs // 16, 16, bits)).times
        # what other branches say does not count
        table.times |= table_of(bare, COMPACT_FIRST, beside=Beside(inputs // 16, 16, 24 - bits)).times
    done = accelerate_(model, table, tokens=(1, 8), int8_branches=eight_bits)
    assert {name: route.path.name for name, (route,) in done.routes.items()} == {
        name: "dense" if name in up else "decompress" for name in weights
    }
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_a_model_lacks_is_measured_with_its_branches(tmp_path, monkeypatch):
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path))
    model, ids = sparse_model(), tiny_tokens()
    weights = block_weights(model)
    name, weight = next(iter(weights.items()))
    branch = random_branch(*weight.shape, Beside(2, 16), weight, [])
    attach_adapters_(model, Adapters({name: branch.down}, {name: branch.up}, {name: 1.0}))
    before = model(ids).logits
    done = accelerate_(model, tokens=(1, 8))
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    others = [w.shape for of, w in weights.items() if of != name]
    bare = {Key(*shape, "float32", 0, n) for shape in others for n in (1, 8)}
    beside = {Key(*weight.shape, "float32", 0, n, Beside(2, 16)) for n in (1, 8)}
    assert cached_table("cpu").times.keys() == bare | beside and done.routes.keys() == weights.keys()


@torch.no_grad()
def test_four_bits_are_those_of_the_grid():
    model = sparse_model(hidden_size=128, intermediate_size=256, head_dim=32)
    rounded, ids = copy.deepcopy(model), tiny_tokens()
    for weight in block_weights(rounded).values():
        weight.copy_(unpack24_int4(copy_of("compact", weight, 64)))
    accelerate_(model, table_of(model, COMPACT_FIRST, group=64), int4=64, tokens=(1, 8))
    torch.testing.assert_close(model(ids).logits, rounded(ids).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_codes_of_a_saved_model_are_taken_as_they_are(tmp_path):
    pytest.importorskip("compressed_tensors")
    model, ids = sparse_model(hidden_size=64, intermediate_size=128, head_dim=16), tiny_tokens()
    settings = Quantise(method="gptq", format="int4", group=32)
    (quant,) = plan_quantised(model, tiny_tokens(4, 24), settings)
    cut_(model, [quant])
    save_model(model, None, tmp_path / "m", provenance={}, quant=quant)
    read = load_model(str(tmp_path / "m"))
    before = read(ids).logits
    accelerate_(read, table_of(read, COMPACT_FIRST, group=32), int4=load_codes(tmp_path / "m"), tokens=(1, 8))
    torch.testing.assert_close(read(ids).logits, before, rtol=1e-4, atol=1e-4)
    # rounding the values anew finds other scales, where a group's largest code is not the grid's last
    anew = load_model(str(tmp_path / "m"))
    accelerate_(anew, table_of(anew, COMPACT_FIRST, group=32), int4=32, tokens=(1, 8))
    assert not torch.allclose(anew(ids).logits, before, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_branches_in_8_bits_are_near():
    model, ids = sparse_model(), tiny_tokens()
    ranks = {name: weight.shape for name, weight in block_weights(model).items()}
    down = {name: torch.randn(8, inputs) / 8 for name, (_, inputs) in ranks.items()}
    adapters = Adapters(
        down, {name: torch.randn(out, 8) for name, (out, _) in ranks.items()}, dict.fromkeys(ranks, 1.0)
    )
    attach_adapters_(model, adapters)
    before = model(ids).logits
    table = table_of(sparse_model(), COMPACT_FIRST, beside=Beside(8, 0, 8))
    accelerate_(model, table, tokens=(1, 8), int8_branches=True)
    error = float((model(ids).logits - before).norm() / before.norm())
    assert 1e-4 < error < 0.05


def test_what_cannot_be_accelerated_is_refused():
    dense = tiny_model("llama")
    with pytest.raises(ShearlingError, match="none of the model's block linears is 2:4"):
        accelerate_(dense, Table("cpu", "0"))
    model = sparse_model()
    with pytest.raises(ShearlingError, match="32 inputs in groups of 128.*32, 64, 128"):
        accelerate_(model, Table("cpu", "0"), int4=128)
    with pytest.raises(ShearlingError, match="48 inputs in groups of 32"):
        accelerate_(model, Table("cpu", "0"), int4=32)
    with pytest.raises(ShearlingError, match="is not in the table"):
        accelerate_(model, Table("cpu", "0"))
    codes = Quant({"a.weight": torch.zeros(4, 32, dtype=torch.int8)}, {}, {}, bits=8)
    with pytest.raises(ShearlingError, match="codes must be int4 in groups"):
        accelerate_(model, Table("cpu", "0"), int4=codes)
    assert not any(isinstance(m, RoutedLinear) for m in model.modules())


def test_linears_that_are_not_24_are_left():
    model = sparse_model()
    name = next(iter(block_weights(model)))
    with torch.no_grad():
        model.get_submodule(name).weight.fill_(1)
    done = accelerate_(model, table_of(model, DENSE_FIRST), tokens=(1, 8))
    assert done.left == (name,) and name not in done.routes


def test_an_accelerated_model_is_not_saved(tmp_path):
    model = sparse_model()
    accelerate_(model, table_of(model, DENSE_FIRST), tokens=(1, 8))
    with pytest.raises(ShearlingError, match="save the model before"):
        save_model(model, None, tmp_path / "m", provenance={})
    assert not (tmp_path / "m").exists()


def test_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path))
    table = measure_table([(8, 16)], device="cpu", dtype=torch.float32, tokens=(1, 4), replays=2)
    key = Key(8, 16, "float32", 0, 4)
    masked = {"inflate", "expand"} if obstacle() is None else set()
    assert {path.name for path in table.times[key]} == {"dense", "decompress"} | masked
    assert all(timing.low <= timing.seconds <= timing.high for timing in table.times[key].values())
    assert cached_table("cpu") == table
    # a measured shape stays as it is, another is added
    more = measure_table([(8, 16), (4, 16)], device="cpu", dtype=torch.float32, tokens=(1, 4), replays=2)
    assert more.times[key] == table.times[key] and len(more.times) == 4
    table_file("cpu").write_text("[]")
    with pytest.raises(ShearlingError, match="is no table"):
        Table.load(table_file("cpu"))
    assert not cached_table("cpu").times


def test_what_was_measured_before_an_interruption_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path))
    measured = []

    def interrupted(key, *others):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(key)
        return {Path("dense"): Timing(1.0, 1.0, 1.0)}

    monkeypatch.setattr("shearling.runtime.table._measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accelerate_(sparse_model(), tokens=(1, 8))
    assert cached_table("cpu").times == {key: {Path("dense"): Timing(1.0, 1.0, 1.0)} for key in measured}


def test_a_table_comes_back_as_it_was_written(tmp_path):
    table, file = Table("cpu", "0"), tmp_path / "table.json"
    for beside in (None, Beside(3, 0), Beside(1, 8, 8)):
        key = Key(4, 8, "float32", 0, 1, beside)
        table.times[key] = {Path("dense"): Timing(1.0, 0.5, 2.0), Path("mma", (1, 2)): Timing(3.0, 2.5, 4.0)}
    table.save(file)
    assert Table.load(file) == table
    assert {type(key.beside) for key in Table.load(file).times} == {type(None), Beside}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 4}))
    with pytest.raises(ShearlingError, match="is a table of another version; remove it"):
        Table.load(file)


def test_a_branch_is_measured_for_itself():
    table, of = Table("cpu", "0"), Key(4, 16, "float32", 0, 1)
    for beside, name in (
        (None, "dense"),
        (Beside(2, 8), "decompress"),
        (Beside(2, 8, 8), "mma"),
        (Beside(2, 0), "dense"),
    ):
        table.times[of._replace(beside=beside)] = {Path(name): Timing(1.0, 1.0, 1.0)}
    assert [table.best(key).name for key in table.times] == ["dense", "decompress", "mma", "dense"]
    with pytest.raises(ShearlingError, match=r"beside=Beside\(rank=4, block=0, bits=16\)\) is not in the table"):
        table.best(of._replace(beside=Beside(4, 0)))


@pytest.mark.parametrize("beside", [Beside(4, 16), Beside(8, 8, 8), Beside(5, 0), Beside(64, 0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_random_branch_is_of_its_kind(beside, dtype):
    branch = random_branch(6, 64, beside, torch.zeros(1, dtype=dtype), ["dense"])
    assert beside_of(branch.down, beside.bits == 8) == beside
    assert branch.up.shape == (6, beside.rank) and branch.down.dtype == branch.up.dtype == dtype
    up = random_branch(6, 64, beside, torch.zeros(1, dtype=dtype), ["fragments"]).fragments
    assert up is not None and (up.block, up.scales is not None) == (beside.block, beside.bits == 8)
    # eight at a time are read of one that is given
    assert up.rank == (beside.rank if beside.block else -(-beside.rank // 8) * 8)


@pytest.mark.parametrize("beside", [Beside(4, 8), Beside(16, 4)])
def test_sums_that_no_branch_has_are_refused(beside):
    with pytest.raises(ShearlingError, match=f"branch: {beside.rank} sums of {beside.block} out of 64 inputs"):
        measure_table([(8, 64)], device="cpu", tokens=(1,), beside=beside, table=Table("cpu", "0"))


@pytest.mark.parametrize("beside", [Beside(4, 16), Beside(4, 16, 8), Beside(3, 0)])
def test_a_gpu_compiles_and_times_ways_with_their_branch(beside, monkeypatch):
    compiled, timed = [], []

    def multiplied(x, weight, config, up, given):
        timed.append((up, given))
        return x @ unpacked(weight).T

    monkeypatch.setitem(paths.__globals__, "obstacle", lambda device: None)
    monkeypatch.setitem(paths.__globals__, "product24", multiplied)
    monkeypatch.setitem(paths.__globals__, "dense24", unpacked)
    monkeypatch.setitem(measure_table.__globals__, "compile_all", lambda weight, kinds: compiled.extend(kinds))
    table = measure_table([(32, 64)], device="cpu", tokens=(2,), beside=beside, table=Table("cpu", "0"), replays=8)
    (times,) = table.times.values()
    assert {(config, 2) for config, *_ in compiled} == {
        (Config(*path.option), 2) for path in times if path.name == "mma"
    }
    ups = [up for *_, up in compiled] + [up for up, _ in timed]
    kinds = {(up.rank, up.block, up.scales is None) for up in ups}
    assert kinds == {(beside.rank if beside.block else 8, beside.block, beside.bits == 16)}
    assert all((given is None) == bool(beside.block) for _, given in timed)
    # each copy of the weight has its own
    assert len({up.values.data_ptr() for up, _ in timed}) == len(timed)


def test_between_measured_numbers_the_larger_counts():
    table = Table("cpu", "0")
    for tokens, name in ((1, "dense"), (8, "decompress"), (64, "dense")):
        table.times[Key(4, 8, "float32", 0, tokens)] = {Path(name): Timing(1.0, 1.0, 1.0)}
    assert [table.best(Key(4, 8, "float32", 0, n)).name for n in (1, 2, 8, 9, 1000)] == [
        "dense",
        "decompress",
        "decompress",
        "dense",
        "dense",
    ]
    with pytest.raises(ShearlingError, match="has no way that reads compact"):
        table.best(Key(4, 8, "float32", 0, 1), ["compact"])
