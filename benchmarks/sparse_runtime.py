"""What 2:4 is worth where it runs: linear layers of two models, dense against 2:4 and 2:4 in 4 bits.

    python benchmarks/sparse_runtime.py --check
    python benchmarks/sparse_runtime.py --tune --table FILE [--json FILE]
    python benchmarks/sparse_runtime.py --table FILE [--json FILE]

The first compares every way with the dense product. The second times every way for a few tokens (``--tokens``),
prints the best and keeps all in the table. The third times, for every shape and number of tokens, dense cuBLAS,
cuSPARSELt, our kernels, those with a low-rank branch and those in 4 bits, by the table's best, then what the table
takes ("fallback"), and sums them over a layer; rows "each alone" do without the early start of kernels. ``--ways``
times only some.

On a CPU (``--device cpu``) the third has dense, our kernel, that with values in 4 bits, and what the table takes, in
float32 and bfloat16, for 1 and 4 tokens. All ways take turns, over more copies of a weight than the caches hold.
"least" is the shortest of the replays and "of least" its ratio, for a machine that does other work too.

On a GPU every number is of a CUDA graph that goes round over as many copies of a weight as leave none of it in L2:
the median of the replays, with their tenth and ninetieth hundredths. ``--quick`` takes tiny shapes, to try it out.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from functools import partial
from pathlib import Path as File
from typing import Any

import torch
from common import Rows, device_name

from shearling.kernels.compiled_c import processor
from shearling.kernels.nvrtc import obstacle
from shearling.kernels.product24 import Config, compile_all, configs
from shearling.methods.slorb import block_mean
from shearling.runtime import (
    COPIES,
    TOKENS,
    Branch,
    Key,
    Path,
    Table,
    branch_of,
    copy_of,
    measure_table,
    paths,
    product,
    random_24,
)
from shearling.runtime.paths import bytes_of
from shearling.runtime.table import several
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

    def key(self, shape: tuple[int, int], tokens: int, group: int = 0) -> Key:
        return Key(*shape, self.dtype_name, group, tokens)

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
        down, up = (factor.to(bench.dtype) for factor in block_mean(weight_OI.float(), 16))
        # of another rank than the blocks have, which t is multiplied for
        low = [torch.randn(*size, device=bench.device).to(bench.dtype) / 8 for size in ((72, shape[1]), (shape[0], 72))]
        kinds = list(COPIES.values())
        branches: dict[str, Branch | None] = {
            "": None,
            "branch": branch_of(down, up.contiguous(), kinds),
            "INT8 branch": branch_of(down, up.contiguous(), kinds, eight_bits=True),
            "low rank": branch_of(*low, kinds),
        }
        for group in (0, group_of(shape)):
            copies: Any = {"dense": copy_of("dense", weight_OI, group)}
            few = [count for count in bench.tokens if count <= max(FEW)]
            ups = [None if branch is None else branch.fragments for branch in branches.values()]
            if obstacle(bench.device) is None:
                copies["fragments"] = copy_of("fragments", weight_OI, group)
                compile_all(
                    copies["fragments"], [(c, m, up) for m in few for c in configs(*shape, m, group > 0) for up in ups]
                )
            for tokens in few:
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
    """Every way for few tokens; the best three of ours are printed beside dense."""
    for shape in bench.shapes:
        for group in (0, group_of(shape)):
            for tokens in [count for count in bench.tokens if count <= max(FEW)]:
                measure_table(
                    [shape],
                    device=bench.device,
                    dtype=bench.dtype,
                    group=group,
                    tokens=[tokens],
                    table=bench.table,
                    replays=3 if bench.replays < 10 else 20,
                    every=True,
                    ways=bench.ways,
                )
                found = bench.table.times[bench.key(shape, tokens, group)]
                dense = found[Path("dense")]
                ranked = sorted(found.items(), key=lambda pair: pair[1].seconds)
                for path, timing in [(Path("dense"), dense), *[p for p in ranked if p[0].name in OURS][:3]]:
                    report(bench, "INT4" if group else "2:4", shape, tokens, path, timing, dense.seconds)
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
        # what has not been tuned for as many tokens has few ways
        measure_table(
            [shape],
            device=bench.device,
            dtype=bench.dtype,
            tokens=bench.tokens,
            table=bench.table,
            replays=20,
            ways=bench.ways,
        )
        few = [count for count in bench.tokens if count <= max(FEW)]
        if few:
            measure_table(
                [shape],
                device=bench.device,
                dtype=bench.dtype,
                group=group_of(shape),
                tokens=few,
                table=bench.table,
                replays=20,
                ways=bench.ways,
            )
        bench.keep()
        weight_OI = random_24(*shape, bench.dtype, bench.device)
        down, up = (factor.to(bench.dtype) for factor in block_mean(weight_OI.float(), 16))
        branches = {
            "branch": branch_of(down, up.contiguous(), list(COPIES.values())),
            "INT8 branch": branch_of(down, up.contiguous(), list(COPIES.values()), eight_bits=True),
        }
        copies: dict[tuple[str, int], list[Any]] = {}
        for tokens in bench.tokens:
            x_MI = torch.randn(tokens, shape[1], device=bench.device).to(bench.dtype)
            rows = variants(bench, shape, tokens)
            wanted = dict.fromkeys((COPIES[path.name], group) for _, path, group, _ in rows)
            missing = [pair for pair in wanted if pair not in copies]
            copies |= several({pair: copy_of(pair[0], weight_OI, pair[1]) for pair in missing})
            steps, size = {}, {}
            for what, path, group, added in rows:
                of = copies[COPIES[path.name], group]
                beside = [fresh(branches[added]) if added else None for _ in of]
                steps[what] = [partial(product, path, x_MI, c, b) for c, b in zip(of, beside, strict=True)]
                size[what] = bytes_of(of[0]) + branch_bytes(beside[0])
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


def fresh(branch: Branch) -> Branch:
    """The same branch in other memory."""
    assert branch.fragments is not None
    values, scales = branch.fragments[:2]
    parts = values.clone(), None if scales is None else scales.clone()
    return Branch(branch.down, branch.up.clone(), branch.fragments._replace(values=parts[0], scales=parts[1]))


def branch_bytes(branch: Branch | None) -> int:
    """What of a branch is read from memory; that of a block mean is only S."""
    return 0 if branch is None or branch.fragments is None else branch.fragments.bytes


def variants(bench: Bench, shape: tuple[int, int], tokens: int) -> list[tuple[str, Path, int, str]]:
    """What is timed: (name, way, inputs that share a scale in 4 bits or 0, which branch)."""
    exact = bench.table.times[bench.key(shape, tokens)]

    def fastest(names: tuple[str, ...], times: dict[Path, Any]) -> Path | None:
        return min((p for p in times if p.name in names), key=lambda p: times[p].seconds, default=None)

    ours = fastest(OURS, exact)
    rows: list[tuple[str, Path | None, int, str]] = [("dense", Path("dense"), 0, "")]
    fallback = ("fallback", bench.table.best(bench.key(shape, tokens)), 0, "")
    group = group_of(shape)
    coarse = bench.table.times.get(bench.key(shape, tokens, group), {})
    if not bench.gpu:
        rows += [("2:4", ours, 0, ""), ("2:4 INT4", fastest(OURS, coarse), group, ""), fallback]
        return [(what, path, size, added) for what, path, size, added in rows if path is not None]
    rows += [
        ("dense, decompressed", fastest(("decompress", "unpack"), exact), 0, ""),
        ("cuSPARSELt", fastest(("cusparselt",), exact), 0, ""),
        ("2:4", ours, 0, ""),
        ("2:4, each alone", alone(ours), 0, ""),
        ("2:4 and branch", ours, 0, "branch"),
        ("2:4 and INT8 branch", ours, 0, "INT8 branch"),
    ]
    if coarse:
        rows += [
            ("2:4 INT4", fastest(OURS, coarse), group, ""),
            ("2:4 INT4, each alone", alone(fastest(OURS, coarse)), group, ""),
            ("2:4 INT4 and branch", fastest(OURS, coarse), group, "branch"),
        ]
    # the two copies of a weight that are fastest at some number of tokens
    rows.append(fallback)
    return [(what, path, size, added) for what, path, size, added in rows if path is not None]


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
