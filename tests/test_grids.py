from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.pytorch_utils import Conv1D

from shearling.errors import ShearlingError
from shearling.nn import EffectiveLinear, FakeQuantTransform, MaskTransform, unwrap_, wrap_
from shearling.plan import Codes, Grid, Masks, Quant, dequantise
from shearling.plan.patterns import Pattern
from shearling.surgery import cut_
from tests.tiny import tiny_model, tiny_tokens

FORMATS = ["int4", "int8", "uint4", "uint8", "float8_e4m3"]
INTEGERS = {"int4": (-8, 7), "int8": (-128, 127), "uint4": (0, 15), "uint8": (0, 255)}
formats = st.sampled_from(FORMATS)


def points(name: str) -> torch.Tensor:
    """Every code of a format, float64."""
    if name in INTEGERS:
        first, last = INTEGERS[name]
        return torch.arange(first, last + 1, dtype=torch.float64)
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return values[values.isfinite()].unique()


def draw(seed: int, outputs: int, groups: int, group: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Groups of unlike sizes, some lopsided, some of one sign, some with zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, groups, group, generator=generator)
    size = 10.0 ** torch.randint(-3, 3, (outputs, groups, 1), generator=generator)
    shift = torch.tensor([-4.0, -1.0, 0.0, 0.0, 1.0, 4.0])[torch.randint(6, (outputs, groups, 1), generator=generator)]
    zeros = torch.rand(weight.shape, generator=generator) < 0.3
    return torch.where(zeros, 0.0, (weight + shift) * size).flatten(1).to(dtype)


def fake(grid: Grid, weight: torch.Tensor) -> torch.Tensor:
    return dequantise(*grid.quantise(weight), weight.dtype)


def masked_24(linear: EffectiveLinear) -> torch.Tensor:
    """Gives a linear a random 2:4 mask; returns it in the stored orientation."""
    mask = Pattern(2, 4).mask(torch.rand(linear.out_features, linear.in_features))
    mask = mask.T if linear.transposed else mask
    linear.transforms.append(MaskTransform(mask))
    return mask


cases = given(
    seed=st.integers(0, 2**31),
    name=formats,
    outputs=st.integers(1, 5),
    groups=st.integers(1, 4),
    group=st.integers(1, 40),
)


@hypothesis_settings(max_examples=120, deadline=None)
@cases
def test_codes_are_the_nearest_points_by_brute_force_in_float64(seed, name, outputs, groups, group):
    weight = draw(seed, outputs, groups, group)
    codes, scales, zeros = Grid(name, group).quantise(weight)
    assert codes.shape == weight.shape and scales.shape == zeros.shape == (outputs, groups)
    assert scales.dtype == torch.float32 and (scales > 0).all()
    exact = weight.double().unflatten(1, (groups, group))
    # the scale, from the formula
    high, low = exact.amax(-1).clamp(min=0), exact.amin(-1).clamp(max=0)
    match name:
        case "int4" | "int8":
            first, last = INTEGERS[name]
            expected = torch.maximum(high / last, low / first)
        case "uint4" | "uint8":
            expected = (high - low) / INTEGERS[name][1]
        case _:
            expected = torch.maximum(high, -low) / 448
    expected = torch.where(expected == 0, 1.0, expected)
    torch.testing.assert_close(scales.double(), expected, rtol=3e-7, atol=0)
    # the grid, every point of it
    grid = (points(name) - zeros.double()[..., None]) * scales.double()[..., None]
    distance = (exact[..., None] - grid[:, :, None]).abs().amin(-1)
    chosen = (codes.double().unflatten(1, (groups, group)) - zeros.double()[..., None]) * scales.double()[..., None]
    step = scales.double()[..., None]
    assert ((exact - chosen).abs() <= distance + 5e-4 * step).all()
    if name in INTEGERS:
        assert ((exact - chosen).abs() <= (0.5 + 3e-4) * step).all()


@hypothesis_settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), outputs=st.integers(1, 5), inputs=st.integers(1, 70))
def test_float8_is_torchs_cast_of_the_weight_scaled_in_float64(seed, outputs, inputs):
    weight = draw(seed, outputs, 1, inputs)
    codes, scales, zeros = Grid("float8_e4m3").quantise(weight)
    assert codes.dtype == torch.float8_e4m3fn and scales.shape == (outputs, 1) and not zeros.float().any()
    largest = weight.double().abs().amax(1, keepdim=True)
    scaled = weight.double() / torch.where(largest == 0, 1.0, largest / 448)
    # float32 may fall on the other side of a point halfway between two codes, and only there
    nudged = [(scaled * (1 + nudge)).clamp(-448, 448).to(torch.float8_e4m3fn).double() for nudge in (-1e-6, 0, 1e-6)]
    agree = torch.stack([codes.double() == cast for cast in nudged])
    assert agree.any(0).all()
    assert (agree[1] | (nudged[0] != nudged[2])).all()


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    name=formats,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    outputs=st.integers(1, 5),
    groups=st.integers(1, 4),
    group=st.integers(1, 40),
)
def test_quantising_twice_is_quantising_once(seed, name, dtype, outputs, groups, group):
    if name == "uint8" and dtype == torch.bfloat16:
        return
    grid = Grid(name, group)
    weight = draw(seed, outputs, groups, group, dtype)
    once = grid.quantise(weight)
    twice = grid.quantise(dequantise(*once, dtype))
    assert torch.equal(once.codes_OI.float(), twice.codes_OI.float()) and torch.equal(once.zeros_OG, twice.zeros_OG)
    tolerance = 3e-7 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
    torch.testing.assert_close(twice.scales_OG, once.scales_OG, rtol=tolerance, atol=0)


