"""From a budget to shapes that meet it: in balance, deeper, shallower, in the full stream, or of whole layers."""

from __future__ import annotations

import bisect
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

from shearling.anatomy import Anatomy, BlockShape, expressible
from shearling.errors import ShearlingError
from shearling.plan.sizes import Inventory, Sizes, inventory_after, sizes
from shearling.plan.target import target_anatomy
from shearling.recipe import Budget, Target

Quantity = Literal["parameters", "bytes", "flops_per_token", "milliseconds"]
#: what so many layers of so many channels cost; more of either never costs less
Cost = Callable[[int, int], float]

#: by which power of the budget's share the layers shrink. Where widths shrink alike, parameters go with layers x
#: width^2: at 0 the widths do it all, at 1/2 half of it falls to the layers
PROFILES = {"balanced": 0.25, "deeper": 0.0, "shallower": 0.5}
#: the same of ``stream``, where hidden and heads stay, so that blocks' parameters go with layers x channels
STREAM = 0.75
#: a shape that leaves more than this share of the budget unused is chosen only where none uses more; not so of
#: milliseconds, where what counts is what is kept, not what is spent
SLACK = 0.01
#: nor one where hidden, heads and ffn keep shares this much apart, whatever it uses: a full-width stream with one head
STRETCH = 2.0


@dataclass(frozen=True)
class Proposal:
    """A shape with all its sizes named, what it weighs, and the ``share`` of the source's quantity that it keeps."""

    name: str
    target: Target
    sizes: Sizes
    share: float
    #: measured, where that is what the budget bounds
    milliseconds: float | None = None

    def row(self) -> tuple[str, ...]:
        """Cells under ``HEADINGS``, and under ``milliseconds`` where they were measured."""
        target = self.target
        shape = (target.layers, target.hidden, target.heads, target.kv_heads, target.ffn)
        measured = () if self.milliseconds is None else (f"{self.milliseconds:.3f}",)
        return self.name, *map(str, shape), f"{self.sizes.parameters:,}", f"{self.share:.3f}", *measured

    def to_json(self) -> dict[str, Any]:
        """Name, target, sizes, share and milliseconds, as ``shearling shapes --json`` prints them."""
        return {**asdict(self), "target": self.target.model_dump()}


#: of the columns of ``Proposal.row``
HEADINGS = ("", *Target.model_fields, "parameters", "share")


class Width(NamedTuple):
    """What of a shape its layers share, but for their channels."""

    hidden: int
    heads: int
    kv_heads: int


def propose_shapes(
    anatomy: Anatomy,
    inventory: Inventory,
    budget: float,
    of: Quantity = "parameters",
    *,
    measured: Mapping[Width, Cost] | None = None,
    hidden_multiple: int = 64,
    ffn_multiple: int = 64,
) -> list[Proposal]:
    """Shapes that use a budget to 1 % where the grid allows and never exceed it: ``balanced`` first, then the others.

    ``stream`` keeps hidden and heads; a quarter of the cut falls to the channels, the rest to the layers. ``depth``
    keeps all widths and as many layers as the budget allows, and may leave up to a layer unused. A shape that profiles
    share is named once.

    ``budget`` below 1 is a share of what the model has, else a number. ``hidden`` and ``ffn`` are multiples, or stay;
    where the config states no head_dim, ``hidden`` is heads x head_dim. A budget of ``milliseconds`` needs what was
    ``measured``: the cost by width, the model's own among them; only those widths are proposed. Time need not go with
    size, so there shapes are chosen that keep many parameters, also where they leave time unused. Raises ShearlingError
    for milliseconds that were not measured, and for a budget that is not below the model's own, or that no shape of the
    grid meets.
    """
    found, costs, whole = _by_profile(anatomy, inventory, budget, of, measured, hidden_multiple, ffn_multiple)
    names: dict[Target, str] = {}
    for name, target in found.items():
        names.setdefault(target, name)
    proposals = []
    for target, name in names.items():
        after = target_anatomy(anatomy, target)
        weighed = sizes(inventory_after(inventory, anatomy, after, range(after.num_layers)), after)
        cost = costs[Width(after.hidden, after.shapes[0].query_heads, after.shapes[0].kv_heads)]
        spent = cost(after.num_layers, after.shapes[0].ffn)
        milliseconds = spent if of == "milliseconds" else None
        proposals.append(Proposal(name, target, weighed, spent / whole, milliseconds))
    return proposals


