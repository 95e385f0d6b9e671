"""Edits: what changes in a model, as typed, immutable values that surgery carries out.

Edits are ordered. Each one speaks of the model as the edits before it left it: a ``Delta`` that follows a ``Structure``
names layers and shapes after the cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from shearling.errors import ShearlingError


@dataclass(frozen=True)
class Structure:
    """Which indices of which spaces stay.

    ``kept`` maps ``layers``, ``hidden``, ``ffn.<layer>``, ``kv_group.<layer>`` or ``query_head.<layer>`` to increasing
    indices; ``hidden`` is the residual stream, one for all layers. A space that is not named stays whole. A KV group is
    one key/value head and the query heads that read it; query heads, where named, are numbered through the block and
    every kept group keeps equally many.
    """

    kind: ClassVar[str] = "structure"
    kept: Mapping[str, tuple[int, ...]]

    def tensors(self) -> dict[str, Tensor]:
        return {space: torch.tensor(indices, dtype=torch.int32) for space, indices in self.kept.items()}

    def meta(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restore(cls, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Structure:
        return cls({space: tuple(indices.tolist()) for space, indices in tensors.items()})


@dataclass(frozen=True, eq=False)
class Delta:
    """New values of whole tensors by full name; a bias that the model has not is added."""

    kind: ClassVar[str] = "delta"
    values: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.values)

    def meta(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restore(cls, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Delta:
        return cls(dict(tensors))


@dataclass(frozen=True, eq=False)
class Masks:
    """Which weights stay (True), by full tensor name, in the weight's stored orientation.

    ``pattern`` is ``"2:4"`` and the like where the mask keeps N of every M along the input, else None.
    """

    kind: ClassVar[str] = "masks"
    kept: Mapping[str, Tensor]
    pattern: str | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {name: _pack(mask) for name, mask in self.kept.items()}

    def meta(self) -> dict[str, Any]:
        return {"pattern": self.pattern, "shapes": {name: list(mask.shape) for name, mask in self.kept.items()}}

    @classmethod
    def restore(cls, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Masks:
        kept = {name: _unpack(bits, meta["shapes"][name]) for name, bits in tensors.items()}
        return cls(kept, meta["pattern"])


@dataclass(frozen=True, eq=False)
class Adapters:
    """Low-rank branches: ``y += scale * up (down x)``, by the path of the linear they stand beside.

    ``down`` is [rank, in], ``up`` is [out, rank], whatever orientation the linear stores.
    """

    kind: ClassVar[str] = "adapters"
    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]
    scale: Mapping[str, float]

    def tensors(self) -> dict[str, Tensor]:
        return {f"{path}.down": a for path, a in self.down.items()} | {f"{path}.up": b for path, b in self.up.items()}

    def meta(self) -> dict[str, Any]:
        return {"scale": dict(self.scale)}

    @classmethod
    def restore(cls, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapters:
        def part(suffix: str) -> dict[str, Tensor]:
            return {name.removesuffix(suffix): t for name, t in tensors.items() if name.endswith(suffix)}

        return cls(part(".down"), part(".up"), dict(meta["scale"]))


@dataclass(frozen=True, eq=False)
class Quant:
    """Weights on a grid: ``(codes - zeros) * scales`` per group along the input, by full tensor name.

    ``codes`` is [out, in] (int8, uint8 or float8) whatever orientation the linear stores, ``scales`` and ``zeros``
    are [out, groups]: the ``Codes`` of ``grids``.
    """

    kind: ClassVar[str] = "quant"
    codes: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]
    zeros: Mapping[str, Tensor]
    bits: int = 8
    group: int | None = None

    def tensors(self) -> dict[str, Tensor]:
        parts = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros}
        return {f"{part}/{name}": t for part, named in parts.items() for name, t in named.items()}

    def meta(self) -> dict[str, Any]:
        return {"bits": self.bits, "group": self.group}

    @classmethod
    def restore(cls, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Quant:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        return cls(part("codes/"), part("scales/"), part("zeros/"), meta["bits"], meta["group"])


Edit = Structure | Delta | Masks | Adapters | Quant
KINDS: Mapping[str, type[Edit]] = {edit.kind: edit for edit in (Structure, Delta, Masks, Adapters, Quant)}

#: what may not follow what, and why
_REFUSED = {
    ("masks", "structure"): "cutting an input dimension breaks the groups of the mask; cut first, then mask",
    ("quant", "structure"): "cutting an input dimension breaks the groups of the grid; cut first, then quantise",
    ("quant", "delta"): "new values are off the grid; write them first, then quantise",
    ("quant", "masks"): "masking after quantising leaves scales of weights that are gone; mask first, then quantise",
}


@dataclass(frozen=True)
class EditSize:
    """What an edit weighs on disk."""

    kind: str
    bytes: int
    tensors: int = field(default=0)


def edit_size(edit: Edit) -> EditSize:
    """Bytes and number of tensors of an edit as stored."""
    tensors = edit.tensors()
    return EditSize(edit.kind, sum(t.numel() * t.element_size() for t in tensors.values()), len(tensors))


def check_order(edits: Sequence[Edit]) -> None:
    """Raise ShearlingError for the first edit that may not follow one before it."""
    seen: list[str] = []
    for position, edit in enumerate(edits):
        for before in seen:
            if (before, edit.kind) in _REFUSED:
                raise ShearlingError(f"edit {position} ({edit.kind}) after {before}: {_REFUSED[before, edit.kind]}")
        seen.append(edit.kind)


def _pack(mask: Tensor) -> Tensor:
    bits = mask.flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[: torch.Size(shape).numel()].view(*shape).bool()
