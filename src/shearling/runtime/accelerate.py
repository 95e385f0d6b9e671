"""Putting the fastest ways into a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shearling.anatomy import anatomy_of
from shearling.errors import ShearlingError
from shearling.kernels.compact24 import is_24
from shearling.kernels.product24 import GROUPS
from shearling.nn import EffectiveLinear, is_linear
from shearling.plan import Codes, Quant
from shearling.runtime.linear import Route, RoutedLinear
from shearling.runtime.paths import COPIES, Path, beside_of, branch_of, check_group, copy_of
from shearling.runtime.table import TOKENS, Key, Table, cached_table, measure_table, table_file
from shearling.surgery import adapters_of


@dataclass(frozen=True)
class Accelerated:
    """What ``accelerate_`` did: ``routes`` of every linear it replaced, which linears it ``left``, and the bytes.

    ``bytes`` is what the copies of replaced weights hold, ``dense_bytes`` what the weights themselves held.
    """

    routes: Mapping[str, tuple[Route, ...]]
    left: tuple[str, ...]
    bytes: int
    dense_bytes: int


@torch.no_grad()
def accelerate_(
    model: Any,
    table: Table | None = None,
    *,
    int4: int | Quant | None = None,
    int8_branches: bool = False,
    copies: Literal["one", "fastest"] = "one",
    tokens: Sequence[int] = TOKENS,
) -> Accelerated:
    """Replace the 2:4 linears of a model's blocks by ones that take the fastest way for as many tokens as they get.

    Ways come from ``table``, or from the device's own, kept on disk and measured where it lacks a shape; those of a
    linear with branches are measured with them. With ``copies="one"`` a linear holds one copy of its weight: the one
    whose ways, over all numbers of tokens, lose least against the fastest. With ``"fastest"`` it holds every copy that
    a fastest way reads. ``int4`` gives values 4 bits: those of a ``Quant`` of the model's weights, or rounded, with a
    scale for so many inputs. Branches beside a linear go along, with ``int8_branches`` the factor S that their outputs
    have in 8 bits.

    Raises ShearlingError, before anything changes, where no linear of the blocks is 2:4, and with ``int4`` where groups
    are not of a size that there are kernels for, do not fill the inputs of a linear, or a linear has no codes.
    """
    found = linears_24(model)
    if not found:
        raise ShearlingError("accelerate: none of the model's block linears is 2:4; prune it to 2:4 first")
    group, codes = _in_four_bits(int4)
    for name, weight in found.items():
        if group:
            check_group(name, weight.shape[1], group)
        if codes is not None and name not in codes:
            raise ShearlingError(f"{name}: is 2:4 and has no codes; quantise the linears of all blocks")
    left = tuple(name for name in _weights(model) if name not in found)
    like = next(iter(found.values()))
    branches = adapters_of(model)
    keys = {
        name: _key(weight, like.dtype, group, branches.down.get(name), int8_branches) for name, weight in found.items()
    }
    if table is None:
        table = _measured(set(keys.values()), like, tokens)
    routes = {
        key: _routes(table, [key._replace(tokens=count) for count in sorted(tokens)], copies)
        for key in set(keys.values())
    }
    held = dense = 0
    for name, weight in found.items():
        chosen = routes[keys[name]]
        kinds = {COPIES[route.path.name] for route in chosen}
        branch = None
        if name in branches.up:
            up = branches.up[name] * branches.scale[name]
            down, up = (factor.to(like.dtype).contiguous() for factor in (branches.down[name], up))
            branch = branch_of(down, up, kinds, int8_branches)
        old: Any = model.get_submodule(name)
        dense += weight.nbytes
        new = RoutedLinear(
            {kind: copy_of(kind, weight, group, None if codes is None else codes[name]) for kind in kinds},
            chosen,
            None if old.bias is None else old.bias.detach(),
            branch,
        )
        model.set_submodule(name, new)
        held += new.bytes
    return Accelerated({name: routes[key] for name, key in keys.items()}, left, held, dense)


def takes_codes(quant: Quant) -> bool:
    """Whether there are kernels for those codes: int4, without zero points, in groups of a size that they know."""
    return quant.bits == 4 and quant.group in GROUPS and all(c.dtype == torch.int8 for c in quant.codes.values())


def _in_four_bits(int4: int | Quant | None) -> tuple[int, dict[str, Codes] | None]:
    """How many inputs share a scale, 0 for values as they are, and the codes of linears where they are given."""
    if int4 is None or isinstance(int4, int):
        return int4 or 0, None
    if not takes_codes(int4):
        raise ShearlingError(
            f"accelerate: codes must be int4 in groups of {', '.join(map(str, GROUPS))}, as a quantise stage makes them"
        )
    assert int4.group is not None
    codes = {
        name.removesuffix(".weight"): Codes(of, int4.scales[name], int4.zeros[name]) for name, of in int4.codes.items()
    }
    return int4.group, codes


@torch.no_grad()
def linears_24(model: nn.Module) -> dict[str, Tensor]:
    """Weights [O, I] of the linears in a model's blocks that ``accelerate_`` would replace, by module path."""
    return {name: weight for name, weight in _weights(model).items() if is_24(weight)}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights [O, I] of the linears in a model's blocks by module path, those with branches beside them too."""
    anatomy = anatomy_of(model.config)
    found = {}
    for layer in range(anatomy.num_layers):
        path = anatomy.path(layer)
        for name, module in model.get_submodule(path).named_modules(prefix=path):
            if isinstance(module, EffectiveLinear):
                weight = module.effective_weight()
                found[name] = weight.T if module.transposed else weight
            elif is_linear(module):
                weight: Tensor = module.weight  # pyrefly: ignore[bad-assignment]
                found[name] = weight.T if isinstance(module, Conv1D) else weight
    return found


