from __future__ import annotations

from itertools import pairwise

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from shearling.anatomy import anatomy_of
from shearling.errors import ShearlingError
from shearling.methods.ig_lora import LoRAPolicy, allocate_ranks, peft_config
from shearling.nn import EffectiveLinear
from shearling.plan import Structure
from shearling.surgery import cut_
from shearling.train import TrainSettings, train
from tests.tiny import FAMILIES, tiny_model, tiny_tokens

LENGTH = 12
SETTINGS = TrainSettings(tokens=5 * 4 * LENGTH, length=LENGTH, batch=4, learning_rate=1e-2, warmup=0)
RANKS = [2, 5, 3]


# --- ranks


def test_ranks_by_hand():
    # 8 * w = 4, 8, 12
    assert allocate_ranks([0.5, 1.0, 1.5], 8, "important") == [4, 8, 12]
    assert allocate_ranks([0.1, 0.1, 0.4], 8, "damaged") == [4, 4, 16]
    # 2.4 + 2.4 + 4.2: floors 2 + 2 + 4, the missing one goes to the largest remainder, the lower index
    assert allocate_ranks([0.8, 0.8, 1.4], 3, "important") == [3, 2, 4]
    # the first is clipped to 4 * 4, the others to 2, and what is left goes round
    assert allocate_ranks([100.0, 0.0, 0.0, 0.0, 0.0, 0.0], 4, "important") == [14, 2, 2, 2, 2, 2]
    assert sum(allocate_ranks([100.0] + [0.01] * 9, 4, "important")) == 40
    assert allocate_ranks([100.0] + [0.01] * 9, 4, "important")[0] == 16
    assert allocate_ranks([3.0, 1.0], 8, "uniform") == [8, 8]


@hypothesis_settings(max_examples=200, deadline=None)
@given(
    importance=st.lists(st.floats(0, 1e3), min_size=1, max_size=40),
    mean_rank=st.integers(1, 64),
    mode=st.sampled_from(["important", "damaged", "uniform"]),
)
def test_ranks_meet_the_budget_and_the_bounds_and_follow_the_order(importance, mean_rank, mode):
    if sum(importance) == 0:
        importance[0] = 1.0
    ranks = allocate_ranks(importance, mean_rank, mode)
    assert sum(ranks) == len(importance) * mean_rank
    assert all(min(2, mean_rank) <= rank <= 4 * mean_rank for rank in ranks)
    if mode == "uniform":
        assert set(ranks) == {mean_rank}
    else:
        ordered = [rank for _, rank in sorted(zip(importance, ranks, strict=True), key=lambda pair: pair[0])]
        # equal or nearly equal importances may differ by the one unit that rounding leaves
        assert all(later >= earlier - 1 for earlier, later in pairwise(ordered))


@hypothesis_settings(max_examples=100, deadline=None)
@given(importance=st.lists(st.floats(0.6, 1.6), min_size=1, max_size=40))
def test_away_from_the_bounds_ranks_are_the_ideal_ones_rounded(importance):
    ideal = [16 * g * len(importance) / sum(importance) for g in importance]
    ranks = allocate_ranks(importance, 16, "important")
    assert all(abs(rank - wish) < 1 + 1e-6 for rank, wish in zip(ranks, ideal, strict=True))


@pytest.mark.parametrize("importance", [[0.0, 0.0], [1.0, -0.1], [1.0, float("nan")], [float("inf"), 1.0]])
def test_unusable_importances_are_refused(importance):
    with pytest.raises(ShearlingError, match="ranks=damaged"):
        allocate_ranks(importance, 8, "damaged")
    assert allocate_ranks(importance, 8, "uniform") == [8, 8]


def test_unusable_ranks_and_modes_are_refused():
    anatomy = anatomy_of(tiny_model("llama").config)
    for ranks in ([2, 2], [2, 2, 0]):
        with pytest.raises(ShearlingError, match="ranks: "):
            LoRAPolicy(anatomy, ranks)
        with pytest.raises(ShearlingError, match="ranks: "):
            peft_config(anatomy, ranks)
    with pytest.raises(ShearlingError, match="mean_rank=0"):
        allocate_ranks([1.0], 0, "uniform")
    with pytest.raises(ShearlingError, match="ranks='best'"):
        allocate_ranks([1.0], 8, "best")  # pyrefly: ignore


