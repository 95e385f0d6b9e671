"""What 2:4 is worth where it runs: linear layers of two models, dense against 2:4 and 2:4 in 4 bits.

    python benchmarks/sparse_runtime.py --check
    python benchmarks/sparse_runtime.py --tune --table FILE [--json FILE]
    python benchmarks/sparse_runtime.py --table FILE [--json FILE]

The first compares every way with the dense product. The second times every way for a few tokens (``--tokens``), with
low-rank branches and without, prints the best beside dense, which then has the branch too, and keeps all in the table.
The third times, for every shape and number of tokens, dense cuBLAS, cuSPARSELt, our kernels, those with a branch and
those in 4 bits, by the table's best for each, then what the table takes ("fallback"), and sums them over a layer; rows
"each alone" do without the early start of kernels. ``--ways`` times only some.

On a CPU (``--device cpu``) the third has dense, our kernel, that with values in 4 bits, and what the table takes, in
float32 and bfloat16, for 1 and 4 tokens. All ways take turns, over more copies of a weight than the caches hold.
"least" is the shortest of the replays and "of least" its ratio, for a machine that does other work too.

On a GPU every number is of a CUDA graph that goes round over as many copies of a weight as leave none of it in L2:
the median of the replays, with their tenth and ninetieth hundredths. ``--quick`` takes tiny shapes, to try it out.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path as File
from typing import Any

import torch
from common import Rows, device_name

from shearling.kernels.compiled_c import processor
from shearling.kernels.nvrtc import obstacle
from shearling.kernels.product24 import Config, compile_all, configs
from shearling.runtime import (
    COPIES,
    TOKENS,
    Beside,
    Branch,
    Key,
    Path,
    Table,
    copy_of,
    measure_table,
    paths,
    product,
    random_24,
    random_branch,
)
from shearling.runtime.paths import bytes_of
from shearling.runtime.table import several, with_branches
from shearling.runtime.timing import interleaved, summary, timed_ways

#: linears of a layer as (outputs, inputs), and how many there are
LAYERS = {
    "LLaMA-2-7B": {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1},
    "Llama-3-8B": {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1},
}
#: of a CPU
SMALL_LAYERS = {
    "LLaMA-2-7B": LAYERS["LLaMA-2-7B"],
    "SmolLM2-135M": {(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1},
}
TINY = {"tiny": {(64, 256): 2, (32, 384): 1}}
#: names of ways that are ours
OURS = ("mma", "expand")
FEW = (1, 2, 4, 8, 16)
#: inputs that share a scale in 4 bits, and where these do not fill a weight's inputs
GROUP, SMALL_GROUP = 128, 64
#: inputs that a branch sums up
BLOCK = 16
Seconds = dict[tuple[str, tuple[int, int], int], float]
COLUMNS = [
    "what",
    "dtype",
    "shape",
    "tokens",
    "way",
    "us",
    "low",
    "high",
    "ratio",
    "least",
    "of least",
    "bytes",
    "device",
]


def group_of(shape: tuple[int, int]) -> int:
    """Inputs that share a scale of such a weight in 4 bits."""
    return SMALL_GROUP if shape[1] % GROUP else GROUP


def besides(shape: tuple[int, int]) -> dict[str, Beside]:
    """The branches that are timed beside such a weight."""
    rank = shape[1] // BLOCK
    return {"branch": Beside(rank, BLOCK), "INT8 branch": Beside(rank, BLOCK, 8)}


def table_of(file: File | None, device: torch.device) -> Table:
    """What a file says of a device, or an empty table; SystemExit where it was measured on another one."""
    name = device_name(device) if device.type == "cuda" else f"{device_name(device)}, {processor()}"
    table = Table.load(file) if file and file.exists() else Table(name, torch.__version__)
    if table.device != name:
        raise SystemExit(f"{file}: was measured on {table.device}, this is {name}")
    return table


class Bench:
    """A device, the table of what is fastest on it, and the rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.gpu = self.device.type == "cuda"
        self.dtypes = (torch.bfloat16,) if self.gpu else (torch.float32, torch.bfloat16)
        self.dtype = torch.bfloat16
        self.layers = TINY if args.quick else LAYERS if self.gpu else SMALL_LAYERS
        few = (1, 2, 16) if args.quick else TOKENS if self.gpu else (1, 4)
        self.tokens: tuple[int, ...] = tuple(args.tokens or few)
        self.replays = 3 if args.quick else 100
        self.ways: list[str] | None = args.ways
        self.file: File | None = args.table
        self.table = table_of(args.table, self.device)
        self.name = self.table.device
        self.rows = Rows(COLUMNS, args.json)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return list(dict.fromkeys(shape for layer in self.layers.values() for shape in layer))

    @property
    def few(self) -> list[int]:
        return [count for count in self.tokens if count <= max(FEW)]

    def kinds(self, shape: tuple[int, int]) -> list[tuple[str, int, Beside | None]]:
        """What ours are timed on: (name, inputs that share a scale in 4 bits or 0, branch); branches on a GPU alone."""
        branches = besides(shape) if self.gpu else {}
        return [
            (name, group, beside)
            for of, group in (("2:4", 0), ("2:4 INT4", group_of(shape)))
            for name, beside in [(of, None), *((f"{of} and {what}", beside) for what, beside in branches.items())]
        ]

    def key(self, shape: tuple[int, int], tokens: int, group: int = 0, beside: Beside | None = None) -> Key:
        return Key(*shape, self.dtype_name, group, tokens, beside)

    def measure(
        self, shape: tuple[int, int], tokens: Sequence[int], group: int, beside: Beside | None, every: bool = False
    ) -> None:
        """Have the table gain what it lacks, or with ``every`` all of it."""
        measure_table(
            [shape],
            device=self.device,
            dtype=self.dtype,
            group=group,
            beside=beside,
            tokens=tokens,
            table=self.table,
            replays=3 if self.replays < 10 else 20,
            every=every,
            ways=self.ways,
        )

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def keep(self) -> None:
        if self.file is not None:
            self.table.save(self.file)