@pytest.mark.parametrize("steps", [15, 255])
def test_a_zero_point_halfway_between_two_codes_leaves_no_code_unused(steps):
    # low = -(k + 1/2) steps for every k and many scales: exact ties, which float32 moves to either side
    scales = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.1
    low = -(torch.arange(steps)[:, None] + 0.5) * scales
    weight = torch.stack([low, low + steps * scales], -1).flatten(0, 1)
    grid = Grid("uint4" if steps == 15 else "uint8")
    once = grid.quantise(weight)
    assert (once.codes_OI.float().amin(1) == 0).all() and (once.codes_OI.float().amax(1) == steps).all()
    assert torch.equal(grid.quantise(dequantise(*once)).codes_OI, once.codes_OI)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    weight = draw(0, 4, 2, 16, dtype)
    for mine, expected in zip(Grid(name, 16).quantise(weight), Grid(name, 16).quantise(weight.float()), strict=True):
        assert torch.equal(mine.float(), expected.float())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-41, -1e-41])
def test_groups_of_nothing_are_zero_and_finite(name, dtype, value):
    weight = torch.cat([torch.full((3, 8), value), torch.ones(3, 8)], 1).to(dtype)
    codes = Grid(name, 8).quantise(weight)
    assert (codes.scales_OG[:, 0] == 1).all()
    back = dequantise(*codes, dtype)
    assert not back[:, :8].any() and not torch.signbit(back).any()
    assert torch.allclose(back[:, 8:].float(), torch.ones(3, 8), rtol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-4])
@pytest.mark.parametrize("other", [1.0, -1.0])
def test_no_zero_is_negative(name, dtype, size, other):
    weight = (torch.tensor([[-0.0, 0.0, -1e-7, -1e-3, -1e-5, -2e-6, other, other / 2, 1e-7]]) * size).to(dtype)
    codes, scales, zeros = Grid(name).quantise(weight)
    # float16 has no number for the least steps
    weights = [dequantise(codes, scales, zeros, into) for into in (torch.float32, dtype, torch.float16)]
    for values in (codes.float(), *weights):
        assert not torch.signbit(values[values == 0]).any()
    assert (dequantise(codes, scales, zeros)[weight == 0] == 0).all()


def test_symmetric_integers_use_the_code_that_only_negatives_have():
    codes, scales, _ = Grid("int4").quantise(torch.tensor([[-8.0, 7.0, 3.4], [8.0, -7.0, 3.0]]))
    assert codes.tolist() == [[-8, 7, 3], [7, -6, 3]] and torch.equal(scales, torch.tensor([[1.0], [8 / 7]]))


def test_not_a_number_stays_one():
    weight = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    for name in FORMATS:
        assert fake(Grid(name), weight).isnan().any(1).tolist() == [True, False]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("conv", [False, True])
def test_zeros_of_a_mask_stay_and_the_grid_covers_only_what_is_kept(name, group, conv):
    torch.manual_seed(0)
    linear = EffectiveLinear(Conv1D(12, 16) if conv else nn.Linear(16, 12))
    mask = masked_24(linear)
    linear.transforms.append(FakeQuantTransform(Grid(name, group), linear))
    weight = linear.effective_weight()
    assert not weight[~mask].any() and not torch.signbit(weight[~mask]).any()
    kept = torch.where(mask, linear.weight, 0.0).detach()
    expected = fake(Grid(name, group), kept.T).T if conv else fake(Grid(name, group), kept)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_straight_through(name, dtype):
    torch.manual_seed(0)
    linear = EffectiveLinear(nn.Linear(16, 12, dtype=dtype))
    mask = masked_24(linear)
    linear.transforms.append(FakeQuantTransform(Grid(name, 4), linear))
    gradient = torch.randn(12, 16).to(dtype)
    linear.effective_weight().backward(gradient)
    assert torch.equal(linear.weight.grad, torch.where(mask, gradient, 0.0))


