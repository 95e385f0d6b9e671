"""Teachers: cached, offloaded, compiled, in another precision, and what training takes from them."""

from __future__ import annotations

import errno
import json
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from shearling.errors import ShearlingError
from shearling.train import (
    CachedTeacher,
    Distillation,
    LayerwiseDistillation,
    Policy,
    Teacher,
    TrainSettings,
    cache_teacher,
    chunked_divergence,
    chunked_topk_divergence,
    compiled,
    in_dtype,
    offloaded,
    train,
)
from shearling.train.head import Head, hidden_states
from shearling.train.topk import REST_FLOOR
from tests.test_train_loss import case, full_logits, leaves, relative
from tests.tiny import FAMILIES, VOCAB, tiny_model, tiny_tokens

LENGTH = 12
SETTINGS = TrainSettings(
    tokens=6 * 4 * LENGTH, length=LENGTH, batch=4, micro_batch=3, learning_rate=1e-2, log_every=1, cross_entropy=0.0
)


def some_windows(count=10):
    return tiny_tokens(count, LENGTH, seed=5)


# --- the divergence over the likeliest tokens


def by_definition(logits, log_probs, ids, labels):
    """Over the k tokens and the bucket of the others, from the whole distribution, in float64."""
    share = log_probs.double().exp()
    student = logits.softmax(1)
    named = torch.zeros_like(student, dtype=torch.bool).scatter(1, ids, True)
    per_token = (share * (share.log() - student.gather(1, ids).log())).sum(1)
    if ids.shape[1] < logits.shape[1]:
        rest = (1 - share.sum(1)).clamp(min=REST_FLOOR)
        per_token = per_token + rest * (rest.log() - student.masked_fill(named, 0).sum(1).log())
    kept = labels != -100
    return per_token[kept].sum() / kept.sum().clamp(min=1)


def likeliest(seed, tokens, vocab, k, scale=2.0):
    logits = scale * torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed))
    return logits.log_softmax(1).topk(k, dim=1)


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 40),
    width=st.integers(1, 20),
    vocab=st.integers(2, 60),
    part=st.floats(0, 1),
    ignored=st.sampled_from([0.0, 0.3]),
    softcap=st.sampled_from([None, 5.0]),
    with_bias=st.booleans(),
    chunk=st.integers(1, 50),
)
def test_topk_equals_full_logits_in_float64(seed, tokens, width, vocab, part, ignored, softcap, with_bias, chunk):
    hidden, weight, bias, labels = case(seed, tokens, width, vocab, ignored)
    labels[0] = 0
    bias = bias if with_bias else None
    log_probs, ids = likeliest(seed + 1, tokens, vocab, 1 + int(part * (vocab - 1)))
    exact = leaves(hidden, weight, bias, dtype=torch.float64)
    expected = by_definition(full_logits(*exact, softcap), log_probs, ids, labels)
    (3 * expected).backward()
    ours = leaves(hidden, weight, bias, dtype=torch.float32)
    loss = chunked_topk_divergence(ours[0], Head(ours[1], ours[2], softcap), log_probs, ids, labels, chunk)
    (3 * loss).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(ours, exact, strict=True):
        if got is not None:
            assert (got.grad.double() - want.grad).norm() <= 1e-5 * want.grad.norm() + 1e-6


def test_topk_in_float64_passes_gradcheck():
    hidden, weight, bias, labels = case(0, 5, 4, 7, 0.0)
    labels[2] = -100
    log_probs, ids = likeliest(1, 5, 7, 3)
    torch.autograd.gradcheck(
        lambda h, w, b: chunked_topk_divergence(h, Head(w, b, 4.0), log_probs.double(), ids, labels, 2),
        leaves(hidden, weight, bias, dtype=torch.float64),
    )


def test_topk_where_the_student_is_sure_of_them():
    """The others share e^-100 or less, of which 1 minus the sum of the likeliest knows nothing."""
    hidden, weight, _, labels = case(0, 20, 8, 30, 0.0)
    ids = (hidden @ weight.T).topk(4, dim=1)[1]
    log_probs = torch.full(ids.shape, 0.2).log()
    exact, ours = leaves(300 * hidden, weight, dtype=torch.float64), leaves(300 * hidden, weight, dtype=torch.float32)
    expected = by_definition(full_logits(*exact, None, None), log_probs, ids, labels)
    expected.backward()
    loss = chunked_topk_divergence(ours[0], Head(ours[1]), log_probs, ids, labels, 7)
    loss.backward()
    assert relative(loss.detach(), expected.detach()) < 1e-5
    for got, want in zip(ours, exact, strict=True):
        assert relative(got.grad, want.grad) < 1e-4