def check(bench: Bench) -> None:
    """Every way against the dense product in float64, alone and with branches; raises SystemExit where one is wrong."""
    wrong = 0
    for shape in bench.shapes:
        weight_OI = random_24(*shape, bench.dtype, bench.device)
        branches: dict[str, Branch | None] = {"": None}
        # one is of another rank than the blocks have, which t is multiplied for
        for what, beside in {**besides(shape), "low rank": Beside(72, 0)}.items():
            branches[what] = random_branch(*shape, beside, weight_OI, list(COPIES.values()))
        for group in (0, group_of(shape)):
            copies: Any = {"dense": copy_of("dense", weight_OI, group)}
            ups = [None if branch is None else branch.fragments for branch in branches.values()]
            if obstacle(bench.device) is None:
                copies["fragments"] = copy_of("fragments", weight_OI, group)
                compile_all(
                    copies["fragments"],
                    [(c, m, up) for m in bench.few for c in configs(*shape, m, group > 0) for up in ups],
                )
            for tokens in bench.few:
                x_MI = torch.randn(tokens, shape[1], device=bench.device).to(bench.dtype)
                x, wide = x_MI.double(), copies["dense"].double()
                exact = {
                    what: x @ wide.T if b is None else x @ wide.T + x @ b.down.double().T @ b.up.double().T
                    for what, b in branches.items()
                }
                for path in paths(*shape, tokens, weight_OI, group, bench.ways):
                    kind = COPIES[path.name]
                    if kind not in copies:
                        copies[kind] = copy_of(kind, weight_OI, group)
                    for what, branch in branches.items():
                        found = product(path, x_MI, copies[kind], branch)
                        error = float((found.double() - exact[what]).norm() / exact[what].norm())
                        # one rounding to bfloat16 is 2e-3, and the 8 bits of an adapter are not in what is exact
                        if not error < (2e-2 if what == "INT8 branch" else 5e-3):
                            wrong += 1
                            way = " ".join(map(str, (path.name, *path.option)))
                            what = f"WRONG {what} {group=}"
                            bench.rows.add(
                                what=what, dtype=bench.dtype_name, shape=shape, tokens=tokens, way=way, ratio=error
                            )
        print(f"# {shape} {bench.dtype_name}: checked, {wrong} wrong so far", flush=True)
    if wrong:
        raise SystemExit(f"{wrong} products are wrong")


