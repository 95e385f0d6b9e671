"""2:4 weights in 9/16 of their bytes, as a file beside a checkpoint that ordinary tools load.

A safetensors file: ``<name>.values`` and ``<name>.positions`` for every weight (kernels/compact24.py has the layout),
and in its metadata a SHA-256 of each weight's bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shearling.anatomy import anatomy_of
from shearling.errors import ShearlingError
from shearling.kernels.compact24 import Compact24, is_24, pack24, unpack24
from shearling.nn import is_linear
from shearling.plan import write_tensors

#: the file beside a dense checkpoint
COMPACT = "compact-24.safetensors"
_FORMAT = "shearling-compact-24/1"
_VALUES, _POSITIONS = ".values", ".positions"


def save_compact(weights: Mapping[str, Tensor], file: Path | str) -> None:
    """Write 2:4 weights [O, I] by name, whole or not at all, to the bit.

    Raises ShearlingError for a weight that is not 2:4 and where the file cannot be written.
    """
    packed = {name: pack24(weight, name) for name, weight in weights.items()}
    tensors = {name + _VALUES: compact.values for name, compact in packed.items()}
    tensors |= {name + _POSITIONS: compact.positions for name, compact in packed.items()}
    sums = {name: _checksum(compact) for name, compact in packed.items()}
    write_tensors(tensors, Path(file), {"format": _FORMAT, **sums})


def load_compact(file: Path | str) -> dict[str, Compact24]:
    """Read such a file back, still compact.

    Raises ShearlingError where it is missing, of another kind, cut short or damaged.
    """
    file = Path(file)
    try:
        with safe_open(file, "pt") as stored:
            sums: dict[str, str] = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ShearlingError(f"{file}: cannot be read as compact 2:4 ({reason}); write it again") from error
    if sums.pop("format", None) != _FORMAT:
        raise ShearlingError(f"{file}: is no compact 2:4 file of this version; its format must be {_FORMAT}")
    wanted = {name + part for name in sums for part in (_VALUES, _POSITIONS)}
    if other := sorted(wanted ^ tensors.keys()):
        raise ShearlingError(f"{file}: {other[0]} is there without its checksum, or the reverse; write it again")
    found = {name: Compact24(tensors[name + _VALUES], tensors[name + _POSITIONS]) for name in sums}
    for name, compact in found.items():
        if _checksum(compact) != sums[name]:
            raise ShearlingError(f"{file}: {name} does not match its checksum; the file is damaged, write it again")
    return found


def save_sidecar(model: nn.Module, folder: Path | str) -> Path:
    """Write the 2:4 linears among a model's blocks beside its checkpoint; returns the file.

    Raises ShearlingError where none of them is 2:4 and where the file cannot be written.
    """
    weights = {f"{name}.weight": weight for name, weight in block_weights(model).items() if is_24(weight)}
    if not weights:
        raise ShearlingError(f"{folder}: none of the model's block linears is 2:4; prune it to 2:4 first")
    save_compact(weights, Path(folder) / COMPACT)
    return Path(folder) / COMPACT


@torch.no_grad()
def load_sidecar_(model: nn.Module, folder: Path | str) -> None:
    """Write the weights of a folder's compact file into a model's block linears.

    Raises ShearlingError, before anything changes, as ``load_compact`` and for a name or shape the model lacks.
    """
    file = Path(folder) / COMPACT
    found, weights = load_compact(file), block_weights(model)
    for name, compact in found.items():
        here = weights.get(name.removesuffix(".weight"))
        if here is None or tuple(here.shape) != compact.shape:
            theirs = "none" if here is None else tuple(here.shape)
            raise ShearlingError(f"{file}: {name} is {compact.shape}, the model's is {theirs}; take its own file")
    for name, compact in found.items():
        weights[name.removesuffix(".weight")].copy_(unpack24(compact))


def block_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the plain linears in a model's blocks by module path, as views [O, I] whatever is stored."""
    anatomy = anatomy_of(model.config)
    found = {}
    for layer in range(anatomy.num_layers):
        path = anatomy.path(layer)
        for name, module in model.get_submodule(path).named_modules(prefix=path):
            if is_linear(module):
                weight: Tensor = module.weight  # pyrefly: ignore[bad-assignment]
                found[name] = weight.T if isinstance(module, Conv1D) else weight
    return found


def _checksum(compact: Compact24) -> str:
    digest = hashlib.sha256()
    for part in _parts(compact):
        digest.update(part)
    return digest.hexdigest()


def _parts(compact: Compact24) -> Iterator[bytes | memoryview]:
    """Type, shape and bytes of both tensors: the same bytes of another type are another weight."""
    for tensor in compact:
        yield f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
        # pyrefly: ignore[bad-argument-type]
        yield memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