def test_rounded_shares_of_more_than_1_stay_finite():
    hidden, weight, _, labels = case(0, 20, 8, 30, 0.0)
    log_probs, ids = likeliest(1, 20, 30, 10, scale=20.0)
    log_probs = (log_probs + 1e-3).half().float()
    assert (log_probs.exp().sum(1) > 1).any()
    exact, ours = leaves(hidden, weight, dtype=torch.float64), leaves(hidden, weight, dtype=torch.float32)
    expected = by_definition(full_logits(*exact, None, None), log_probs, ids, labels)
    expected.backward()
    loss = chunked_topk_divergence(ours[0], Head(ours[1]), log_probs, ids, labels)
    loss.backward()
    assert relative(loss.detach(), expected.detach()) < 1e-5 and relative(ours[0].grad, exact[0].grad) < 1e-5


def test_with_all_tokens_it_is_the_forward_divergence():
    hidden, weight, bias, labels = case(0, 33, 16, 50, 0.2)
    taught, teacher_weight, _, _ = case(1, 33, 24, 50, 0.0)
    log_probs, ids = (taught @ teacher_weight.T).log_softmax(1).topk(50, dim=1)
    one, two = leaves(hidden, weight, bias, dtype=torch.float32), leaves(hidden, weight, bias, dtype=torch.float32)
    got = chunked_topk_divergence(one[0], Head(one[1], one[2]), log_probs, ids, labels, 7)
    want = chunked_divergence(two[0], Head(two[1], two[2]), taught, Head(teacher_weight), labels, 1.0, 7)
    assert relative(got.detach(), want.detach().double()) < 1e-5
    got.backward()
    want.backward()
    for a, b in zip(one, two, strict=True):
        assert relative(a.grad, b.grad.double()) < 1e-5


@hypothesis_settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), vocab=st.integers(3, 40))
def test_more_tokens_never_lower_the_divergence(seed, vocab):
    """Telling merged tokens apart can only show more of a difference (the data processing inequality)."""
    hidden, weight, _, labels = case(seed, 6, 8, vocab, 0.0)
    log_probs, ids = likeliest(seed + 1, 6, vocab, vocab)
    head = Head(weight.double())
    values = [
        float(chunked_topk_divergence(hidden.double(), head, log_probs[:, :k].double(), ids[:, :k], labels))
        for k in range(1, vocab + 1)
    ]
    # float32 log-probabilities of a sum of 1 to seven digits
    assert all(more >= less - 1e-5 for less, more in pairwise(values)) and values[0] >= -1e-6


# --- the cache


