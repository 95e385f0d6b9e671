"""What shapes of a model take on a device, from the times of one and two blocks of random weights.

A model of L blocks takes base + L block. A block is what a second one adds to a model of one, both with few words, so
that the head hides nothing, and all blocks are taken to be like it; the base is what remains of a model of one block
with all words. Attention and the feed-forward layer follow one another, so a block is measured with each number of
heads at all channels and with each number of channels at all heads, not with every pair. No more than two blocks are
ever built.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from shearling.anatomy import Anatomy, BlockShape, anatomy_of
from shearling.cache import cache_folder
from shearling.errors import ShearlingError
from shearling.evaluate.speed import device_name
from shearling.evaluate.step_time import Workload, step_milliseconds
from shearling.events import OnEvent
from shearling.files import write_whole
from shearling.plan import Cost, Width, target_anatomy, widths
from shearling.recipe import Target
from shearling.surgery import config_after

#: that are measured at most: of a model's hidden sizes, and of the head counts with each
MOST_HIDDEN, MOST_HEADS = 10, 8
CHANNEL_MULTIPLE = 64
#: words of the models whose blocks are timed
FEW_WORDS = 256
#: to find a second block slower than none
TRIES = 3
FILE = "latency.json"

Item = TypeVar("Item")


class Shape(NamedTuple):
    """A block and the stream it stands in."""

    width: Width
    ffn: int

    @property
    def key(self) -> str:
        return ",".join(map(str, (*self.width, self.ffn)))


#: milliseconds of a step of a model of random weights, made from a config
Timer = Callable[[Any, Workload, torch.dtype, torch.device], float]


@dataclass(frozen=True)
class Latency:
    """Milliseconds by shape: ``base`` of all that lies outside the blocks, ``block`` of one."""

    base: Mapping[int, float]
    block: Mapping[Shape, float]
    workload: Workload
    device: str

    def costs(self) -> dict[Width, Cost]:
        """What each measured width takes, as ``propose_shapes`` wants it.

        Channels between two measured numbers lie on the line between them. More channels never take less, and a share
        of the channels no smaller one of the time, whatever noise says.
        """
        found: dict[Width, Cost] = {}
        for hidden, base in self.base.items():
            here = {shape: time for shape, time in self.block.items() if shape.width.hidden == hidden}
            most = max(shape.ffn for shape in here)
            widest = max((shape.width for shape in here), key=lambda width: width[1:])
            points = sorted((shape.ffn, time) for shape, time in here.items() if shape.width == widest)
            for shape, time in here.items():
                if shape.ffn != most:
                    continue
                less = time - here[Shape(widest, most)]
                added = (max(t + less, time * ffn / most) for ffn, t in points)
                times = list(itertools.accumulate(added, max))
                found[shape.width] = partial(_total, base, [ffn for ffn, _ in points], times)
        return found


def measure_latency(
    config: Any,
    workload: Workload,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    file: Path | None = None,
    timer: Timer = step_milliseconds,
    on_event: OnEvent | None = None,
) -> Latency:
    """Time blocks of a model, made from its config alone, in the widths that it may be cut to.

    Hidden sizes and heads are every second, fourth or so of the grid where it has many. ``file`` (``latency.json`` in
    the cache folder) keeps times by device, torch version, precision, model and workload: nothing is timed twice, also
    after an interruption. Progress goes to ``on_event``. Raises ShearlingError for a model with widths per block, a
    context beyond its learned positions, a file that holds something else, and a device too busy to measure on.
    """
    anatomy, device = anatomy_of(config), torch.device(device)
    target_anatomy(anatomy, Target(layers=anatomy.num_layers))
    file = cache_folder() / FILE if file is None else file
    kept, name = _read(file), device_name(device)
    own = kept.setdefault(_key(config, workload, dtype, name), {})
    grid = list(shapes_to_measure(anatomy))
    bases = {shape.width.hidden: shape for shape in grid if shape.ffn == anatomy.shapes[0].ffn}
    wanted = [("block", shape) for shape in grid] + [("base", shape) for shape in bases.values()]
    missing = [(what, shape) for what, shape in wanted if f"{what} {shape.key}" not in own]
    for done, (what, shape) in enumerate(missing, 1):
        if what == "block":
            small = [_config(config, anatomy, shape, layers, words=FEW_WORDS) for layers in (1, 2)]
            own[f"block {shape.key}"] = _second(lambda of: timer(of, workload, dtype, device), *small)
        else:
            whole = timer(_config(config, anatomy, shape, 1, words=anatomy.vocab), workload, dtype, device)
            own[f"base {shape.key}"] = max(0.0, whole - own[f"block {shape.key}"])
        write_whole(file, json.dumps(kept, indent=1))
        if on_event is not None:
            on_event({"stage": "latency", "done": done, "total": len(missing)})
    return Latency(
        {hidden: own[f"base {shape.key}"] for hidden, shape in bases.items()},
        {shape: own[f"block {shape.key}"] for shape in grid},
        workload,
        name,
    )


def _second(milliseconds: Callable[[Any], float], one: Any, two: Any) -> float:
    """What the second block adds; measured again where that is nothing."""
    for _ in range(TRIES):
        added = milliseconds(two) - milliseconds(one)
        if added > 0:
            return added
    raise ShearlingError(
        "latency: two blocks took no longer than one; measure while the device is idle, or a larger batch or context"
    )


def shapes_to_measure(anatomy: Anatomy) -> Iterator[Shape]:
    """Blocks of the grid: of each hidden size, those with all channels, and those with all heads."""
    full = anatomy.shapes[0].ffn
    quarters = {full * part // 4 // CHANNEL_MULTIPLE * CHANNEL_MULTIPLE for part in (1, 2, 3)}
    channels = sorted({min(full, CHANNEL_MULTIPLE), *quarters, full} - {0})
    by_hidden: dict[int, list[Width]] = {}
    for width in widths(anatomy):
        by_hidden.setdefault(width.hidden, []).append(width)
    for hidden in _every(sorted(by_hidden), MOST_HIDDEN):
        # by heads; the last has all that this hidden size may have
        options = _every(by_hidden[hidden], MOST_HEADS)
        yield from (Shape(width, full) for width in options)
        yield from (Shape(options[-1], ffn) for ffn in channels if ffn != full)


def _every(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many: the last and every second, fourth, eighth before it, so that sizes stay round."""
    step = 1
    while -(-len(items) // step) > most:
        step *= 2
    return list(items[::-1][::step])[::-1]


def _total(base: float, channels: list[int], times: list[float], layers: int, ffn: int) -> float:
    """Base and blocks, whose times lie on lines between those that were measured."""
    right = bisect.bisect_left(channels, ffn)
    if right == 0 or right == len(channels):
        block = times[min(right, len(times) - 1)]
    else:
        part = (ffn - channels[right - 1]) / (channels[right] - channels[right - 1])
        block = times[right - 1] + part * (times[right] - times[right - 1])
    return base + layers * block


def _config(config: Any, anatomy: Anatomy, shape: Shape, layers: int, *, words: int) -> Any:
    """The config of a model with so many blocks of a shape."""
    width = shape.width
    block = BlockShape(ffn=shape.ffn, query_heads=width.heads, kv_heads=width.kv_heads)
    kept = [min(layer, anatomy.num_layers - 1) for layer in range(layers)]
    small = config_after(config, replace(anatomy, hidden=width.hidden, shapes=(block,) * layers), kept)
    small.vocab_size = min(words, anatomy.vocab)
    # it may lie beyond them
    small.pad_token_id = None
    return small


def _key(config: Any, workload: Workload, dtype: torch.dtype, device: str) -> str:
    told = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version", "dtype")}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:12]
    precision = str(dtype).removeprefix("torch.")
    work = ", ".join(f"{name} {value}" for name, value in asdict(workload).items())
    return f"{device}, torch {torch.__version__}, {precision}, {config.model_type} {digest}, {work}"


def _read(file: Path) -> dict[str, dict[str, float]]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {key: {name: float(time) for name, time in times.items()} for key, times in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ShearlingError(f"{file}: holds no latencies; remove it or name another file") from error