def _key(weight_OI: Tensor, dtype: torch.dtype, group: int, down_RI: Tensor | None, eight_bits: bool) -> Key:
    """What ways of a linear are measured for, of no number of tokens yet; ``down_RI`` is of the branch beside it."""
    beside = None if down_RI is None else beside_of(down_RI.to(dtype), eight_bits)
    outputs, inputs = weight_OI.shape
    return Key(outputs, inputs, str(dtype).removeprefix("torch."), group, 0, beside)


def _measured(keys: Iterable[Key], like: Tensor, tokens: Sequence[int]) -> Table:
    """The device's own table, which gains what it lacks for weights in the type of ``like``, and is kept."""
    table = cached_table(like.device)
    try:
        for key in sorted(keys, key=lambda key: key[:2]):
            measure_table(
                [(key.outputs, key.inputs)],
                device=like.device,
                dtype=like.dtype,
                group=key.group,
                beside=key.beside,
                tokens=tokens,
                table=table,
            )
    finally:
        # what an interruption leaves need not be measured again
        table.save(table_file(like.device))
    return table


def _routes(table: Table, keys: Sequence[Key], copies: str) -> tuple[Route, ...]:
    kinds = tuple(dict.fromkeys(COPIES.values()))
    if copies == "fastest":
        paths = [table.best(key) for key in keys]
    else:
        kind = min(kinds, key=lambda kind: _loss(table, keys, kind))
        paths = [table.best(key, [kind]) for key in keys]
    return _merged(keys, paths)


def _loss(table: Table, keys: Sequence[Key], kind: str) -> float:
    """How much slower a linear is that holds that copy alone: the sum of logarithms, infinite where it cannot be."""
    total = 0.0
    for key in keys:
        try:
            total += math.log(table.fastest(key, [kind])[1].seconds / table.fastest(key)[1].seconds)
        except ShearlingError:
            return math.inf
    return total


def _merged(keys: Sequence[Key], paths: Sequence[Path]) -> tuple[Route, ...]:
    """One route for neighbouring numbers of tokens that take the same way."""
    routes: list[Route] = []
    for key, path in zip(keys, paths, strict=True):
        if routes and routes[-1].path == path:
            routes.pop()
        routes.append(Route(key.tokens, path))
    return tuple(routes)
