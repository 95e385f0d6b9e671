"""Models side by side: one after another in every round, so that a drift of the machine meets all of them alike."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from shearling.errors import ShearlingError
from shearling.evaluate.energy import EnergyCounter
from shearling.events import OnEvent
from shearling.usage import Usage, held_bytes, return_freed

#: of decoding, over which joules are counted: counters of GPUs move every tenth of a second or so
ENERGY_SECONDS = 2.0


class Cell(NamedTuple):
    """What is run: ``batch`` prompts of ``context`` tokens each, then ``generate`` steps of one token a row."""

    batch: int
    context: int
    generate: int


class Prefill(NamedTuple):
    """Seconds of one pass over the prompts, and from prompts to first tokens in host memory."""

    seconds: float
    first_token: float


class Engine(Protocol):
    """A loaded model that can be run on cells, one at a time."""

    name: str
    runner: str
    parameters: int
    disk_bytes: int
    #: of the weights as they are held; None where the memory that the engine takes cannot be told
    weight_bytes: int | None
    note: str

    def check(self, cell: Cell) -> None:
        """Raise ShearlingError for a cell that the model cannot run."""

    def prepare(self, cell: Cell) -> None:
        """Make what the cell needs: prompts, a cache, a graph."""

    def prefill(self) -> Prefill:
        """Read the prompts once."""

    def decode(self) -> list[float]:
        """Seconds of every step after the prompts; may be called again and starts at their end each time."""

    def release(self) -> None:
        """Drop what ``prepare`` made."""


@dataclass(frozen=True)
class Percentiles:
    """Seconds that half, nine tenths and 99 hundredths of the samples stay within."""

    p50: float
    p90: float
    p99: float


def percentiles(samples: Iterable[float]) -> Percentiles:
    """Linear between the two nearest samples, as numpy has it; at least one sample."""
    ordered = sorted(samples)
    return Percentiles(*(_quantile(ordered, share) for share in (0.5, 0.9, 0.99)))


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Measured:
    """A model on a cell; tokens a second are over the whole batch, by the median of the repeats.

    ``peak_bytes`` is what the model would hold at most if it were alone (allocations on CUDA, elsewhere resident
    memory of the process).
    """

    prefill: Percentiles
    first_token: Percentiles
    decode: Percentiles
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_bytes: int | None
    joules_per_token: float | None


def summary(
    cell: Cell,
    prefills: Sequence[Prefill],
    decodes: Sequence[Sequence[float]],
    peak_bytes: int | None = None,
    joules_per_token: float | None = None,
) -> Measured:
    """What the samples of a cell come to; ``decodes`` holds the seconds of every step of every repeat."""
    reading = percentiles(prefill.seconds for prefill in prefills)
    return Measured(
        prefill=reading,
        first_token=percentiles(prefill.first_token for prefill in prefills),
        decode=percentiles(itertools.chain.from_iterable(decodes)),
        prefill_tokens_per_second=cell.batch * cell.context / reading.p50,
        decode_tokens_per_second=cell.batch * cell.generate / statistics.median(map(sum, decodes)),
        peak_bytes=peak_bytes,
        joules_per_token=joules_per_token,
    )


def measure_cells(
    engines: Sequence[Engine],
    cells: Sequence[Cell],
    *,
    repeats: int,
    energy: EnergyCounter | None = None,
    on_event: OnEvent | None = None,
) -> list[list[Measured]]:
    """All engines on every cell, by cell and engine: in each repeat all take their turn, after one that is not counted.

    With ``energy`` every engine then decodes for two seconds more, over which joules are counted. Raises ShearlingError
    for sizes below 1 and, before anything runs, for a cell that one of the models cannot run.
    """
    check_sizes(cells, repeats)
    for engine in engines:
        for cell in cells:
            engine.check(cell)
    smallest = min(cells, key=lambda cell: cell.batch * cell.context)
    for engine in engines:
        # what libraries allocate and compile once would else be counted to the first model
        _turn(engine, smallest)
        engine.release()
    found = []
    for number, cell in enumerate(cells):
        found.append(_measure_cell(engines, cell, repeats, energy))
        if on_event is not None:
            on_event({"stage": "bench", "done": number + 1, "total": len(cells)})
    return found


def check_sizes(cells: Iterable[Cell], repeats: int) -> None:
    """Raise ShearlingError for sizes below 1."""
    for cell in cells:
        for name, value in {**cell._asdict(), "repeats": repeats}.items():
            if value < 1:
                raise ShearlingError(f"bench: {name} {value} must be at least 1")


def _measure_cell(engines: Sequence[Engine], cell: Cell, repeats: int, energy: EnergyCounter | None) -> list[Measured]:
    try:
        runs = [_Run(engine, cell) for engine in engines]
        for _ in range(repeats):
            for run in runs:
                run.turn()
        return [run.measured(energy) for run in runs]
    finally:
        for engine in engines:
            engine.release()


def _turn(engine: Engine, cell: Cell) -> None:
    """One turn that is not counted."""
    engine.prepare(cell)
    engine.prefill()
    engine.decode()


class _Run:
    """An engine on a cell, and the samples so far."""

    def __init__(self, engine: Engine, cell: Cell) -> None:
        self._engine, self._cell = engine, cell
        self._prefills: list[Prefill] = []
        self._decodes: list[list[float]] = []
        return_freed()
        before = held_bytes()
        with Usage() as usage:
            _turn(engine, cell)
        self._state = held_bytes() - before
        self._added = usage.peak_bytes - before

    def turn(self) -> None:
        before = held_bytes()
        with Usage() as usage:
            self._prefills.append(self._engine.prefill())
            self._decodes.append(self._engine.decode())
        # others hold memory meanwhile, so only what this turn adds is its own
        self._added = max(self._added, self._state + usage.peak_bytes - before)

    def measured(self, energy: EnergyCounter | None) -> Measured:
        weights = self._engine.weight_bytes
        return summary(
            self._cell,
            self._prefills,
            self._decodes,
            None if weights is None else weights + self._added,
            None if energy is None else self._joules_per_token(energy),
        )

    def _joules_per_token(self, energy: EnergyCounter) -> float:
        steps: list[float] = []
        before = energy.read()
        while sum(steps) < ENERGY_SECONDS:
            steps += self._engine.decode()
        return energy.joules(before, energy.read()) / (len(steps) * self._cell.batch)


@dataclass(frozen=True)
class Subject:
    """What a model is, whatever it is run on."""

    name: str
    runner: str
    parameters: int
    disk_bytes: int
    note: str


@dataclass(frozen=True)
class Bench:
    """All that was measured: ``rows[cell][model]``; the first model is what the others are compared with."""

    subjects: Sequence[Subject]
    cells: Sequence[Cell]
    rows: Sequence[Sequence[Measured]]
    repeats: int
    device: str
    dtype: str
    energy: str | None
    versions: Mapping[str, str]

    def ratios(self, cell: int, model: int) -> dict[str, float | None]:
        """A model's numbers over those of the first, for one cell; None where either is not known."""
        own, first = (self._compared(cell, number) for number in (model, 0))
        return {name: _ratio(own[name], first[name]) for name in own}

    def _compared(self, cell: int, model: int) -> dict[str, float | None]:
        subject, row = self.subjects[model], self.rows[cell][model]
        return {
            "prefill_tokens_per_second": row.prefill_tokens_per_second,
            "decode_tokens_per_second": row.decode_tokens_per_second,
            "first_token": row.first_token.p50,
            "peak_bytes": row.peak_bytes,
            "joules_per_token": row.joules_per_token,
            "disk_bytes": subject.disk_bytes,
            "parameters": subject.parameters,
        }

    def to_json(self) -> dict[str, Any]:
        """Seconds, bytes, joules; ``results`` has one entry for each cell and model."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "repeats": self.repeats,
            "energy": self.energy,
            "versions": dict(self.versions),
            "models": [asdict(subject) for subject in self.subjects],
            "results": [
                {
                    "model": model,
                    "name": self.subjects[model].name,
                    **cell._asdict(),
                    **asdict(row),
                    "ratios": self.ratios(number, model),
                }
                for number, cell in enumerate(self.cells)
                for model, row in enumerate(self.rows[number])
            ],
        }


def _ratio(own: float | None, first: float | None) -> float | None:
    return None if own is None or not first else own / first
