"""A whole model of LLaMA-2-7B's shape, dense, 2:4, and 2:4 in 4 bits: prompts and tokens after them.

    python benchmarks/sparse_model.py --table FILE [--compile] [--json FILE]

Weights are random. Ways come from the table that ``sparse_runtime.py --tune`` keeps, which gains what it lacks. Prefill
and decoding are over a static cache, on a GPU as CUDA graphs, and the three models take turns; ``--compile`` has
torch.compile make few kernels of what lies between the linears (norms, rotary positions, the activation).
``--layers`` is for fewer, ``--quick`` for a tiny model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Rows
from sparse_runtime import GROUP, table_of
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache
from transformers.models.llama import modeling_llama

from shearling.evaluate.decode import greedy_step
from shearling.evaluate.speed import static_step
from shearling.export.compact import block_weights
from shearling.runtime import COPIES, Table, accelerate_, measure_table, random_24
from shearling.runtime.timing import timed_ways

COLUMNS = ["what", "layers", "prompt", "tokens_per_second", "ratio", "us", "low", "high", "bytes", "device"]
DTYPE = torch.bfloat16


def config_of(layers: int, small: bool) -> LlamaConfig:
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
    if small:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 96}
    return LlamaConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=4096)


def sparse(config: LlamaConfig, device: torch.device) -> Any:
    """A random model whose block linears are 2:4."""
    torch.manual_seed(0)
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
    with torch.no_grad():
        for weight in block_weights(model).values():
            weight.copy_(random_24(*weight.shape, DTYPE, device))
    return model


def accelerated(model: Any, table: Table, group: int, tokens: list[int], ways: list[str] | None) -> int:
    """Have a model take the table's fastest ways; the bytes of its block linears."""
    weights = block_weights(model).values()
    shapes, device = sorted({(w.shape[0], w.shape[1]) for w in weights}), next(iter(weights)).device
    measure_table(shapes, device=device, dtype=DTYPE, group=group, tokens=tokens, table=table, ways=ways)
    return accelerate_(model, table, int4=group or None, copies="fastest", tokens=tokens).bytes


def compile_between_(model: Any) -> None:
    """Compile what lies between the linears of a model; what knows the number of its layer would be compiled anew."""
    for layer in model.model.layers:
        for module in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            module.compile(dynamic=False)
    model.model.norm.compile(dynamic=False)


@torch.no_grad()
def prefill(model: Any, ids_BT: Tensor) -> Callable[[], None]:
    """A step that reads a prompt."""
    cache = StaticCache(config=model.config, max_cache_len=ids_BT.shape[1])

    @torch.no_grad()
    def read() -> None:
        for layer in cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.zero_()  # pyrefly: ignore[missing-attribute]
        greedy_step(model, ids_BT, cache)

    # makes the cache
    read()
    return read


@torch.no_grad()
def decoding(model: Any, ids_BT: Tensor, calls: int) -> Callable[[], object]:
    """A step that writes one more token after a prompt, for so many calls."""
    if ids_BT.is_cuda:
        return torch.no_grad()(static_step(model, ids_BT, calls)[0])
    token, kept = greedy_step(model, ids_BT)
    return torch.no_grad()(partial(greedy_step, model, token, kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--table", type=Path, help="file of measured ways, read and written")
    parser.add_argument("--compile", action="store_true", help="torch.compile between the linears")
    parser.add_argument("--ways", nargs="*", choices=sorted(COPIES), help="these alone, beside dense")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    table, rows = table_of(args.table, device), Rows(COLUMNS, args.json)
    ids_BT = torch.randint(3, 96, (1, args.prompt), device=device)
    held, reading, writing = {}, {}, {}
    if args.compile:
        modeling_llama.apply_rotary_pos_emb = torch.compile(modeling_llama.apply_rotary_pos_emb, dynamic=False)
    for what, group in (("dense", None), ("2:4", 0), ("2:4 INT4", GROUP)):
        model = sparse(config_of(args.layers, args.quick), device)
        held[what] = sum(weight.nbytes for weight in block_weights(model).values())
        if group is not None:
            held[what] = accelerated(model, table, group, [1, args.prompt], args.ways)
            if args.table is not None:
                table.save(args.table)
        if args.compile:
            compile_between_(model)
        reading[what] = [prefill(model, ids_BT)]
        # those that warm up and are captured, too
        writing[what] = [decoding(model, ids_BT, 16 + args.generate)]
    read = timed_ways(reading, device, 3 if args.quick else 10)
    wrote = timed_ways(writing, device, args.generate)
    for part, count, found in (("prefill", args.prompt, read), ("decode", 1, wrote)):
        for what, timing in found.items():
            rows.add(
                what=f"{what}, {part}{', compiled' if args.compile else ''}",
                layers=args.layers,
                prompt=args.prompt,
                tokens_per_second=count / timing.seconds,
                ratio=found["dense"].seconds / timing.seconds,
                us=timing.seconds * 1e6,
                low=timing.low * 1e6,
                high=timing.high * 1e6,
                bytes=held[what],
                device=table.device,
            )


if __name__ == "__main__":
    main()