def resolve_target(
    anatomy: Anatomy, inventory: Inventory, target: Target | Budget, measured: Mapping[Width, Cost] | None = None
) -> Target:
    """The shape that a target means for a model, which anatomy and inventory are of: itself, or the budget's profile.

    ``measured`` as in ``propose_shapes``. Raises ShearlingError as that does, and for a profile that has no shape.
    """
    if isinstance(target, Target):
        return target
    found, _, _ = _by_profile(anatomy, inventory, target.amount, target.of, measured)
    if target.profile not in found:
        raise ShearlingError(
            f"target.profile = {target.profile!r}: this budget has only {', '.join(found)}; choose one of them"
        )
    shape = found[target.profile]
    # widths that stay are not named
    return Target(layers=shape.layers) if target.profile == "depth" else shape


def _by_profile(
    anatomy: Anatomy,
    inventory: Inventory,
    budget: float,
    of: Quantity,
    measured: Mapping[Width, Cost] | None,
    hidden_multiple: int = 64,
    ffn_multiple: int = 64,
) -> tuple[dict[str, Target], dict[Width, Cost], float]:
    """The shape of every profile that has one, what widths cost, and what the whole model does; cf. propose_shapes."""
    target_anatomy(anatomy, Target(layers=anatomy.num_layers))
    # all blocks are alike
    counted = {name: size for name, size in inventory.items() if anatomy.layer_of(name) in (None, 0)}
    costs: dict[Width, Cost]
    parameters: dict[Width, Cost] | None = None
    if of == "milliseconds":
        if measured is None:
            raise ShearlingError(f"budget = {budget:g} {of}: needs the model measured first (measure_latency)")
        costs = dict(measured)
        parameters = {width: _counted(anatomy, counted, width, "parameters") for width in costs}
    else:
        costs = {width: _counted(anatomy, counted, width, of) for width in widths(anatomy, hidden_multiple)}
    source = anatomy.shapes[0]
    own = costs[_own_width(anatomy)]
    whole = own(anatomy.num_layers, source.ffn)
    wanted = budget * whole if budget < 1 else budget
    if not (0 < wanted < whole and (wanted >= 1 or of == "milliseconds")):
        raise ShearlingError(
            f"budget = {budget:g} {of}: must be above 0 and below the {_number(whole)} that the model has"
        )
    allowed = wanted if of == "milliseconds" else math.floor(wanted)
    depths = {name: anatomy.num_layers * (allowed / whole) ** power for name, power in PROFILES.items()}

    def fits(reach: int) -> dict[str, Target]:
        shapes = {
            name: _fit(anatomy, costs, parameters, allowed, depth, reach, ffn_multiple)
            for name, depth in depths.items()
        }
        return {name: target for name, target in shapes.items() if target is not None}

    # where no depth near a profile's allows any, all are tried
    found = fits(1) or fits(anatomy.num_layers)
    if not found:
        least = min(cost(1, min(ffn_multiple, source.ffn)) for cost in costs.values())
        raise ShearlingError(
            f"budget = {budget:g} {of}: the smallest shape of this grid has {_number(least)}; allow more"
        )
    kept = None if parameters is None else parameters[_own_width(anatomy)]
    full = _full_stream(anatomy, own, kept, allowed, ffn_multiple)
    if full is not None:
        found["stream"] = full
    layers = bisect.bisect_right(range(1, anatomy.num_layers), allowed, key=lambda layers: own(layers, source.ffn))
    if layers:
        found["depth"] = Target(layers=layers, ffn=source.ffn, **_own_width(anatomy)._asdict())
    return found, costs, whole


def _own_width(anatomy: Anatomy) -> Width:
    return Width(anatomy.hidden, anatomy.shapes[0].query_heads, anatomy.shapes[0].kv_heads)


def widths(anatomy: Anatomy, hidden_multiple: int = 64) -> Iterator[Width]:
    """Widths of the grid, narrow ones first: whole KV groups go, or equally many query heads of each, never both."""
    source = anatomy.shapes[0]
    ratio = source.query_heads // source.kv_heads
    # where query heads share one, engines split KV heads over devices: a divisor of what was splits as evenly
    groups = [g for g in range(1, source.kv_heads + 1) if ratio == 1 or source.kv_heads % g == 0]
    heads = {(g * ratio, g) for g in groups} | {(each * source.kv_heads, source.kv_heads) for each in range(1, ratio)}
    multiple = hidden_multiple if "head_dim" in anatomy.family.config else anatomy.head_dim
    hidden = {*range(multiple, anatomy.hidden, multiple), anatomy.hidden}
    for size, (query, kv) in itertools.product(sorted(hidden), sorted(heads)):
        shapes = (replace(source, query_heads=query, kv_heads=kv),)
        if expressible(replace(anatomy, hidden=size, shapes=shapes)):
            yield Width(size, query, kv)