@hypothesis_settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 9),
    per_shard=st.integers(1, 5),
    batch=st.integers(1, 4),
    k=st.integers(1, VOCAB + 5),
    vocab=st.sampled_from([None, 60]),
    chunk=st.integers(1, 40),
)
def test_a_cache_holds_the_likeliest_tokens_of_full_logits(tmp_path_factory, count, per_shard, batch, k, vocab, chunk):
    teacher, windows = tiny_model("gemma2"), tiny_tokens(count, LENGTH)
    folder, told = tmp_path_factory.mktemp("cache"), []
    cache_teacher(
        teacher, windows, folder, k=k, batch=batch, vocab=vocab, shard_tokens=per_shard * LENGTH + 1, chunk=chunk,
        on_progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    cached = CachedTeacher(folder, windows)
    with torch.no_grad():
        expected = teacher(windows).logits[..., :vocab].log_softmax(-1)
    order = torch.randperm(count)
    log_probs, ids = cached.rows(order)
    assert log_probs.dtype == torch.float32 and ids.dtype == torch.int64
    assert cached.k == min(k, vocab or VOCAB) and cached.vocab == (vocab or VOCAB)
    # every value is that of its token, to float16, and no token left out is likelier
    torch.testing.assert_close(log_probs, expected[order].gather(-1, ids), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_probs, expected[order].topk(cached.k)[0], rtol=1e-3, atol=1e-3)
    assert told[-1] == (count, count) and told == sorted(told)
    index = json.loads((folder / "index.json").read_text())
    assert len(index["shards"]) == -(-count // per_shard)


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    teacher = tiny_model("llama", vocab_size=70_000, num_hidden_layers=1)
    with torch.no_grad():
        teacher.lm_head.weight[69_999] = 5 * teacher.lm_head.weight[:100].sum(0)
    windows = tiny_tokens(2, LENGTH)
    cached = cache_teacher(teacher, windows, tmp_path / "cache", k=3)
    with torch.no_grad():
        expected = teacher(windows).logits.topk(3)[1]
    assert torch.equal(cached.rows(torch.arange(2))[1], expected) and (expected > 1 << 16).any()
    assert np.dtype(json.loads((tmp_path / "cache" / "index.json").read_text())["dtype"]) == np.dtype("<u4")


class Counted:
    """Counts the windows that a model's base reads."""

    def __init__(self, model):
        self.windows = 0
        model.base_model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.windows += len(kwargs["input_ids"])


def test_a_stopped_cache_goes_on_after_its_last_shard(tmp_path):
    teacher, windows = tiny_model("llama"), some_windows()
    counted = Counted(teacher)

    def stop(done, total):
        if done == 7:
            raise KeyboardInterrupt

    options = {"k": 5, "batch": 1, "shard_tokens": 3 * LENGTH}
    cache_teacher(teacher, windows, tmp_path / "whole", **options)
    counted.windows = 0
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(teacher, windows, tmp_path / "cache", **options, on_progress=stop)
    with pytest.raises(ShearlingError, match=r"index\.json: cannot be read; finish the cache"):
        CachedTeacher(tmp_path / "cache")
    # what a killed process leaves half-written
    (tmp_path / "cache" / ".shard-00002.bin.1.unfinished").write_bytes(b"half")
    assert counted.windows == 7
    cache_teacher(teacher, windows, tmp_path / "cache", **options)
    assert counted.windows == 7 + 4
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "cache" / file.name).read_bytes()
    # a finished one is not made again
    cache_teacher(teacher, windows, tmp_path / "cache", **options)
    assert counted.windows == 11


def test_unusable_caches_are_named(tmp_path):
    teacher, windows = tiny_model("llama"), some_windows()
    folder = tmp_path / "cache"
    options = {"k": 5, "shard_tokens": 3 * LENGTH}
    cache_teacher(teacher, windows, folder, **options)
    for other, message in [
        ((teacher, some_windows(9), folder), "windows="),
        ((tiny_model("llama", seed=1), windows, folder), "teacher_digest="),
    ]:
        with pytest.raises(ShearlingError, match=f"a cache with {message}.*give another folder"):
            cache_teacher(*other, **options)
    with pytest.raises(ShearlingError, match="a cache with k=5, this one has 6"):
        cache_teacher(teacher, windows, folder, **{**options, "k": 6})
    with pytest.raises(ShearlingError, match="a cache of other windows"):
        CachedTeacher(folder, some_windows(9))
    with pytest.raises(ShearlingError, match=f"vocabulary of {VOCAB}, the model's is 50"):
        train(tiny_model("llama", vocab_size=50), windows % 50, [Distillation(CachedTeacher(folder))], SETTINGS)
    with pytest.raises(ShearlingError, match="holds 10 windows, none has the index 10"):
        CachedTeacher(folder).rows(torch.tensor([10]))
    with pytest.raises(ShearlingError, match="token ids 3 to 96; the teacher's vocabulary is 0 to 49"):
        cache_teacher(tiny_model("llama", vocab_size=50), windows, tmp_path / "small")
    with pytest.raises(ShearlingError, match="vocab at most the teacher's 97"):
        cache_teacher(teacher, windows, tmp_path / "large", vocab=98)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(ShearlingError, match="holds files but no cache"):
        cache_teacher(teacher, windows, foreign)
    with pytest.raises(ShearlingError, match="is a file"):
        cache_teacher(teacher, windows, foreign / "notes.txt")
    for kind, temperature in (("reverse", 1.0), ("forward", 2.0)):
        with pytest.raises(ShearlingError, match="a cached teacher gives only forward at 1"):
            Distillation(CachedTeacher(folder), kind=kind, temperature=temperature)


def test_damaged_shards_are_named(tmp_path):
    teacher, windows, folder = tiny_model("llama"), some_windows(), tmp_path / "cache"
    options = {"k": 5, "shard_tokens": 3 * LENGTH}
    cached = cache_teacher(teacher, windows, folder, **options)
    whole = cached.rows(torch.arange(10))
    shard = folder / "shard-00001.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ShearlingError, match=r"shard-00001\.bin: ends early"):
        cached.rows(torch.tensor([5]))
    with pytest.raises(ShearlingError, match=rf"shard-00001\.bin: has {len(content) - 1} bytes instead of"):
        CachedTeacher(folder)
    shard.unlink()
    with pytest.raises(ShearlingError, match=r"shard-00001\.bin: cannot be read \(No such file"):
        cached.rows(torch.tensor([5]))
    with pytest.raises(ShearlingError, match=r"shard-00001\.bin: is missing; delete index\.json"):
        CachedTeacher(folder)
    # and the remedy works
    (folder / "index.json").unlink()
    again = cache_teacher(teacher, windows, folder, **options)
    assert all(torch.equal(a, b) for a, b in zip(again.rows(torch.arange(10)), whole, strict=True))
    (folder / "header.json").write_text("{")
    with pytest.raises(ShearlingError, match=r"header\.json: cannot be read"):
        cache_teacher(teacher, windows, folder, **options)


def test_a_full_disk_is_named_and_costs_one_shard(tmp_path, monkeypatch):
    teacher, windows, folder = tiny_model("llama"), some_windows(), tmp_path / "cache"
    counted, write = Counted(teacher), Path.write_bytes

    def full(path, content):
        if "shard-00001" in path.name:
            write(path, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    options = {"k": 5, "shard_tokens": 4 * LENGTH}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(ShearlingError, match=r"shard-00001\.bin: cannot be written \(No space left"):
            cache_teacher(teacher, windows, folder, **options)
    assert sorted(file.name for file in folder.iterdir()) == ["header.json", "shard-00000.bin"]
    cache_teacher(teacher, windows, folder, **options)
    assert counted.windows == 8 + 6


# --- in training


class Indices(Policy):
    """Checks that the indices are those of the windows at hand."""

    def __init__(self, windows):
        self.windows, self.seen = windows, 0

    def loss_terms(self, ctx):
        assert ctx.indices.dtype == torch.int64 and ctx.indices.device.type == "cpu"
        assert torch.equal(self.windows[ctx.indices], ctx.input_ids)
        self.seen += len(ctx.indices)
        return {}


def test_a_cache_of_all_tokens_teaches_as_the_teacher_does(tmp_path):
    windows, teacher = some_windows(), tiny_model("llama", seed=1)
    cached = cache_teacher(teacher, windows, tmp_path / "cache", k=VOCAB, shard_tokens=3 * LENGTH)
    follow = Indices(windows)
    got = train(tiny_model("llama"), windows, [Distillation(cached, weight=0.5), follow], SETTINGS)
    want = train(tiny_model("llama"), windows, [Distillation(teacher, weight=0.5)], SETTINGS)
    assert got.losses == pytest.approx(want.losses, rel=2e-3)
    assert got.losses[-1] < got.losses[0] and follow.seen == 6 * 4


def test_few_cached_tokens_pull_towards_the_teacher(tmp_path):
    windows, teacher = some_windows(), tiny_model("llama", seed=1)
    cached = cache_teacher(teacher, windows, tmp_path / "cache", k=8)
    model = tiny_model("llama")

    def distance():
        with torch.no_grad():
            p, q = (m(windows).logits.log_softmax(-1) for m in (teacher, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    before = distance()
    train(model, windows, [Distillation(cached)], SETTINGS)
    assert distance() < 0.8 * before


# --- offloaded


@pytest.mark.parametrize("family", FAMILIES)
def test_an_offloaded_model_computes_the_same_bits(family):
    model, others = tiny_model(family), [tiny_tokens(), tiny_tokens(3, 9, seed=1)]
    model.get_output_embeddings().weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        expected = [hidden_states(model, ids) for ids in others]
    with offloaded(model, "cpu"), torch.no_grad():
        # over and over: with three blocks in two places each pass finds other guests
        for _ in range(2):
            assert all(torch.equal(hidden_states(model, ids), e) for ids, e in zip(others, expected, strict=True))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(t, tensors[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # no tensor shares its memory with a whole block
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_an_error_inside_a_block_leaves_no_trace():
    model, ids = tiny_model("llama"), tiny_tokens()
    with torch.no_grad():
        expected = hidden_states(model, ids)

    def fail(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with offloaded(model, "cpu"), torch.no_grad():
        for layer in (1, 2, 0):
            handle = model.model.layers[layer].mlp.register_forward_pre_hook(fail)
            with pytest.raises(torch.OutOfMemoryError):
                hidden_states(model, ids)
            handle.remove()
            assert torch.equal(hidden_states(model, ids), expected)


def test_an_offloaded_teacher_teaches_the_same_bits():
    def losses(away):
        teacher = tiny_model("llama", seed=1)
        if not away:
            return train(tiny_model("llama"), some_windows(), [Distillation(teacher)], SETTINGS).losses
        with offloaded(teacher, "cpu"):
            return train(tiny_model("llama"), some_windows(), [Distillation(teacher)], SETTINGS).losses

    assert losses(True) == losses(False)


# --- compiled, and in another precision


def test_a_compiled_teacher_gives_the_same_losses_from_blocks_and_head():
    def losses(within):
        model = tiny_model("llama", seed=1, num_hidden_layers=1)
        student = tiny_model("llama", num_hidden_layers=1)
        settings = TrainSettings(**{**vars(SETTINGS), "micro_batch": 4, "tokens": 2 * 4 * LENGTH})
        teacher = Teacher(model)
        with within(model):
            policies = [Distillation(teacher), LayerwiseDistillation(teacher, weight=0.5)]
            return train(student, some_windows(), policies, settings).losses

    assert losses(compiled) == pytest.approx(losses(nullcontext), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_precision_is_that_of_a_checkpoint_loaded_so(family, tmp_path):
    model, ids = tiny_model(family), tiny_tokens()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    copied = in_dtype(model, torch.bfloat16)
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16} and model.dtype == torch.float32
    assert (copied.lm_head.weight is copied.get_input_embeddings().weight) == model.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.equal(copied(ids).logits, loaded(ids).logits)
    assert in_dtype(model, torch.float32) is model


def test_a_bfloat16_teacher_teaches_nearly_the_same():
    teacher = tiny_model("llama", seed=1)
    exact = train(tiny_model("llama"), some_windows(), [Distillation(teacher)], SETTINGS)
    coarse = train(tiny_model("llama"), some_windows(), [Distillation(in_dtype(teacher, torch.bfloat16))], SETTINGS)
    assert coarse.losses == pytest.approx(exact.losses, rel=3e-2) and coarse.losses != exact.losses


# --- on a device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOffloadedOnCuda:
    def test_the_same_bits_in_the_memory_of_two_blocks(self):
        teacher = tiny_model("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=16).cuda()
        batches = [tiny_tokens(4, 32, seed=n).cuda() for n in range(6)]
        size = sum(p.nbytes for p in teacher.parameters())
        block = sum(p.nbytes for p in teacher.model.layers[0].parameters())
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            expected = [hidden_states(teacher, ids) for ids in batches]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        resident = torch.cuda.memory_allocated()
        with offloaded(teacher, "cuda"):
            away = torch.cuda.memory_allocated()
            assert resident - away > size - 3 * block
            torch.cuda.reset_peak_memory_stats()
            with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
                found = [hidden_states(teacher, ids) for ids in batches]
            torch.cuda.synchronize()
            # besides the two places: activations of 128 tokens, and one block's weights cast by autocast
            assert torch.cuda.max_memory_allocated() - away < 2 * block
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
        assert {p.device.type for p in teacher.parameters()} == {"cuda"}
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            assert torch.equal(hidden_states(teacher, batches[0]), expected[0])

    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_teaches_the_same_bits(self, family):
        def losses(away):
            teacher = tiny_model(family, seed=1)
            student = tiny_model(family).cuda()
            if not away:
                return train(student, some_windows(), [Distillation(teacher.cuda())], SETTINGS).losses
            with offloaded(teacher, "cuda"):
                shared = Teacher(teacher, device=torch.device("cuda"))
                return train(student, some_windows(), [Distillation(shared)], SETTINGS).losses

        assert losses(True) == losses(False)