def tune(bench: Bench) -> None:
    """Every way for few tokens; the best three of ours are printed beside dense, which has the branch too."""
    for shape in bench.shapes:
        for what, group, beside in bench.kinds(shape):
            for tokens in bench.few:
                bench.measure(shape, [tokens], group, beside, every=True)
                found = bench.table.times[bench.key(shape, tokens, group, beside)]
                dense = found[Path("dense")]
                ranked = sorted(found.items(), key=lambda pair: pair[1].seconds)
                for path, timing in [(Path("dense"), dense), *[p for p in ranked if p[0].name in OURS][:3]]:
                    report(bench, what, shape, tokens, path, timing, dense.seconds)
        bench.keep()


def report(bench: Bench, what: str, shape: Any, tokens: int, path: Path | None, timing: Any, dense: float, **more: Any):
    """A row; ``ratio`` is how many times as fast as dense."""
    bench.rows.add(
        what=what,
        dtype=bench.dtype_name,
        shape="x".join(map(str, shape)) if isinstance(shape, tuple) else shape,
        tokens=tokens,
        way="" if path is None else " ".join(map(str, (path.name, *path.option))),
        us=timing.seconds * 1e6,
        low=timing.low * 1e6,
        high=timing.high * 1e6,
        ratio=dense / timing.seconds,
        device=bench.name,
        **more,
    )


def shapes(bench: Bench) -> None:
    """All rows of all shapes, then their sums over layers."""
    found: Seconds = {}
    found_least: Seconds = {}
    for shape in bench.shapes:
        kinds = bench.kinds(shape)
        # what has not been tuned for as many tokens has few ways
        for _, group, beside in kinds:
            bench.measure(shape, bench.few if group or beside else bench.tokens, group, beside)
        bench.keep()
        weight_OI = random_24(*shape, bench.dtype, bench.device)
        branches = {
            beside: None if beside is None else random_branch(*shape, beside, weight_OI, list(COPIES.values()))
            for beside in dict.fromkeys(beside for _, _, beside in kinds)
        }
        copies: dict[tuple[str, int], list[Any]] = {}
        for tokens in bench.tokens:
            x_MI = torch.randn(tokens, shape[1], device=bench.device).to(bench.dtype)
            rows = variants(bench, shape, tokens)
            wanted = dict.fromkeys((COPIES[path.name], group) for _, path, group, _ in rows)
            missing = [pair for pair in wanted if pair not in copies]
            copies |= several({pair: copy_of(pair[0], weight_OI, pair[1]) for pair in missing})
            steps, size = {}, {}
            for what, path, group, beside in rows:
                of, branch = copies[COPIES[path.name], group], branches[beside]
                steps[what] = [partial(product, path, x_MI, *pair) for pair in with_branches(of, branch)]
                size[what] = bytes_of(of[0]) + branch_bytes(branch)
            least: dict[str, float] = {}
            if bench.gpu:
                timings = timed_ways(steps, bench.device, bench.replays)
            else:
                seconds = interleaved(steps, bench.replays)
                timings = {what: summary(times) for what, times in seconds.items()}
                least = {what: min(times) for what, times in seconds.items()}
            for what, path, _, _ in rows:
                found[what, shape, tokens] = timings[what].seconds
                dense = timings["dense"].seconds
                more = {"least": least[what] * 1e6, "of least": least["dense"] / least[what]} if least else {}
                found_least[what, shape, tokens] = least.get(what, 0.0)
                report(bench, what, shape, tokens, path, timings[what], dense, bytes=size[what], **more)
    sums(bench, found, found_least)