# --- the policy


def cut_llama():
    """A llama whose blocks differ in width."""
    model = tiny_model("llama")
    cut_(model, [Structure({"ffn.1": tuple(range(20)), "kv_group.0": (1,)})])
    return model


@pytest.mark.parametrize("family", [*FAMILIES, "cut"])
def test_every_block_linear_gets_its_rank_and_nothing_else_is_trained(family):
    model = cut_llama() if family == "cut" else tiny_model(family)
    stock = [(name, type(m)) for name, m in model.named_modules()]
    anatomy = anatomy_of(model.config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = {anatomy.path(layer, inner): layer for layer in range(3) for inner in anatomy.family.linears}
    expected = {name for name, m in stock if m.__name__ in ("Linear", "Conv1D") and name != "lm_head"}
    assert set(blocks) == expected
    policy = LoRAPolicy(anatomy, RANKS, 2.0)
    policy.attach(model, SETTINGS)
    for path, layer in blocks.items():
        (branch,) = model.get_submodule(path).branches
        assert branch.rank == RANKS[layer] and branch.scale == 2.0
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.branches.0.{part}" for path in blocks for part in ("down", "up")}
    (group,) = policy.param_groups()
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    policy.finalize()
    # the branches start at zero
    assert [(name, type(m)) for name, m in model.named_modules()] == stock
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_training_lowers_the_loss_merges_and_says_what_it_merged(family):
    model, windows = tiny_model(family), tiny_tokens(8, LENGTH)
    stock = [(name, type(m)) for name, m in model.named_modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    anatomy = anatomy_of(model.config)
    validated = []
    result = train(
        model, windows, [LoRAPolicy(anatomy, RANKS)], SETTINGS, validation=windows,
        on_event=lambda e: validated.append(e["validation_loss"]) if "validation_loss" in e else None,
    )  # fmt: skip
    assert [(name, type(m)) for name, m in model.named_modules()] == stock
    assert all(p.requires_grad for p in model.parameters())
    (adapters,) = result.edits
    after = model.state_dict()
    for path, down in adapters.down.items():
        change = adapters.scale[path] * adapters.up[path].double() @ down.double()
        if family == "gpt2":
            change = change.T
        assert change.any()
        name = f"{path}.weight"
        torch.testing.assert_close(after[name].double(), before[name].double() + change, rtol=1e-6, atol=1e-7)
    merged = {f"{path}.weight" for path in adapters.down}
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - merged)
    with torch.no_grad():
        loss = model(windows, labels=windows).loss.item()
    assert loss == pytest.approx(validated[-1], rel=1e-4)
    with torch.no_grad():
        stock_model = tiny_model(family)
        assert loss < stock_model(windows, labels=windows).loss.item()


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt", "cut"])
def test_peft_makes_the_same_branches(family):
    def make():
        torch.manual_seed(0)
        return cut_llama() if family == "cut" else tiny_model(family)

    ours, theirs, tokens = make(), make(), tiny_tokens()
    anatomy = anatomy_of(ours.config)
    policy = LoRAPolicy(anatomy, RANKS, 2.0)
    policy.attach(ours, SETTINGS)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**peft_config(anatomy, RANKS, 2.0)))
    assert wrapped.get_nb_trainable_parameters()[0] == sum(p.numel() for p in ours.parameters() if p.requires_grad)
    # the same values give the same logits, so ranks, scales and orientations agree
    torch.manual_seed(1)
    for path, linear in ours.named_modules():
        if isinstance(linear, EffectiveLinear):
            (branch,) = linear.branches
            nn.init.normal_(branch.up, std=0.1)
            twin = theirs.get_submodule(path)
            twin.lora_A["default"].weight.data.copy_(branch.down)
            twin.lora_B["default"].weight.data.copy_(branch.up)
    torch.testing.assert_close(ours(tokens).logits, wrapped(tokens).logits, rtol=1e-4, atol=1e-4)
