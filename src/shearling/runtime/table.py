"""Which way is the fastest: measured once for a shape, a type and a number of tokens, and kept on disk."""

from __future__ import annotations

import json
import platform
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as File
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from shearling.cache import cache_folder
from shearling.errors import ShearlingError
from shearling.files import write_whole
from shearling.kernels.compact24 import random_24
from shearling.kernels.compiled_c import processor
from shearling.kernels.expand24 import obstacle as cpu_obstacle
from shearling.kernels.nvrtc import obstacle
from shearling.kernels.product24 import Fragments, Up, compile_all, configs
from shearling.runtime.paths import (
    COPIES,
    Beside,
    Branch,
    Copy,
    Path,
    bytes_of,
    copy_of,
    paths,
    product,
    random_branch,
)
from shearling.runtime.timing import Timing, cpu_rounds, rounds, timed_ways

#: numbers of tokens that are measured; one between two takes the larger's way, one above all the largest's
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 2048, 4096)
#: raised when ways or the meaning of their options change
_VERSION = 5


class Key(NamedTuple):
    """What a way is measured for: a product with a weight [outputs, inputs] of a type.

    With a ``group`` it has 4 bits, and so many inputs share a scale of that type. ``beside`` it there may be a branch.
    """

    outputs: int
    inputs: int
    dtype: str
    group: int
    tokens: int
    beside: Beside | None = None


@dataclass
class Table:
    """Measured times of ways, ``times[key][path]``, on one device and version of torch."""

    device: str
    torch: str
    times: dict[Key, dict[Path, Timing]] = field(default_factory=dict)

    def best(self, key: Key, copies: Iterable[str] | None = None) -> Path:
        """The fastest of the ways that read one of ``copies`` (all where None), dense among equals.

        Raises ShearlingError where the shape has not been measured, for any number of tokens or by any of those ways.
        """
        return self.fastest(key, copies)[0]

    def fastest(self, key: Key, copies: Iterable[str] | None = None) -> tuple[Path, Timing]:
        """The way of ``best`` and its time."""
        measured = sorted(k.tokens for k in self.times if k._replace(tokens=0) == key._replace(tokens=0))
        if not measured:
            raise ShearlingError(f"{self.device}: {key} is not in the table; measure it with measure_table first")
        bucket = next((tokens for tokens in measured if tokens >= key.tokens), measured[-1])
        wanted = set(COPIES.values() if copies is None else copies)
        found = [pair for pair in self.times[key._replace(tokens=bucket)].items() if COPIES[pair[0].name] in wanted]
        if not found:
            raise ShearlingError(f"{self.device}: {key} has no way that reads {' or '.join(sorted(wanted))}")
        return min(found, key=lambda pair: pair[1].seconds)

    def save(self, file: File | str) -> None:
        """Write it as JSON, whole; ShearlingError where that cannot be done."""
        rows = [
            [*key, path.name, list(path.option), list(timing)]
            for key, times in self.times.items()
            for path, timing in times.items()
        ]
        content = {"version": _VERSION, "device": self.device, "torch": self.torch, "rows": rows}
        write_whole(File(file), json.dumps(content))

    @classmethod
    def load(cls, file: File | str) -> Table:
        """Read it back; ShearlingError for a file that is none, or of another version."""
        try:
            content = json.loads(File(file).read_text())
            if content["version"] != _VERSION:
                raise ShearlingError(f"{file}: is a table of another version; remove it, and it is measured again")
            table = cls(content["device"], content["torch"])
            for *sizes, beside, name, option, timing in content["rows"]:
                key = Key(*sizes)._replace(beside=None if beside is None else Beside(*beside))
                table.times.setdefault(key, {})[Path(name, tuple(option))] = Timing(*timing)
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ShearlingError(f"{file}: is no table of measured times ({error}); remove it") from error
        return table


def table_file(device: torch.device | str) -> File:
    """Where the table of a device and this version of torch is kept."""
    name = f"{_device_name(torch.device(device))}-{torch.__version__}"
    return cache_folder() / "runtime" / ("".join(c if c.isalnum() or c in ".-" else "_" for c in name) + ".json")


def cached_table(device: torch.device | str) -> Table:
    """The table kept for a device, or an empty one; one of another version is measured anew."""
    file = table_file(device)
    if file.exists():
        try:
            return Table.load(file)
        except ShearlingError:
            pass
    return Table(_device_name(torch.device(device)), torch.__version__)


