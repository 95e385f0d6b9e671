"""The training loop."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.captured import NotCapturable
from shearling.data import Domains, MemoryWindows, Windows
from shearling.errors import ShearlingError
from shearling.events import OnEvent
from shearling.train.checkpoint import Checkpoints
from shearling.train.compiled import compiled
from shearling.train.documents import document_positions, next_tokens
from shearling.train.events import Clock
from shearling.train.flops import forward_flops, peak_flops
from shearling.train.gradients import Gradients, compute_type
from shearling.train.head import narrow_stream, output_head
from shearling.train.optimizers import build_optimizers
from shearling.train.policy import Policy, StepContext
from shearling.train.recompute import recomputed
from shearling.train.resume import Counters, Run
from shearling.train.sampler import MixtureSampler, WindowSampler, derived_seed
from shearling.train.settings import TrainSettings
from shearling.train.shard import Sharding
from shearling.train.signals import StopSignals
from shearling.train.validation import Validation, validation_losses, validation_parts
from shearling.train.world import average_whole_, clip_, join, total_norm

#: steps without a finite loss and gradient, in a row, after which training is given up
MAX_SKIPPED = 5


@dataclass(frozen=True)
class TrainResult:
    """What a run did, over all its sessions.

    ``losses`` has the total loss of every step, NaN or infinite where it was ``skipped``; ``stopped`` says that a
    signal ended the run before its budget; ``edits`` are what the policies' ``finalize`` returned, in order;
    ``best_step`` is the step whose parameters the model has where the best ones were to be kept; ``weights`` are those
    of the domains at the end, with which another run may go on.
    """

    steps: int
    tokens: int
    seconds: float
    losses: tuple[float, ...]
    stopped: bool
    skipped: int = 0
    edits: tuple[Any, ...] = field(default=(), repr=False)
    best_step: int | None = None
    weights: dict[str, float] = field(default_factory=dict)


def train(
    model: Any,
    windows: Tensor | Windows,
    policies: Sequence[Policy],
    settings: TrainSettings,
    *,
    validation: Validation | None = None,
    state_dir: Path | None = None,
    on_event: OnEvent | None = None,
) -> TrainResult:
    """Train a causal language model on windows [n, T] of token ids (``T = settings.length``), in place.

    Windows are a tensor, ``PackedWindows`` that stay on disk, or ``Domains``, which are drawn by weights.

    ``model`` is a transformers causal language model; policies (see ``Policy``) add losses, parameters and actions.
    ``validation`` [m, T] is scored every ``validate_every`` steps and at the end; where domains have theirs, the mean
    over them counts, and policies may then change the weights by which windows are drawn. With ``state_dir``,
    checkpoints go there, and a folder that holds one is resumed: the result is then, to the bit, that of a run never
    interrupted (same torch, device and thread count), given the same model and arguments. The last checkpoint is left
    there.

    Under ``torchrun`` all processes call this alike, with the same arguments: each reads its part of every batch, and
    parameters are shared out by FSDP2 until the end, when every process has the whole model.

    SIGTERM and SIGINT end the run after the step at hand, with a checkpoint; policies are finalized, so the model is
    always left stock unless an exception is raised. A step that runs out of memory is done again with half of the
    micro-batch. Step, loss, learning rate, tokens, speed, gradient norm and time left go to ``on_event`` every
    ``log_every`` steps; ``validation_loss``, ``warning`` and ``resumed`` come as events of their own.

    Raises ShearlingError for unusable windows or settings, a checkpoint of another run, an unwritable ``state_dir``,
    or five steps in a row without a finite loss and gradient.
    """
    device = next(model.parameters()).device
    vocab = output_head(model).weight.shape[0]
    text: Windows = MemoryWindows(windows) if isinstance(windows, Tensor) else windows
    _check_windows("windows", text, settings, vocab)
    for name, part in validation_parts(validation).items():
        _check_windows(name.replace("_loss", "", 1), MemoryWindows(part), settings, vocab)
    if settings.keep == "best" and validation is None:
        raise ShearlingError("keep='best': needs validation windows to choose by")
    domains = text.names if isinstance(text, Domains) else ()
    for policy in policies:
        policy.check_domains(domains, tuple(validation) if isinstance(validation, Mapping) else ())
    world = join()
    if settings.batch % world.size:
        raise ShearlingError(f"batch={settings.batch}: must be a multiple of the {world.size} processes")
    gradients = Gradients(policies, settings, device, world)
    frozen_before = {name: p.requires_grad for name, p in model.named_parameters()}
    training_before = model.training
    emit = on_event or (lambda event: None)
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda), StopSignals() as signals, ExitStack() as stack:
            torch.manual_seed(derived_seed(settings.seed, "attach"))
            forward = forward_flops(model, settings.length)
            for policy in policies:
                policy.attach(model, settings)
            sharding = Sharding(model, world, compute_type(device, settings))
            optimizers = build_optimizers(model, policies, settings)
            mixed = isinstance(text, Domains)
            sampler = MixtureSampler(text, settings.seed) if mixed else WindowSampler(len(text), settings.seed)
            background = device.type == "cuda"
            checkpoints = None if state_dir is None else Checkpoints(state_dir, world, background=background)
            run = Run(model, optimizers, sampler, tuple(policies), settings, text, checkpoints, world)
            counters = run.resume(emit)
            clock = Clock(counters, _flops_per_token(run, forward), peak_flops(device, world.size))
            model.train()
            stack.enter_context(narrow_stream(model, compute_type(device, settings)))
            stack.enter_context(compiled(model) if settings.compile else nullcontext())
            stack.enter_context(recomputed(model) if settings.recompute else nullcontext())
            stopping = world.any(signals.stopped)
            while counters.step < settings.steps and not stopping:
                event = _step(run, counters, gradients, device, emit)
                clock.tick(counters)
                last = counters.step == settings.steps
                if "warning" in event:
                    emit(event)
                elif last or counters.step == 1 or counters.step % settings.log_every == 0:
                    emit(clock.report(event, counters, settings))
                if counters.skipped_in_row == MAX_SKIPPED:
                    raise ShearlingError(
                        f"step {counters.step}: {MAX_SKIPPED} steps in a row without a finite loss and gradient; "
                        f"lower the learning rate (now {settings.learning_rate:g}) or use a wider dtype"
                    )
                if validation is not None and (last or _due(counters.step, settings.validate_every)):
                    metrics = validation_losses(model, validation, settings, world)
                    for policy in policies:
                        policy.on_eval(metrics)
                        sampler.weights = policy.reweight(sampler.weights, metrics)
                    emit({"step": counters.step, **metrics})
                    run.validated(counters, metrics["validation_loss"])
                # only now, since events may take long and a signal may come to one process alone
                stopping = world.any(signals.stopped)
                if last or stopping or _due(counters.step, settings.checkpoint_every):
                    run.save(counters)
            stopped = counters.step < settings.steps
            if checkpoints is not None:
                checkpoints.wait()
            if not stopped:
                run.take_best()
            sharding.undo()
            edits = tuple(edit for policy in policies for edit in policy.finalize())
    except NotCapturable as error:
        raise ShearlingError(f"capture: {error}; leave it off") from error
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen_before.get(name, parameter.requires_grad))
            parameter.grad = None
        model.train(training_before)
    tokens = counters.step * settings.tokens_per_step
    return TrainResult(
        counters.step,
        tokens,
        counters.seconds,
        tuple(counters.losses),
        stopped,
        counters.skipped,
        edits,
        counters.best_step,
        sampler.weights,
    )


def _flops_per_token(run: Run, forward: float) -> float:
    """FLOPs of training on one token: weights that are not trained need no gradients, recomputation does not count."""
    sizes = [(p.numel(), p.requires_grad) for p in run.model.parameters()]
    trained = sum(size for size, flag in sizes if flag) / sum(size for size, _ in sizes)
    own = sum(policy.flops_per_token(run.settings.length) for policy in run.policies)
    return (2 + trained) * forward + own


def _step(run: Run, counters: Counters, gradients: Gradients, device: torch.device, emit: OnEvent) -> dict[str, Any]:
    """One optimizer step; returns its event without the running quantities."""
    settings, optimizers, policies = run.settings, run.optimizers, run.policies
    step = counters.step
    indices = run.world.share(run.sampler.take(settings.batch))
    for notice in run.sampler.notices:
        emit({"step": step + 1, "warning": notice})
    ids = run.windows[indices]
    if device.type == "cuda" and ids.device.type == "cpu":
        # or the host would wait for the copy, and so for the updates of the step before
        ids = ids.pin_memory()
    ids = ids.to(device, non_blocking=True).long()
    rate = settings.rate(step)
    optimizers.set_rate(rate)
    ctx, loss = _loss(run, counters, gradients, ids, indices, rate, emit)
    found = optimizers.gradients
    average_whole_(run.world, found)
    norm = total_norm(found)
    loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()
    counters.step += 1
    counters.losses.append(loss_value)
    event: dict[str, Any] = {"step": counters.step, "learning_rate": settings.learning_rate * rate}
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        counters.skipped += 1
        counters.skipped_in_row += 1
        what = "gradient" if math.isfinite(loss_value) else "loss"
        return {**event, "warning": f"the {what} is not finite; the step was skipped", "skipped": counters.skipped}
    counters.skipped_in_row = 0
    if settings.clip is not None:
        clip_(found, settings.clip, norm)
    for policy in policies:
        policy.after_backward(ctx)
    optimizers.step()
    for policy in policies:
        policy.after_step(ctx)
    return {**event, "grad_norm": norm_value, **run.sampler.metrics(), **ctx.metrics}


def _loss(
    run: Run, counters: Counters, gradients: Gradients, ids: Tensor, indices: Tensor, rate: float, emit: OnEvent
) -> tuple[StepContext, Tensor]:
    """Loss of one batch, and its gradients, in as large parts as memory allows."""
    settings = run.settings
    while True:
        rng = torch.Generator().manual_seed(derived_seed(settings.seed, "policies", counters.step))
        for policy in run.policies:
            policy.begin_step(counters.step, rng)
        # seeded anew each step, so that resuming needs no generator's state
        torch.manual_seed(derived_seed(settings.seed, "step", counters.step, *run.world.beside))
        # a captured step adds to the same tensors for ever
        run.optimizers.zero_grad(keep=settings.capture)
        labels, places = next_tokens(ids, settings.separator), document_positions(ids, settings.separator)
        ctx = StepContext(counters.step, settings.steps, run.model, ids.device, rate, ids, labels, indices, places)
        try:
            loss = gradients(ctx, ids, counters.micro_batch)
            return ctx, run.world.mean_(loss)
        except torch.OutOfMemoryError as error:
            _take_less(counters, run, emit, error)
        # out of the handler, where the error held on to the activations
        del ctx
        gc.collect()
        torch.cuda.empty_cache()


def _take_less(counters: Counters, run: Run, emit: OnEvent, error: torch.OutOfMemoryError) -> None:
    """Halve the micro-batch, and say so; ShearlingError where it is one window already, or other processes wait."""
    settings = run.settings
    if run.world.size > 1:
        raise ShearlingError(
            f"step {counters.step + 1}: process {run.world.rank} is out of memory; give a micro_batch below "
            f"{counters.micro_batch}, or recompute activations, and resume"
        ) from error
    if counters.micro_batch == 1:
        raise ShearlingError(
            f"step {counters.step + 1}: out of memory with one window of {settings.length} tokens at a time; shorten "
            "length, recompute activations, or train fewer parameters"
        ) from error
    before = counters.micro_batch
    counters.micro_batch = (before + 1) // 2
    emit(
        {
            "step": counters.step + 1,
            "warning": f"out of memory; {counters.micro_batch} windows at a time instead of {before}, the batch stays",
        }
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_windows(name: str, windows: Windows, settings: TrainSettings, vocab: int) -> None:
    shape = windows.shape
    if len(shape) != 2 or not shape[0]:
        raise ShearlingError(f"{name}: shape {shape}; must be [windows, tokens] with at least one window")
    if shape[1] != settings.length:
        raise ShearlingError(f"{name}: {shape[1]} tokens a window; length={settings.length} asks for another")
    low, high = windows.token_range()
    if low < 0 or high >= vocab:
        raise ShearlingError(f"{name}: token ids {low} to {high}; the model's vocabulary is 0 to {vocab - 1}")
