"""GGUF files run by llama.cpp."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shearling.export import export_gguf
from shearling.plan import Delta, Structure
from shearling.surgery import cut_
from tests.engines.reference import PROMPTS, difference, greedy, logits
from tests.tiny import GGUF_FAMILIES, LLAMA3, tiny_model, tiny_tokens

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; make engines")

ROTARY: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": LLAMA3,
}
TOKENS = 16
#: where nothing is rounded; llama.cpp looks GELU up in a table of 16 bits
EXACT = 1e-3


@contextmanager
def engine(file: Path) -> Iterator[Any]:
    """llama.cpp on a file, with keys and values as exact as the states that they come from."""
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    # threads that wait for each other are slow where others use the cores
    options = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}
    with closing(llama_cpp.Llama(str(file), **options, **exact)) as loaded:
        yield loaded


def engine_logits(file: Path, prompts: Sequence[Tensor]) -> Tensor:
    found = []
    with engine(file) as loaded:
        for ids in prompts:
            loaded.reset()
            loaded.eval(ids.tolist())
            found.append(torch.tensor(loaded.scores[: len(ids)].copy()))
    return torch.cat(found)


def completion(loaded: Any, prompt: str) -> str:
    loaded.reset()
    return loaded.create_completion(prompt, max_tokens=TOKENS, temperature=0.0)["choices"][0]["text"]


def blocks(weight: Tensor) -> Tensor:
    return weight.unflatten(-1, (-1, 32))


def as_f16(weight: Tensor) -> Tensor:
    return weight.half().float()


def as_q8_0(weight: Tensor) -> Tensor:
    """The format's definition: 32 weights share a scale that takes the largest to 127; it is stored in 16 bits."""
    groups = blocks(weight)
    step = groups.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(step > 0, groups / step, 0.0)
    return ((codes.abs() + 0.5).floor() * codes.sign() * as_f16(step)).flatten(-2)


def as_q4_1(weight: Tensor) -> Tensor:
    """The format's definition: 16 steps from the least of 32 weights to the largest, both ends in 16 bits."""
    groups = blocks(weight)
    least = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - least) / 15
    codes = torch.where(step > 0, (groups - least) / step, 0.0)
    return ((codes + 0.5).floor().clamp(max=15) * as_f16(step) + as_f16(least)).flatten(-2)


@torch.no_grad()
def rounded(model: Any, kind: str) -> Any:
    """A model with its matrices on the grid of a type."""
    matrix = {"f32": torch.clone, "f16": as_f16, "q8_0": as_q8_0, "q4_1": as_q4_1}[kind]
    outer = as_q8_0 if kind.startswith("q") else matrix
    copied = copy.deepcopy(model)
    for name, parameter in copied.named_parameters():
        if parameter.ndim == 2:
            parameter.copy_((matrix if ".layers." in name else outer)(parameter))
    return copied


def prompts_of(tokenizer: Any) -> list[Tensor]:
    return [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]


# --- the real model


