"""The memory that a training step is said to take, beside what it takes."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from shearling.anatomy import anatomy_of
from shearling.methods.ast import ASTPolicy
from shearling.methods.ig_lora import LoRAPolicy
from shearling.methods.spp import SPPPolicy
from shearling.methods.stages import preview_recipe
from shearling.models import empty_model
from shearling.plan.patterns import Pattern
from shearling.recipe import AST, SLoRB, load_recipe
from shearling.train import Distillation, TrainSettings, compiled, train
from shearling.train.head import hidden_states, narrow_stream
from shearling.train.memory import training_memory
from tests.tiny import tiny_model, tiny_tokens

LENGTH = 128
LLAMA3_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
)  # fmt: skip
LLAMA2_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    vocab_size=32000, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
)  # fmt: skip
LLAMA3_2_3B = LlamaConfig(
    hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
    head_dim=128, vocab_size=128256, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
)  # fmt: skip
#: recipe, the config of its model, processes, parameters that it ends with
LARGE = [
    ("cfsp-llama3-8b", LLAMA3_8B, 1, (6.7e9, 7.3e9)),
    ("cfsp-llama3-8b-full", LLAMA3_8B, 8, (6.2e9, 6.4e9)),
    ("shear-llama3.2-3b", LLAMA3_2_3B, 8, (1.287e9, 1.3e9)),
    ("shear-llama2-7b-2.7b", LLAMA2_7B, 8, (2701560320, 2701560320)),
    ("shear-llama2-7b-1.3b", LLAMA2_7B, 8, (1345423360, 1345423360)),
]
SIZES: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 6, "vocab_size": 997},
    "gpt2": {"n_embd": 128, "n_inner": 512, "n_layer": 6, "vocab_size": 997},
}


class Living(TorchDispatchMode):
    """Bytes of all tensors that are alive, and their greatest number."""

    def __init__(self, *models: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                self._meet(tensor)

    def _meet(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._meet(leaf)
        return found


@pytest.mark.parametrize(
    "changes",
    [{}, {"recompute": True}, {"micro_batch": 4}, {"separator": 7}],
    ids=["parts", "recomputed", "whole", "documents"],
)
@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("kind", ["full", "lora", "spp"])
def test_estimate_is_near_what_lives(family: str, changes: dict[str, Any], kind: str) -> None:
    model, teacher = (tiny_model(family, seed, **SIZES[family]) for seed in (0, 1))
    settings = TrainSettings(tokens=2 * 4 * LENGTH, length=LENGTH, batch=4, micro_batch=2, learning_rate=1e-4)
    settings = dataclasses.replace(settings, **changes)

    def policies() -> list[Any]:
        anatomy = anatomy_of(model.config)
        return {"full": [], "lora": [LoRAPolicy(anatomy, [4] * 6)], "spp": [SPPPolicy(anatomy)]}[kind]

    expected = training_memory(model, settings, policies(), teacher=teacher)
    living = Living(model, teacher)
    with living:
        train(model, tiny_tokens(8, LENGTH, seed=5), [*policies(), Distillation(teacher)], settings)
    assert expected.peak == pytest.approx(living.peak, rel=0.15)


@pytest.mark.parametrize("start", ["block-mean", "svd", "activation-svd"])
def test_branches_are_counted(start: str) -> None:
    model = tiny_model("llama", **SIZES["llama"])
    settings = TrainSettings(tokens=2 * 4 * LENGTH, length=LENGTH, batch=4, micro_batch=2, learning_rate=1e-4)
    norms = {name: torch.ones(weight.shape[1]) for name, weight in model.named_parameters() if weight.ndim == 2}

    def peak(stage: AST) -> int:
        policy = ASTPolicy(anatomy_of(model.config), Pattern(2, 4), stage, norms=norms)
        return training_memory(model, settings, [policy]).peak

    slorb = SLoRB.model_validate({"start": start})
    weights = [weight for name, weight in model.named_parameters() if ".layers." in name and weight.ndim == 2]
    branches = sum(4 * slorb.rank(weight.shape[1]) * sum(weight.shape) for weight in weights)
    # a branch, its gradient and two moments
    assert peak(AST(slorb=slorb)) - peak(AST()) == pytest.approx(4 * branches, rel=0.2)


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_what_compiled_blocks_keep(compute: torch.dtype | None) -> None:
    model = tiny_model("llama", **SIZES["llama"]).train()
    settings = TrainSettings(tokens=1, length=LENGTH, batch=2, micro_batch=2, learning_rate=1e-4, compile=True)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    products = torch.autocast("cpu", torch.bfloat16, enabled=compute is not None)
    with compiled(model), narrow_stream(model, compute), products, hooks:
        states = hidden_states(model, tiny_tokens(2, LENGTH))
    found = sum(storage.nbytes() for storage in kept.values())
    del states
    expected = training_memory(model, settings, compute=compute)
    eager = training_memory(model, dataclasses.replace(settings, compile=False), compute=compute)
    assert expected.activations == pytest.approx(found, rel=0.1) and found < 0.9 * eager.activations


def test_a_large_model_is_estimated_from_its_config() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA3_8B, dtype=torch.float32)
    settings = TrainSettings(tokens=1 << 20, length=1024, batch=32, micro_batch=1, recompute=True)
    alone = training_memory(model, settings, compute=torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    # weights, gradients and two moments in float32
    assert alone.weights + alone.gradients + alone.optimizer == 16 * parameters
    eight = training_memory(model, settings, compute=torch.bfloat16, processes=8)
    assert eight.gradients == 4 * parameters // 8 and eight.activations == alone.activations
    assert alone.peak / 8 < eight.peak < alone.peak / 4
    assert next(model.parameters()).device.type == "meta"


@pytest.mark.parametrize(("recipe", "config", "processes", "size"), LARGE, ids=[recipe for recipe, *_ in LARGE])
def test_large_recipes_fit_what_they_are_written_for(
    recipe: str, config: LlamaConfig, processes: int, size: tuple[float, float], tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    # what compiled blocks keep is the same in both shapes of the paper, and takes long to find
    eager = ["shear.compile=false", "recover.compile=false"] if recipe == "shear-llama2-7b-1.3b" else []
    loaded = load_recipe(f"recipes/{recipe}.yaml", [f"model={tmp_path}", *eager])
    plan = preview_recipe(loaded, empty_model(loaded.model, loaded.dtype), processes)
    assert size[0] <= plan.after.parameters <= size[1]
    assert 16 * 2**30 < plan.estimate["peak_bytes"] < 72 * 2**30
    assert ("memory of training, estimated", "", f"{plan.estimate['peak_bytes'] / 2**30:.1f} GiB", "") in plan.rows()