def measure_table(
    shapes: Iterable[tuple[int, int]],
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    group: int = 0,
    beside: Beside | None = None,
    tokens: Sequence[int] = TOKENS,
    table: Table | None = None,
    replays: int = 20,
    every: bool = False,
    ways: Collection[str] | None = None,
) -> Table:
    """Time all ways for weights [outputs, inputs] of those shapes, on random values that no cache holds.

    With ``beside`` each has a branch of that kind, which is timed too. ``table`` gains what it lacks, or with ``every``
    all of it; ``ways`` names those to time beside dense, and others keep their times. Where ``table`` is None the one
    on disk does, and is written back.
    Raises ShearlingError where a shape cannot be 2:4, and where groups or a branch's sums do not fill its inputs.
    """
    kept = table is None
    table = cached_table(device) if table is None else table
    for outputs, inputs in dict.fromkeys(shapes):
        of = Key(outputs, inputs, str(dtype).removeprefix("torch."), group, 0, beside)
        keys = [of._replace(tokens=count) for count in tokens]
        missing = [key for key in keys if every or key not in table.times]
        if missing:
            weight_OI = random_24(outputs, inputs, dtype, device)
            for key in missing:
                found = _measure(key, weight_OI, replays, ways)
                table.times.setdefault(key, {}).update(found)
    if kept:
        table.save(table_file(device))
    return table


def _measure(key: Key, weight_OI: Tensor, replays: int, ways: Collection[str] | None) -> dict[Path, Timing]:
    x_MI = torch.randn(key.tokens, key.inputs, device=weight_OI.device).to(weight_OI.dtype)
    wanted = None if ways is None else {"dense", *ways}
    found = paths(key.outputs, key.inputs, key.tokens, weight_OI, key.group, wanted)
    copies = several(
        {kind: copy_of(kind, weight_OI, key.group) for kind in dict.fromkeys(COPIES[p.name] for p in found)}
    )
    branch = None if key.beside is None else random_branch(*key[:2], key.beside, weight_OI, copies)
    if "fragments" in copies:
        compile_ahead(key, copies["fragments"][0], None if branch is None else branch.fragments)
    pairs = {kind: with_branches(some, branch) for kind, some in copies.items()}
    steps = {p: [partial(product, p, x_MI, *pair) for pair in pairs[COPIES[p.name]]] for p in found}
    return timed_ways(steps, weight_OI.device, replays)


def compile_ahead(key: Key, copy: Copy, up: Up | None = None) -> None:
    """Compile what the ways on fragments need at once, which takes a fraction of one after another."""
    assert isinstance(copy, Fragments)
    found = configs(key.outputs, key.inputs, key.tokens, key.group > 0)
    compile_all(copy, [(config, key.tokens, up) for config in found])


Which = TypeVar("Which", bound=Hashable)
Held = TypeVar("Held", bound=Copy | Branch | Up)


def several(copies: Mapping[Which, Copy]) -> dict[Which, list[Copy]]:
    """Each as often as leaves nothing of it in a cache; on a CPU, where ways take turns, of all together."""
    together = sum(bytes_of(copy) for copy in copies.values())
    found = {}
    for which, copy in copies.items():
        like = copy if isinstance(copy, Tensor) else copy[0]
        count = cpu_rounds(together) if like.device.type == "cpu" else rounds(bytes_of(copy))
        found[which] = [copy, *(duplicate(copy) for _ in range(count - 1))]
    return found


def with_branches(copies: Sequence[Copy], branch: Branch | None) -> list[tuple[Copy, Branch | None]]:
    """Each copy of a weight and the branch beside it, which is in other memory too."""
    return [(copy, None if branch is None else duplicate(branch)) for copy in copies]


def duplicate(held: Held) -> Held:
    """The same weight or branch in other memory."""
    if isinstance(held, Tensor):
        copied: Any = held.clone()
        return copied
    parts: Any = [duplicate(part) if isinstance(part, Tensor | Up) else part for part in held]
    return type(held)(*parts)


def _device_name(device: torch.device) -> str:
    # a table of ways that can no longer be taken, or without those that can, is another one
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}-{'mma' if obstacle(device) is None else 'dense'}"
    ways = "expand" if cpu_obstacle() is None else "dense"
    return f"{device.type}-{platform.machine()}-{processor()}-{torch.get_num_threads()}-{ways}"
