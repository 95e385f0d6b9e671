"""Compact 2:4 weights: lossless both ways, and refused where they are damaged."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.errors import ShearlingError
from shearling.export.compact import block_weights, load_compact, load_sidecar_, save_compact, save_sidecar
from shearling.kernels.compact24 import Compact24, pack24, pack24_int4, unpack24, unpack24_int4
from shearling.plan import Grid, dequantise
from tests.tiny import tiny_model

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_24(outputs, groups, seed, dtype=torch.float32, keep=2):
    """A 2:4 weight; some groups hold fewer than two."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(outputs, groups, 4, generator=generator).argsort(-1)
    counts = torch.randint(0, keep + 1, (outputs, groups, 1), generator=generator)
    weight = torch.randn(outputs, groups, 4, generator=generator) * 20
    return torch.where(order < counts, weight, 0.0).to(dtype).flatten(1)


def bits(tensor):
    return tensor.contiguous().view(BITS[tensor.element_size()])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 10**6), st.sampled_from(DTYPES))
def test_packing_is_lossless(outputs, groups, seed, dtype):
    weight = random_24(outputs, groups, seed, dtype)
    compact = pack24(weight)
    assert torch.equal(bits(unpack24(compact)), bits(weight))
    assert compact.shape == tuple(weight.shape)
    assert compact.values.shape == (outputs, 2 * groups) and compact.values.dtype == dtype
    # four bits for every group, to whole words
    assert compact.positions.shape == (outputs, -(-groups // 8))


def test_every_bit_pattern_survives():
    weight = torch.tensor([[float("nan"), -0.0, 0, 0, float("inf"), 0, -float("inf"), 0, 0, 1e-40, 0, 0]])
    bits(weight)[0, 0] = 0x7FC0BEEF
    assert torch.equal(bits(unpack24(pack24(weight))), bits(weight))


def test_words_hold_groups_that_are_words_apart():
    """By hand: 20 groups make three words; group g is in word g % 3, slot g // 3."""
    weight = random_24(3, 20, 4)
    compact = pack24(weight)
    for row in range(3):
        for group in range(20):
            field = int(compact.positions[row, group % 3]) >> 4 * (group // 3) & 15
            first, second = field & 3, field >> 2
            assert first < second
            four = torch.zeros(4)
            four[first], four[second] = compact.values[row, 2 * group : 2 * group + 2]
            assert torch.equal(four, weight[row, 4 * group : 4 * group + 4])


def test_bytes_are_nine_sixteenths():
    weight = random_24(8, 32, 0, torch.bfloat16)
    assert pack24(weight).bytes * 16 == weight.nbytes * 9


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[0.0] * 8, [0, 0, 0, 0, 1, 2, 0, 3]]), "q: is not 2:4, row 1 has 3 weights at inputs 4 to 7"),
        (torch.tensor([[1.0, 2.0, -0.0, 0.0]]), "at most two may be other than"),
        (torch.zeros(2, 6), "no matrix with inputs in fours"),
        (torch.zeros(8), "no matrix with inputs in fours"),
    ],
)
def test_what_is_not_24_is_refused(weight, message):
    with pytest.raises(ShearlingError, match=message):
        pack24(weight, "q")


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([4, 8, 32, 128]), st.integers(0, 10**6))
def test_codes_are_lossless(outputs, count, group, seed):
    weight = random_24(outputs, count * group // 4, seed)
    codes, scales, zeros = Grid("int4", group).quantise(weight)
    compact = pack24_int4(codes, scales)
    assert compact.shape == tuple(weight.shape)
    assert torch.equal(unpack24_int4(compact), dequantise(codes, scales, zeros))


def test_codes_take_three_bits_a_weight():
    weight = random_24(8, 256, 0)
    codes, scales, _ = Grid("int4", 128).quantise(weight)
    assert pack24_int4(codes, scales.bfloat16()).bytes * 8 == weight.numel() * (3 + 16 / 128)


def test_a_file_gives_back_every_bit(tmp_path):
    weights = {f"w.{n}": random_24(3 + n, 5, n, dtype) for n, dtype in enumerate(DTYPES)}
    save_compact(weights, tmp_path / "c.safetensors")
    found = load_compact(tmp_path / "c.safetensors")
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(bits(unpack24(found[name])), bits(weight))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_takes_its_sidecar(tmp_path, family):
    """GPT-2 stores its weights the other way round."""
    model = tiny_model(family)
    with pytest.raises(ShearlingError, match="none of the model's block linears is 2:4"):
        save_sidecar(model, tmp_path)
    with torch.no_grad():
        for weight in block_weights(model).values():
            weight.copy_(random_24(weight.shape[0], weight.shape[1] // 4, 1))
    other = tiny_model(family, seed=2)
    load_sidecar_(other, save_sidecar(model, tmp_path).parent)
    for name, weight in block_weights(other).items():
        assert torch.equal(weight, block_weights(model)[name])
    fewer = tiny_model(family, **{"llama": {"intermediate_size": 16}, "gpt2": {"n_inner": 16}}[family])
    before = [p.clone() for p in fewer.parameters()]
    with pytest.raises(ShearlingError, match=r"take its own file"):
        load_sidecar_(fewer, tmp_path)
    assert all(torch.equal(p, old) for p, old in zip(fewer.parameters(), before, strict=True))


def test_damage_is_found(tmp_path):
    file = tmp_path / "c.safetensors"
    save_compact({"first": random_24(4, 8, 0), "second": random_24(4, 8, 1)}, file)
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    for part in ("values", "positions"):
        start = 8 + length + header[f"second.{part}"]["data_offsets"][0]
        file.write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
        with pytest.raises(ShearlingError, match=r"second does not match its checksum") as caught:
            load_compact(file)
        assert "\n" not in str(caught.value)
    for size in (0, 4, 8 + length // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ShearlingError, match="cannot be read as compact 2:4") as caught:
            load_compact(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(ShearlingError, match="cannot be read as compact 2:4"):
        load_compact(tmp_path / "absent")


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ShearlingError, match="no compact 2:4 file of this version"):
        load_compact(tmp_path / "other")
    good = pack24(random_24(2, 2, 0))
    save_file({"a.values": good.values}, tmp_path / "half", metadata={"format": "shearling-compact-24/1", "a": "0"})
    with pytest.raises(ShearlingError, match="a.positions is there without"):
        load_compact(tmp_path / "half")


def test_nothing_is_written_of_what_is_not_24(tmp_path):
    with pytest.raises(ShearlingError, match="b: is not 2:4"):
        save_compact({"a": random_24(2, 2, 0), "b": torch.ones(2, 8)}, tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


def test_shape_is_the_dense_one():
    assert Compact24(torch.zeros(3, 10), torch.zeros(3, 1, dtype=torch.int32)).shape == (3, 20)
