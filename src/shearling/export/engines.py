"""Which engines load a result, which of them it runs faster on, and the command that serves it.

What engines take was read in their sources: vLLM 0.33, SGLang 0.5.23, transformers 5.23, llama.cpp of llama-cpp-python
0.3. None of them has kernels for 2:4 any more, so masks are zeros that all but our own runtime multiply.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from shearling.anatomy import obstacle
from shearling.errors import ShearlingError
from shearling.export.deci import pad_shapes
from shearling.export.gguf import architecture_of, check_rows
from shearling.plan import Plan

#: what stands in the commands for the folder of the result
MODEL = "MODEL"
#: ranks of branches that vLLM has room for
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
#: of widths: GPUs multiply rows of 16 bytes; other models of 7B were slower than the dense one (docs/log.md)
_GPU_MULTIPLE = 8
#: the type of a GGUF file that has about as many bits as a grid
_GGUF_TYPES = {"int4": "q4_0", "uint4": "q4_1", "int8": "q8_0", "uint8": "q8_0", "float8_e4m3": "q8_0"}


@dataclass(frozen=True)
class Engine:
    """One engine and a result: ``how`` is the command, or why it does not load; ``faster`` what it makes use of."""

    engine: str
    loads: bool
    how: str
    faster: str = ""


def plan_record(plan: Plan, config: Any) -> dict[str, Any]:
    """The content of ``plan.json``: the plan and its engines. ``config`` is the model's, before or after the cut."""
    stock = obstacle(plan.anatomy_after) is None
    return {**plan.to_json(), "stock": stock, "engines": [asdict(engine) for engine in engines(plan, config)]}


def engines(plan: Plan, config: Any) -> list[Engine]:
    """Engines for what a plan makes of a model with this config."""
    found = [_transformers(plan), _vllm(plan), _sglang(plan), _llama_cpp(plan, config), _onnxruntime(plan)]
    if plan.masked is not None and plan.masked.pattern == "2:4":
        how = f'shearling.runtime.accelerate_(shearling.load_model("{MODEL}", device="cuda"))'
        found.append(Engine("shearling.runtime", True, how, "the zeros, where that was measured to be faster"))
    return found


def _transformers(plan: Plan) -> Engine:
    # its kernels for codes are slower than products with the weights they stand for
    faster = _faster(plan, codes=False)
    if plan.branches is not None:
        return Engine("transformers", True, f'shearling.load_model("{MODEL}")', faster)
    if obstacle(plan.anatomy_after) is not None:
        how = f'import shearling; AutoModelForCausalLM.from_pretrained("{MODEL}")'
        return Engine("transformers", True, how, faster)
    return Engine("transformers", True, f"transformers serve {MODEL}", faster)


def _vllm(plan: Plan) -> Engine:
    why, faster = obstacle(plan.anatomy_after), _faster(plan, codes=True)
    if why is None:
        command = f"vllm serve {MODEL}"
        if plan.branches is not None:
            rank = next((rank for rank in _LORA_RANKS if rank >= plan.branches), None)
            if rank is None:
                return Engine("vLLM", False, f"branches of rank {plan.branches}; it takes at most {_LORA_RANKS[-1]}")
            command += f" --enable-lora --max-lora-rank {rank} --lora-modules pruned={MODEL}/adapter"
        return Engine("vLLM", True, command, faster)
    if plan.branches is not None:
        return Engine("vLLM", False, f"{why}, and branches beside linears")
    try:
        pad_shapes(plan.anatomy_after)
    except ShearlingError as error:
        return Engine("vLLM", False, f"{why} ({error})")
    command = f"shearling export {MODEL} --to deci --out {MODEL}-deci && vllm serve {MODEL}-deci --trust-remote-code"
    return Engine("vLLM", True, command, faster)


def _sglang(plan: Plan) -> Engine:
    why = obstacle(plan.anatomy_after)
    if why is not None:
        return Engine("SGLang", False, why)
    command = f"python -m sglang.launch_server --model-path {MODEL}"
    if plan.branches is not None:
        command += f" --enable-lora --lora-paths pruned={MODEL}/adapter"
    return Engine("SGLang", True, command, _faster(plan, codes=True))


def _llama_cpp(plan: Plan, config: Any) -> Engine:
    if plan.branches is not None:
        return Engine("llama.cpp", False, "branches beside linears")
    kind = "f16" if plan.quantised is None else _GGUF_TYPES[plan.quantised.format]
    try:
        architecture_of(plan.anatomy_after, config)
        if plan.quantised is not None:
            check_rows(plan.anatomy_after, kind)
    except ShearlingError as error:
        return Engine("llama.cpp", False, str(error))
    command = f"shearling export {MODEL} --to gguf --type {kind} --out {MODEL}.gguf && llama-server -m {MODEL}.gguf"
    return Engine("llama.cpp", True, command, _faster(plan, codes=True))


def _onnxruntime(plan: Plan) -> Engine:
    # the graph has no key/value cache: it scores text, and would generate slowly
    return Engine(
        "onnxruntime", True, f"shearling export {MODEL} --to onnx --out {MODEL}-onnx", _faster(plan, codes=False)
    )


def _faster(plan: Plan, *, codes: bool) -> str:
    """What of the plan an engine turns into speed, if it can multiply by codes or not."""
    gains = []
    if plan.after.parameters < plan.before.parameters:
        odd = any(shape.ffn % _GPU_MULTIPLE for shape in plan.anatomy_after.shapes)
        slow = f" (not on GPUs: widths are no multiples of {_GPU_MULTIPLE}; round_to: 64)"
        gains.append(f"the cut{slow if odd else ''}")
    if plan.quantised is not None and codes:
        gains.append(plan.quantised.format)
    return " and ".join(gains)