@pytest.fixture(scope="module")
def files(cut_smollm2: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The cut model in every type, not compared with anything."""
    folder = tmp_path_factory.mktemp("gguf")
    kinds = ("f32", "f16", "q8_0", "q4_1", "q4_k_m")
    found = {kind: folder / f"{kind}.gguf" for kind in kinds}
    for kind, file in found.items():
        export_gguf(*cut_smollm2, file, kind=kind, provenance={}, check=False)
    return found


@pytest.mark.parametrize(
    ("kind", "arithmetic"),
    # before a product llama.cpp rounds states as it rounded the weights: to 16 bits, or to 8 where weights are codes,
    # which in transformers too moves these logits by 0.09
    [("f32", 1e-4), ("f16", 1e-2), ("q8_0", 0.15), ("q4_1", 0.15)],
)
def test_logits_are_the_rounded_models(
    kind: str, arithmetic: float, cut_smollm2: tuple[Any, Any], files: dict[str, Path]
) -> None:
    prompts = prompts_of(cut_smollm2[1])
    found = engine_logits(files[kind], prompts)
    assert difference(found, logits(rounded(cut_smollm2[0], kind), prompts)) < arithmetic


def test_greedy_text_is_the_rounded_models(cut_smollm2: tuple[Any, Any], files: dict[str, Path]) -> None:
    """From text to text, so that the vocabulary counts too."""
    model, tokenizer = cut_smollm2
    reference = rounded(model, "f16")
    with engine(files["f16"]) as loaded:
        for prompt in PROMPTS:
            text = completion(loaded, prompt)
            assert text.strip() and text == greedy(reference, tokenizer, prompt, TOKENS)


def test_k_quants_are_near_and_small(cut_smollm2: tuple[Any, Any], files: dict[str, Path]) -> None:
    """llama.cpp rounds a file of ours and reads what came of it; how, only it knows."""
    model, tokenizer = cut_smollm2
    prompts, file = prompts_of(tokenizer), files["q4_k_m"]
    dense, found = logits(model, prompts), engine_logits(file, prompts)
    assert difference(engine_logits(files["q8_0"], prompts), dense) < difference(found, dense) < 0.6
    assert file.stat().st_size < files["q8_0"].stat().st_size
    with engine(file) as loaded:
        assert completion(loaded, PROMPTS[0]).strip()


def test_rounding_by_llama_cpp_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama", intermediate_size=64)
    export_gguf(model, None, tmp_path / "m.gguf", kind="q4_k_m", provenance={}, check=False)
    assert capfd.readouterr() == ("", "")


def test_text_becomes_the_tokenizers_tokens(cut_smollm2: tuple[Any, Any], files: dict[str, Path]) -> None:
    tokenizer = cut_smollm2[1]
    hard = ("  two  spaces\t\n\n", "naïve café 東京 🙂", "it's 1234567 + 8.9", "<|im_start|>user\nhi<|im_end|>")
    with engine(files["q8_0"]) as loaded:
        for text in (*PROMPTS, *hard):
            found = loaded.tokenize(text.encode(), add_bos=True, special=True)
            assert found == tokenizer(text)["input_ids"], text
            assert loaded.detokenize(found, special=True).decode() == text


def test_a_chat_follows_the_template(cut_smollm2: tuple[Any, Any], files: dict[str, Path]) -> None:
    model, tokenizer = cut_smollm2
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    with engine(files["f16"]) as loaded:
        answer = loaded.create_chat_completion(messages, max_tokens=TOKENS, temperature=0.0)
        loaded.reset()
    text = answer["choices"][0]["message"]["content"]
    assert text == greedy(rounded(model, "f16"), tokenizer, prompt, TOKENS)


def test_widths_of_their_own_per_layer(per_layer_smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = per_layer_smollm2
    record = export_gguf(model, tokenizer, tmp_path / "m.gguf", kind="f16", provenance={})
    # transformers has no such class, and llama.cpp was asked at once
    assert [found["reader"] for found in record["verified"]] == ["llama_cpp_python"]
    prompts, reference = prompts_of(tokenizer), rounded(model, "f16")
    assert difference(engine_logits(tmp_path / "m.gguf", prompts), logits(reference, prompts)) < 1e-2
    with engine(tmp_path / "m.gguf") as loaded:
        assert completion(loaded, PROMPTS[0]) == greedy(reference, tokenizer, PROMPTS[0], TOKENS)


# --- every architecture


def tiny_difference(model: Any, file: Path, **options: Any) -> float:
    export_gguf(model, None, file, kind="f32", provenance={}, **options)
    # longer than the windows of those that have some
    prompts = list(tiny_tokens(3, 40))
    return difference(engine_logits(file, prompts), logits(model, prompts))


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_every_architecture(family: str, tmp_path: Path) -> None:
    assert tiny_difference(tiny_model(family), tmp_path / "m.gguf") < EXACT


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_uniform_cut(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    kept = {f"ffn.{layer}": tuple(range(40)) for layer in range(3)} | {"layers": (0, 2)}
    cut_(model, [Structure({name: what for name, what in kept.items() if name != "ffn.1"})])
    assert tiny_difference(model, tmp_path / "m.gguf") < EXACT


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_per_layer_widths_of_a_tiny_model(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    cut_(model, [Structure({"layers": (0, 2), "ffn.2": tuple(range(32)), "kv_group.0": (1,)})])
    assert tiny_difference(model, tmp_path / "m.gguf") < EXACT


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("per_layer", [False, True])
def test_scaled_rotary_embeddings(name: str, per_layer: bool, tmp_path: Path) -> None:
    model = tiny_model("llama", rope_parameters=ROTARY[name])
    if per_layer:
        cut_(model, [Structure({"ffn.1": tuple(range(16))})])
    assert tiny_difference(model, tmp_path / "m.gguf") < EXACT


def test_windows_by_layer(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert tiny_difference(tiny_model("gemma3_text", layer_types=kinds), tmp_path / "m.gguf") < EXACT


@pytest.mark.parametrize("per_layer", [False, True])
def test_biases_that_refitting_adds(per_layer: bool, tmp_path: Path) -> None:
    model = tiny_model("llama")
    added = {
        f"model.layers.{layer}.{path}.bias": torch.linspace(-1, 1, 32)
        for layer in range(3)
        for path in ("mlp.down_proj", "self_attn.o_proj")
    }
    cut_(model, [Structure({"ffn.1": tuple(range(16))})] * per_layer + [Delta(added)])
    assert tiny_difference(model, tmp_path / "m.gguf") < EXACT


def test_a_narrower_residual_stream(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cut_(model, [Structure({"hidden": tuple(range(24))})])
    assert tiny_difference(model, tmp_path / "m.gguf") < EXACT
