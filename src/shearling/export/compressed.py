"""Quantised weights in compressed-tensors' dense formats, which transformers and serving engines load.

    pack-quantized     4 bits, and 8 bits in groups: codes in int32 words, activations stay as they are
    int-quantized      8 bits, a scale a row: int8 codes, activations rounded token by token while the model runs
    float-quantized    float8_e4m3, a scale a row: likewise

Scales are stored in the type of the model's other weights. Masked weights are codes of 0 like any other: no engine has
kernels for 2:4 in these formats, and vLLM refuses a ``sparsity_config``, so none is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shearling.anatomy import Family
from shearling.errors import ShearlingError
from shearling.plan import Grid, Quant


def check_storable(grid: Grid, family: Family, uniform: bool) -> None:
    """Raise ShearlingError where compressed-tensors has no way to store such a grid for a model of that family.

    ``uniform``: whether all blocks of the model have the same widths.
    """
    if family.input_first:
        raise ShearlingError(
            f"quantise: compressed-tensors stores [out, in] and {family.model_type} [in, out]; leave it out"
        )
    if not uniform:
        raise ShearlingError(
            "quantise: blocks that differ in width load with a class that compressed-tensors does not know; plan with "
            "uniform: true, or leave it out"
        )
    if grid.group is not None and grid.format == "float8_e4m3":
        raise ShearlingError(f"quantise.group = {grid.group}: float8 has one scale a row in engines; leave it out")


def compressed_state(quant: Quant, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with codes, scales and zero points in place of the weights that are quantised."""
    stored = {name: tensor for name, tensor in state.items() if name not in quant.codes}
    packed = format_of(quant) == "pack-quantized"
    for name, codes in quant.codes.items():
        scale = quant.scales[name].to(state[name].dtype).contiguous()
        stored[f"{name}_scale"] = scale
        signed, offset = _signed(codes, quant.bits)
        if packed:
            stored[f"{name}_packed"] = pack(signed, quant.bits)
            stored[f"{name}_shape"] = torch.tensor(codes.shape)
        else:
            stored[name] = signed.contiguous()
        if offset:
            zeros = (quant.zeros[name].to(torch.int16) - offset).to(torch.int8)
            stored[f"{name}_zero_point"] = pack(zeros.T, quant.bits).T.contiguous() if packed else zeros
    return stored


def quantization_config(quant: Quant, linears: Iterable[str]) -> dict[str, Any]:
    """What ``config.json`` says of it; ``linears`` are all linears of the model by path, quantised or not."""
    weights: dict[str, Any] = {
        "num_bits": quant.bits,
        "type": "float" if _is_float(quant) else "int",
        "symmetric": not _offset(quant),
        "strategy": "channel" if quant.group is None else "group",
        "group_size": quant.group,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": weights["type"], "symmetric": True, "strategy": "token", "dynamic": True}
    form = format_of(quant)
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None if form == "pack-quantized" else inputs,
                "output_activations": None,
                "format": form,
            }
        },
        "ignore": sorted(path for path in linears if f"{path}.weight" not in quant.codes),
        "kv_cache_scheme": None,
    }


def load_codes(folder: Path | str) -> Quant:
    """The codes, scales and zero points in a folder of these formats, as they were when it was saved.

    Scales come back in float32, as the type they are stored in rounds them. Raises ShearlingError for a folder that
    holds none.
    """
    folder = Path(folder)
    try:
        weights = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
        bits, group, symmetric = (weights["weights"][key] for key in ("num_bits", "group_size", "symmetric"))
        stored: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            stored |= load_file(file)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ShearlingError(f"{folder}: holds no codes that save_model wrote ({error}); quantise it first") from error
    packed, offset = weights["format"] == "pack-quantized", 0 if symmetric else 1 << (bits - 1)
    codes, scales, zeros = {}, {}, {}
    for name in [name.removesuffix("_scale") for name in stored if name.endswith(".weight_scale")]:
        scale = stored[f"{name}_scale"].float()
        if packed:
            outputs, inputs = stored[f"{name}_shape"].tolist()
            signed = unpack(stored[f"{name}_packed"], bits, inputs)
        else:
            signed, outputs = stored[name], len(stored[name])
        zero = torch.zeros(scale.shape, dtype=signed.dtype)
        if offset:
            given = stored[f"{name}_zero_point"]
            zero = unpack(given.T, bits, outputs).T if packed else given
        codes[name], scales[name], zeros[name] = _moved(signed, offset), scale, _moved(zero, offset).contiguous()
    return Quant(codes, scales, zeros, bits=bits, group=group)


def format_of(quant: Quant) -> str:
    """The name of the format that holds an edit."""
    if _is_float(quant):
        return "float-quantized"
    return "pack-quantized" if quant.bits < 8 or quant.group is not None else "int-quantized"


def pack(values_OI: Tensor, bits: int) -> Tensor:
    """Signed codes as int32 words [O, ceil(I / (32 / bits))], the first in the lowest bits, shifted to start at 0."""
    each = 32 // bits
    unsigned = values_OI.to(torch.int64) + (1 << (bits - 1))
    unsigned = torch.nn.functional.pad(unsigned, (0, -unsigned.shape[1] % each)).unflatten(1, (-1, each))
    words = (unsigned << torch.arange(0, 32, bits)).sum(-1)
    # as int32 the upper half is negative
    return (words - ((words >> 31) << 32)).to(torch.int32)


def unpack(words_OW: Tensor, bits: int, inputs: int) -> Tensor:
    """The signed codes [O, I] (int8) again that ``pack`` made words of."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    unsigned = (words_OW.unsqueeze(-1) >> shifts & ((1 << bits) - 1)).flatten(1)[:, :inputs]
    return (unsigned - (1 << (bits - 1))).to(torch.int8)


def _moved(signed: Tensor, offset: int) -> Tensor:
    """Signed codes where they stood before ``_signed``."""
    return (signed.to(torch.int16) + offset).to(torch.uint8) if offset else signed


def _signed(codes: Tensor, bits: int) -> tuple[Tensor, int]:
    """Codes as signed numbers, and by how much they were moved down for it."""
    if codes.dtype != torch.uint8:
        return codes, 0
    offset = 1 << (bits - 1)
    return (codes.to(torch.int16) - offset).to(torch.int8), offset


def _offset(quant: Quant) -> bool:
    return next(iter(quant.codes.values())).dtype == torch.uint8


def _is_float(quant: Quant) -> bool:
    return next(iter(quant.codes.values())).is_floating_point()