def _counted(anatomy: Anatomy, inventory: Inventory, width: Width, of: Quantity) -> Cost:
    """What a width weighs in L layers of F channels: base + L (block + F channel)."""

    def count(layers: int, ffn: int) -> int:
        block = BlockShape(ffn=ffn, query_heads=width.heads, kv_heads=width.kv_heads)
        after = replace(anatomy, hidden=width.hidden, shapes=(block,) * layers)
        return getattr(sizes(inventory_after(inventory, anatomy, after, range(layers)), after), of)

    base, block, channel = count(0, 0), count(1, 0), count(1, 1)
    return lambda layers, ffn: base + layers * (block - base + ffn * (channel - block))


def _fit(
    anatomy: Anatomy,
    costs: Mapping[Width, Cost],
    parameters: Mapping[Width, Cost] | None,
    allowed: float,
    depth: float,
    reach: int,
    multiple: int,
) -> Target | None:
    """The shape that uses enough of the budget and keeps the source's proportions best, within ``reach`` of a depth.

    With ``parameters``, what it keeps of them counts instead of what it uses: half of them as much as a shape twice
    out of proportion. No shape is taken then that another has all of and more.
    """
    source = anatomy.shapes[0]
    low, high = max(1, math.floor(depth) - reach), min(anatomy.num_layers, math.ceil(depth) + reach)
    channels = [*range(multiple, source.ffn, multiple), source.ffn]
    keys: dict[tuple[int, ...], tuple[float, ...]] = {}
    for layers, (width, cost) in itertools.product(range(low, high + 1), costs.items()):
        ffn = _most_channels(channels, cost, layers, allowed)
        if not ffn:
            continue
        kept = (width.hidden / anatomy.hidden, width.heads / source.query_heads, ffn / source.ffn)
        stretched = max(kept) / min(kept)
        distortion = math.log(stretched) + abs(math.log(layers / depth))
        # equal ones: the more KV heads, then the more layers and the wider stream
        rest = (-width.kv_heads, -layers, -width.hidden)
        if parameters is None:
            chosen = (max(1 - cost(layers, ffn) / allowed, SLACK), distortion)
        else:
            chosen = (distortion - math.log(parameters[width](layers, ffn)),)
        keys[layers, *width, ffn] = (stretched > STRETCH, *chosen, *rest)
    if not keys:
        return None
    best = min(keys, key=keys.__getitem__)
    if parameters is not None:
        # more of one size alone is out of proportion, but where it is free it does no harm
        while more := [sizes for sizes in keys if sizes != best and all(map(operator.ge, sizes, best))]:
            best = min(more, key=keys.__getitem__)
    layers, *width, ffn = best
    return Target(layers=layers, ffn=ffn, **Width(*width)._asdict())


def _full_stream(anatomy: Anatomy, own: Cost, kept: Cost | None, allowed: float, multiple: int) -> Target | None:
    """The shape in the model's own ``hidden`` and heads, which cost ``own``; None where the budget is too small for it.

    With ``kept``, their parameters, these count instead of what is used.
    """
    source, layers = anatomy.shapes[0].ffn, anatomy.num_layers
    # what is spent outside of blocks, by one block and two
    outside = 2 * own(1, source) - own(2, source)
    if allowed <= outside:
        return None
    depth = layers * ((allowed - outside) / (own(layers, source) - outside)) ** STREAM
    channels = [*range(multiple, source, multiple), source]
    near = range(max(1, math.floor(depth) - 1), min(layers, math.ceil(depth) + 1) + 1)
    numbers = near if kept is None else range(1, layers + 1)
    filled = [(number, _most_channels(channels, own, number, allowed)) for number in numbers]
    shapes = [(number, ffn) for number, ffn in filled if ffn]
    if not shapes:
        return None

    def worse(shape: tuple[int, int]) -> tuple[float, float]:
        unlike = abs(math.log(shape[0] / depth))
        if kept is None:
            return max(1 - own(*shape) / allowed, SLACK), unlike
        return unlike - math.log(kept(*shape)), 0.0

    number, ffn = min(shapes, key=worse)
    return Target(layers=number, ffn=ffn, **_own_width(anatomy)._asdict())


def _most_channels(channels: Sequence[int], cost: Cost, layers: int, allowed: float) -> int:
    """The most of ``channels``, ascending, that so many layers may have; 0 where even the fewest cost too much."""
    fitting = bisect.bisect_right(channels, allowed, key=partial(cost, layers))
    return channels[fitting - 1] if fitting else 0


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