@pytest.mark.parametrize("name", FORMATS)
def test_conv1d_is_the_transpose_of_linear(name):
    torch.manual_seed(0)
    conv, plain = Conv1D(12, 16), nn.Linear(16, 12)
    plain.weight = nn.Parameter(conv.weight.detach().T.contiguous())
    gradient, weights = torch.randn(12, 16), []
    for linear in (EffectiveLinear(plain), EffectiveLinear(conv)):
        linear.transforms.append(FakeQuantTransform(Grid(name, 4), linear))
        weights.append(linear.effective_weight())
        weights[-1].backward(gradient.T if linear.transposed else gradient)
    assert torch.equal(weights[1], weights[0].T)
    assert torch.equal(conv.weight.grad, gradient.T) and torch.equal(plain.weight.grad, gradient)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cutting_by_the_codes_gives_the_trained_model_to_the_bit(name, family, dtype):
    model, cut = tiny_model(family).to(dtype), tiny_model(family).to(dtype)
    inner = ["mlp.up_proj", "mlp.down_proj"] if family == "llama" else ["mlp.c_fc", "attn.c_proj"]
    paths = [f"{'model.layers' if family == 'llama' else 'transformer.h'}.1.{path}" for path in inner]
    grid = Grid(name, 16)
    codes: dict[str, Codes] = {}
    masks: dict[str, torch.Tensor] = {}
    for path, linear in wrap_(model, paths).items():
        masks[f"{path}.weight"] = masked_24(linear)
        weight = linear.effective_weight().detach()
        codes[f"{path}.weight"] = grid.quantise(weight.T if linear.transposed else weight)
        linear.transforms.append(FakeQuantTransform(grid, linear))
    trained = model(tiny_tokens()).logits
    unwrap_(model)
    quant = Quant(*({path: part[i] for path, part in codes.items()} for i in range(3)), bits=8, group=16)
    cut_(cut, [Masks(masks, "2:4"), Quant.restore(quant.meta(), quant.tensors())])
    for path in codes:
        assert torch.equal(cut.get_parameter(path), model.get_parameter(path))
    assert torch.equal(cut(tiny_tokens()).logits, trained)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("conv", [False, True])
def test_one_graph_under_compile_with_the_same_gradients(name, conv):
    # other tests compile the same code, and there is a limit to its variants
    torch.compiler.reset()
    torch.manual_seed(0)
    linear = EffectiveLinear(Conv1D(12, 16) if conv else nn.Linear(16, 12))
    masked_24(linear)
    linear.transforms.append(FakeQuantTransform(Grid(name, 8), linear))
    x = torch.randn(3, 16)

    def run(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        linear.weight.grad = None
        y = module(x)
        y.square().sum().backward()
        assert linear.weight.grad is not None
        return y.detach(), linear.weight.grad

    for mine, expected in zip(
        run(torch.compile(linear, backend="aot_eager", fullgraph=True)), run(linear), strict=True
    ):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_autocast_multiplies_the_rounded_master_weight(name):
    torch.manual_seed(0)
    linear = EffectiveLinear(nn.Linear(16, 12))
    linear.transforms.append(FakeQuantTransform(Grid(name, 8), linear))
    x = torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        weight, y = linear.effective_weight(), linear(x)
    assert torch.equal(weight, fake(Grid(name, 8), linear.weight.detach())) and y.dtype == torch.bfloat16
    expected = nn.functional.linear(x.bfloat16(), weight.bfloat16(), linear.bias.bfloat16())
    assert torch.equal(y, expected)
    y.float().square().sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_sharded_parameters_are_rounded_whole(name, compute):
    torch.manual_seed(0)
    linear = EffectiveLinear(nn.Linear(16, 12))
    masked_24(linear)
    linear.transforms.append(FakeQuantTransform(Grid(name, 8), linear))
    x = torch.randn(3, 16, dtype=compute)
    whole = copy.deepcopy(linear).to(compute)
    whole(x).sum().backward()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        fully_shard(linear, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        y = linear(x)
        y.sum().backward()
        assert torch.equal(y, whole(x))
        assert torch.equal(linear.weight.grad.full_tensor(), whole.weight.grad.float())
    finally:
        dist.destroy_process_group()


def test_a_transform_adds_nothing_to_the_state_dict():
    linear = EffectiveLinear(nn.Linear(16, 12))
    names = list(linear.state_dict())
    linear.transforms.append(FakeQuantTransform(Grid("int4", 8), linear))
    assert list(linear.state_dict()) == names and not list(linear.transforms.buffers())


@pytest.mark.parametrize("conv", [False, True])
def test_a_group_that_does_not_divide_is_refused_naming_both(conv):
    linear = EffectiveLinear(Conv1D(32, 12) if conv else nn.Linear(12, 32))
    message = r"^grid int4: 12 inputs are no multiple of its group of 8; [^\n]*$"
    with pytest.raises(ShearlingError, match=message):
        FakeQuantTransform(Grid("int4", 8), linear)
    with pytest.raises(ShearlingError, match=message):
        Grid("int4", 8).quantise(torch.zeros(32, 12))


def test_grids_that_are_none_are_refused():
    with pytest.raises(ShearlingError, match="grid 'int3'.*int4, int8, uint4, uint8, float8_e4m3"):
        Grid("int3")
    with pytest.raises(ShearlingError, match="grid int4: a group of 0"):
        Grid("int4", 0)