def branch_bytes(branch: Branch | None) -> int:
    """What of a branch is read from memory; that of a block mean is only S."""
    return 0 if branch is None or branch.fragments is None else branch.fragments.bytes


def variants(bench: Bench, shape: tuple[int, int], tokens: int) -> list[tuple[str, Path, int, Beside | None]]:
    """What is timed: (name, way, inputs that share a scale in 4 bits or 0, branch)."""

    def fastest(names: tuple[str, ...], group: int = 0, beside: Beside | None = None) -> Path | None:
        times = bench.table.times.get(bench.key(shape, tokens, group, beside), {})
        return min((p for p in times if p.name in names), key=lambda p: times[p].seconds, default=None)

    rows: list[tuple[str, Path | None, int, Beside | None]] = [("dense", Path("dense"), 0, None)]
    if bench.gpu:
        rows.append(("dense, decompressed", fastest(("decompress", "unpack")), 0, None))
        rows.append(("cuSPARSELt", fastest(("cusparselt",)), 0, None))
    for what, group, beside in bench.kinds(shape):
        ours = fastest(OURS, group, beside)
        rows.append((what, ours, group, beside))
        if bench.gpu and beside is None:
            rows.append((f"{what}, each alone", alone(ours), group, None))
    # the two copies of a weight that are fastest at some number of tokens
    rows.append(("fallback", bench.table.best(bench.key(shape, tokens)), 0, None))
    return [(what, path, group, beside) for what, path, group, beside in rows if path is not None]


def alone(path: Path | None) -> Path | None:
    """A way of a GPU without the start before the kernel before has ended."""
    if path is None:
        return None
    return Path(path.name, tuple(Config(*path.option)._replace(early=False)))  # pyrefly: ignore[bad-argument-type]


def sums(bench: Bench, found: Seconds, found_least: Seconds) -> None:
    """Rows of a whole layer's linears, where all of them have been timed."""
    for model, layer in bench.layers.items():
        totals: dict[tuple[str, int], float] = defaultdict(float)
        least: dict[tuple[str, int], float] = defaultdict(float)
        seen: dict[tuple[str, int], int] = defaultdict(int)
        for (what, shape, tokens), seconds in found.items():
            if shape in layer:
                totals[what, tokens] += seconds * layer[shape]
                least[what, tokens] += found_least[what, shape, tokens] * layer[shape]
                seen[what, tokens] += 1
        for (what, tokens), seconds in sorted(totals.items(), key=lambda item: item[0][1]):
            if seen[what, tokens] == len(layer):
                dense, shortest = totals["dense", tokens], least[what, tokens]
                more = {"least": shortest * 1e6, "of least": least["dense", tokens] / shortest} if shortest else {}
                bench.rows.add(
                    what=what,
                    dtype=bench.dtype_name,
                    shape=model,
                    tokens=tokens,
                    way="sum",
                    us=seconds * 1e6,
                    ratio=dense / seconds,
                    **more,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=File, help="file for the rows")
    parser.add_argument("--table", type=File, help="file of measured ways, read and written")
    parser.add_argument("--check", action="store_true", help="compare every way with the dense product first")
    parser.add_argument("--tune", action="store_true", help="time every way for few tokens")
    parser.add_argument("--ways", nargs="*", choices=sorted(COPIES), help="time these alone, beside dense")
    parser.add_argument("--tokens", type=int, nargs="*", help="numbers of tokens")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    bench = Bench(args)
    work = check if args.check else tune if args.tune else shapes
    for dtype in bench.dtypes:
        bench.dtype = dtype
        work(bench)


if __name__ == "__main__":
    main()
