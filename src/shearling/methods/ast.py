"""AST (arXiv 2407.20584): retraining towards 2:4 while the mask follows the weights.

    m              keeps N of every M weights by score, chosen anew every ``refresh_every`` steps
    W~ = m . W     is multiplied; its gradient g goes to all of W, so what is masked may come back
    lam(t)         decay of masked weights: rises linearly to its full strength over a share of the steps (Eq. 2)
    r_t, r0_t      share of the mask that changed since the last refresh, and since the start

    m1 <- b1 m1 + (1 - b1) g,   u = m1 + lam(t) (1 - m) . W                  decay stays out of the first moment
    m2 <- b2 m2 + (1 - b2) q^2,   W <- W - lr / (1 - b1^t) u / (sqrt(m2 / (1 - b2^t)) + eps)

q is g (Adam's own second moment) or u (the paper's). Decay takes no weight past zero, also where no gradient ever came
and sqrt(m2) is next to nothing. The appendix with the paper's hyper-parameters was not at hand.

Its relatives differ in little: no refresh is a fixed mask; no annealing is static SR-STE (arXiv 2102.04010) but for its
momentum; lam = 0 is Dynamic Pruning with Feedback (2006.07253); ``coupled`` adds the decay to g, as the release does
for LLaMA; ``l1`` takes lam instead of lam W from a masked weight, in the sense of CAST (2509.25996); ``soft``
multiplies S-STE's softly thresholded weight (2409.09099).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.pytorch_utils import Conv1D

from shearling.anatomy import Anatomy
from shearling.errors import ShearlingError
from shearling.kernels import triton_usable
from shearling.kernels.tables import Table, table_of
from shearling.methods.slorb import activation_svd, block_mean, truncated_svd
from shearling.nn import (
    EffectiveLinear,
    FakeQuantTransform,
    LowRankBranch,
    MaskTransform,
    SoftThreshold,
    StraightMask,
    unwrap_,
    wrap_,
)
from shearling.plan import Delta, Edit, Grid, Masks
from shearling.plan.patterns import Pattern, mask_of, num_kept
from shearling.recipe import AST, SLoRB
from shearling.surgery import adapters_of
from shearling.sweep import Moments, Walk
from shearling.train import Policy, StepContext, TrainSettings, decay_groups, join


def annealed(step: int, steps: int, decay: float, share: float) -> float:
    """lam(t) of Eq. 2 for a step counted from 0, annealed over a share of all steps."""
    return decay if step >= share * steps else decay * step / (share * steps)


@dataclass(frozen=True)
class Strength:
    """What one step does: learning rate, lam(t), and how the decay acts (see the module)."""

    rate: float
    decay: float
    how: str = "decoupled"
    second_moment: str = "adam"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8


@torch.no_grad()
def annealed_adam_(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, mask: Tensor, step: int, strength: Strength
) -> None:
    """One update of a weight and its moments in place; ``step`` counts from 1."""
    b1, b2 = strength.betas
    rate = strength.rate / (1 - b1**step)
    weight.mul_(1 - strength.rate * strength.weight_decay)
    masked = weight.masked_fill(mask, 0.0)
    # the decay as a gradient
    pull = (masked.sign() if strength.how == "l1" else masked) * strength.decay
    if strength.how == "coupled":
        gradient = gradient + pull
    first.lerp_(gradient, 1 - b1)
    seen = first + pull if strength.second_moment == "ast" else gradient
    second.mul_(b2).addcmul_(seen, seen, value=1 - b2)
    size = (second / (1 - b2**step)).sqrt_().add_(strength.eps)
    if strength.how != "coupled":
        weight.sub_(torch.minimum(rate * pull.abs_() / size, masked.abs()).copysign_(masked))
    weight.addcdiv_(first, size, value=-rate)


class AnnealedAdamW(torch.optim.Optimizer):
    """Adam over masked weights, with the decay of ``annealed_adam_``; ``strength`` is set before every step."""

    def __init__(self, weights: Iterable[nn.Parameter], masks: Iterable[Tensor], strength: Strength) -> None:
        super().__init__(weights, {})
        self.masks = list(masks)
        self.strength = strength
        self._weights: list[nn.Parameter] = [p for group in self.param_groups for p in group["params"]]
        # beside the state, whose tensors take long to count up and to read
        self._steps = [0] * len(self._weights)
        self._table: Table | None = None
        #: which weights the table is of, and where their gradients lie
        self._key: list[tuple[int, int]] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyrefly: ignore[bad-override]
        due: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
        for index, weight in enumerate(self._weights):
            if (gradient := weight.grad) is not None:
                self._steps[index] += 1
                due[self._steps[index]].append((index, _local(gradient)))
        for number, found in due.items():
            key = [(index, gradient.data_ptr()) for index, gradient in found]
            if self._table is None or key != self._key:
                tensors = [self._tensors(index, gradient) for index, gradient in found]
                if not _fusable(tensors):
                    for each in tensors:
                        annealed_adam_(*each, number, self.strength)
                    continue
                from shearling.kernels.annealed_adam import BLOCK

                self._table, self._key = table_of(list(zip(*tensors, strict=True)), BLOCK), key
            from shearling.kernels.annealed_adam import annealed_adam

            # one launch for all of them
            annealed_adam(self._table, number, **vars(self.strength))

    def _tensors(self, index: int, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """This process' part of a weight, its gradient as given, its moments and its mask."""
        weight = self._weights[index]
        state = self.state[weight]
        if not state:
            state |= {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        first, second = _local(state["exp_avg"]), _local(state["exp_avg_sq"])
        return _local(weight), gradient, first, second, _part(self.masks[index], weight)

    def state_dict(self) -> dict[str, Any]:
        for weight, count in zip(self._weights, self._steps, strict=True):
            if count:
                self.state[weight]["step"] = torch.tensor(float(count))
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._steps = [int(self.state[weight]["step"]) if weight in self.state else 0 for weight in self._weights]
        # moments are other tensors now
        self._table = None


def _fusable(tensors: Sequence[tuple[Tensor, ...]]) -> bool:
    """Whether kernels take these weights, in float32, and what lies beside them."""
    plain = all(t.is_contiguous() and not isinstance(t, DTensor) for each in tensors for t in each)
    return plain and all(each[0].dtype == torch.float32 for each in tensors) and triton_usable(tensors[0][0])


class Refresh(NamedTuple):
    """What choosing the masks anew after ``step`` steps changed: r_t, r0_t, and lam |W| over |m1| of what is masked."""

    step: int
    flip_rate: float
    flips_from_start: float
    decay_ratio: float


class ASTPolicy(Policy):
    """Retrains a masked model under ``settings``; all parameters are trained, masked weights by AnnealedAdamW.

    ``masks`` (by full tensor name, as stored) are where it starts; without them the score of the model's weights says
    it. ``pattern`` is N:M, or the share of each row that goes. ``norms`` are Euclidean norms [in] of the linears'
    inputs, by the names of their weights, for ``score = activation``. What is masked need not be zero at the start: it
    is what may come back. ``finalize`` leaves the stock model with exact zeros under the last masks, which it returns.

    Raises ShearlingError for inputs that the pattern does not divide.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        pattern: Pattern | float,
        settings: AST,
        masks: Mapping[str, Tensor] | None = None,
        norms: Mapping[str, Tensor] | None = None,
    ) -> None:
        if settings.needs_norms and norms is None:
            raise ShearlingError("score = activation, start = activation-svd: need the norms of the linears' inputs")
        if settings.forward == "soft" and not isinstance(pattern, Pattern):
            raise ShearlingError("forward = soft: needs an N:M pattern")
        self.pattern, self.settings = pattern, settings
        self.paths = [anatomy.path(n, linear) for n in range(anatomy.num_layers) for linear in anatomy.family.linears]
        self._start, self._norms = dict(masks or {}), dict(norms or {})
        self._model: Any = None
        self._linears: dict[str, EffectiveLinear] = {}
        self._optimizer: AnnealedAdamW | None = None
        self._hooks = ExitStack()
        self._table: Table | None = None
        self._grid = None if settings.quantise is None else Grid(settings.quantise, settings.group)
        self.refreshes: list[Refresh] = []

    def attach(self, model: Any, settings: TrainSettings) -> None:
        self._model, self._rate = model, settings.learning_rate
        for path in self.paths:
            # before anything changes
            module = model.get_submodule(path)
            outputs, inputs = reversed(module.weight.shape) if isinstance(module, Conv1D) else module.weight.shape
            num_kept(self.pattern, inputs)
            if self._grid is not None:
                self._grid.check(inputs)
            if self.settings.slorb is not None:
                _check_slorb(path, self.settings.slorb, outputs, inputs)
        for path, linear in wrap_(model, self.paths).items():
            name = f"{path}.weight"
            self._linears[name] = linear
            if name not in self._start:
                self._start[name] = self._chosen([name])[0]
            self._start[name] = self._start[name].to(linear.weight.device).contiguous()
            mask = self._start[name].clone()
            if self.settings.forward == "soft":
                assert isinstance(self.pattern, Pattern)
                keep, of = self.pattern.keep, self.pattern.of
                linear.transforms.append(SoftThreshold(linear.weight, mask, keep, of, linear.transposed))
            else:
                linear.transforms.append(StraightMask(mask))
            if self.settings.slorb is not None:
                missing = linear.weight.detach() - linear.effective_weight().detach()
                factors = self._factors(name, missing.T if linear.transposed else missing, self.settings.slorb)
                linear.branches.append(LowRankBranch(*factors))
            if self._grid is not None:
                linear.transforms.append(FakeQuantTransform(self._grid, linear))
            if self.settings.score == "activation-refreshed":
                for buffer in (_SQUARES, _SUMS):
                    linear.register_buffer(buffer, torch.zeros(linear.in_features, device=linear.weight.device))
                self._hooks.callback(linear.register_forward_pre_hook(_measure).remove)

    def param_groups(self) -> list[dict[str, Any]]:
        others = {id(linear.weight) for linear in self._linears.values()}
        if self.settings.slorb is not None and not self.settings.slorb.train_down:
            others |= {id(branch.down) for branch in _branches(self._linears.values())}
        return decay_groups((p for p in self._model.parameters() if id(p) not in others), self.settings.weight_decay)

    def optimizer(self) -> AnnealedAdamW:
        weights = [linear.weight for linear in self._linears.values()]
        self._optimizer = AnnealedAdamW(weights, self._masks().values(), Strength(0.0, 0.0))
        return self._optimizer

    def capturable(self) -> bool:
        return True

    def after_backward(self, ctx: StepContext) -> None:
        assert self._optimizer is not None
        own = self.settings
        decay = annealed(ctx.step, ctx.total_steps, own.decay, own.anneal)
        rate = self._rate * ctx.rate
        self._optimizer.strength = Strength(rate, decay, own.decay_by, own.second_moment, own.weight_decay)
        ctx.metrics["decay"] = decay

    @torch.no_grad()
    def after_step(self, ctx: StepContext) -> None:
        done = ctx.step + 1
        if self.settings.score == "activation-refreshed":
            self._remember()
        every, frozen = self.settings.refresh_every, (1 - self.settings.freeze) * ctx.total_steps
        if every and done % every == 0 and done <= frozen:
            self._refresh(done)
        if self.refreshes:
            last = self.refreshes[-1]._asdict()
            del last["step"]
            ctx.metrics |= last

    def _refresh(self, step: int) -> None:
        """Choose all masks anew, and tell how they moved."""
        masks, ratio = self._masks(), self._decay_ratio()
        weights = [linear.weight.detach() for linear in self._linears.values()]
        tensors = list(zip(weights, masks.values(), (self._start[name] for name in masks), strict=True))
        as_rows = not any(linear.transposed for linear in self._linears.values())
        if self.settings.score == "magnitude" and isinstance(self.pattern, Pattern) and as_rows and _fusable(tensors):
            from shearling.kernels.nm_masks import GROUPS, nm_masks

            kinds = list(zip(*tensors, strict=True))
            self._table = table_of(kinds, GROUPS * self.pattern.of, self._table)
            counts = nm_masks(self._table, self.pattern.keep, self.pattern.of)
        else:
            counts = torch.zeros(2, dtype=torch.int64, device=weights[0].device)
            for names in self._alike():
                new = self._chosen(names)
                now, start = (torch.stack([which[name] for name in names]) for which in (masks, self._start))
                counts += torch.stack([(new ^ now).sum(), (new ^ start).sum()])
                torch._foreach_copy_([masks[name] for name in names], list(new))
        total = sum(mask.numel() for mask in masks.values())
        moved, away = counts.tolist()
        self.refreshes.append(Refresh(step, moved / total, away / total, ratio))

    def _decay_ratio(self) -> float:
        """How strongly masked weights decay beside what their gradients say: sum of lam |W| over that of |m1|."""
        assert self._optimizer is not None
        strength, masks = self._optimizer.strength, self._masks()
        sums = torch.zeros(2, dtype=torch.float64, device=next(iter(masks.values())).device)
        for names in self._alike():
            weights = [self._linears[name].weight.detach() for name in names]
            gone = ~torch.stack([_part(masks[name], weight) for name, weight in zip(names, weights, strict=True)])
            moments = [self._optimizer.state[self._linears[name].weight]["exp_avg"] for name in names]
            sizes = (torch.stack([_local(t) for t in kind]).abs_().mul_(gone) for kind in (weights, moments))
            pulls, means = (size.sum(dtype=torch.float64) for size in sizes)
            sums += torch.stack([gone.sum(dtype=torch.float64) if strength.how == "l1" else pulls, means])
        pull, mean = join().sum_(sums).tolist()
        return strength.decay * pull / mean if mean else math.inf

    def _remember(self) -> None:
        """Let a step's squares of the inputs, those of all processes, into their running mean."""
        squares, sums = ([getattr(linear, name) for linear in self._linears.values()] for name in (_SQUARES, _SUMS))
        seen = join().sum_(torch.cat(sums)).split([len(part) for part in sums])
        torch._foreach_lerp_(squares, list(seen), _SHARE)
        torch._foreach_zero_(sums)

    def _masks(self) -> dict[str, Tensor]:
        """The masks that hold now, by the names of the weights."""
        found: dict[str, Tensor] = {}
        for name, linear in self._linears.items():
            transform = linear.transforms[0]
            assert isinstance(transform, MaskTransform)
            found[name] = transform.mask
        return found

    def _alike(self) -> Iterator[list[str]]:
        """Names of weights that are stored in one shape, as many as go at once: for each alone it is many launches."""
        kinds: dict[tuple[torch.Size, torch.dtype, bool], list[str]] = defaultdict(list)
        for name, linear in self._linears.items():
            kinds[linear.weight.shape, linear.weight.dtype, linear.transposed].append(name)
        for (shape, _, _), names in kinds.items():
            count = max(1, _AT_ONCE // shape.numel())
            yield from (names[at : at + count] for at in range(0, len(names), count))

    def _chosen(self, names: Sequence[str]) -> Tensor:
        """The masks that the score asks for, one after the other, of weights that are stored in one shape."""
        linears = [self._linears[name] for name in names]
        weights = [linear.weight.detach() for linear in linears]
        scores = torch.stack([w.full_tensor() if isinstance(w, DTensor) else w for w in weights]).abs_()
        scores = scores.mT if linears[0].transposed else scores
        norms = None
        if self.settings.needs_norms and self.settings.score == "activation":
            norms = torch.stack([self._norms[name].to(scores) for name in names])
        elif hasattr(linears[0], _SQUARES):
            norms = torch.stack([getattr(linear, _SQUARES) for linear in linears]).sqrt_()
        scores = scores if norms is None else scores * norms[:, None]
        masks = mask_of(scores.flatten(0, 1), self.pattern).view(scores.shape)
        return masks.mT.contiguous() if linears[0].transposed else masks

    def _factors(self, name: str, missing_OI: Tensor, slorb: SLoRB) -> tuple[Tensor, Tensor]:
        """What a branch starts from."""
        rank = slorb.rank(missing_OI.shape[1])
        match slorb.start:
            case "block-mean":
                return block_mean(missing_OI, slorb.size)
            case "svd":
                return truncated_svd(missing_OI, rank)
            case "activation-svd":
                return activation_svd(missing_OI, self._norms[name].to(missing_OI).square().diag(), rank)

    @torch.no_grad()
    def finalize(self) -> Sequence[Edit]:
        self._hooks.close()
        kept: dict[str, Tensor] = {}
        for (name, linear), mask in zip(self._linears.items(), self._masks().values(), strict=True):
            if self.settings.forward == "soft":
                (mask,) = self._chosen([name])
            for buffer in (_SQUARES, _SUMS):
                linear._buffers.pop(buffer, None)
            kept[name] = mask.cpu()
        edits: list[Edit] = [Masks(kept, str(self.pattern) if isinstance(self.pattern, Pattern) else None)]
        if self.settings.slorb is not None:
            # beside the weights for good: merged, they would fill the zeros
            edits.append(adapters_of(self._model))
            for linear in self._linears.values():
                linear.branches = nn.ModuleList()
        # multiplies the transforms in
        unwrap_(self._model, self.paths)
        self._model, self._linears, self._optimizer, self._table = None, {}, None, None
        return edits

    def state_dict(self) -> dict[str, Any]:
        return {"refreshes": [list(refresh) for refresh in self.refreshes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.refreshes = [Refresh(*refresh) for refresh in state["refreshes"]]


def masks_of(edits: Sequence[Edit]) -> Mapping[str, Tensor]:
    """The masks among the edits of a one-shot method."""
    return next(edit.kept for edit in edits if isinstance(edit, Masks))


@torch.no_grad()
def unmask_(model: Any, dense: Any, edits: Sequence[Edit], *, masks_alone: bool = False) -> None:
    """Give masked weights the values back that they have in the dense model: what may come back starts from there.

    Not where the one-shot method of these edits has given kept weights new values, which make up for the others; unless
    ``masks_alone``, where kept weights go back to the dense ones too: a branch is to make up for what the mask takes.
    """
    if any(isinstance(edit, Delta) for edit in edits) and not masks_alone:
        return
    for name in masks_of(edits):
        model.get_parameter(name).copy_(dense.get_parameter(name))


def input_norms(model: Any, tokens: Tensor, batch: int) -> dict[str, Tensor]:
    """Euclidean norms of the inputs of all linears of the blocks over windows [num, T], by the names of the weights."""
    walk = Walk(model, tokens, batch=batch)
    states, found = walk.enter(), {}
    for layer in range(len(walk.blocks)):
        moments = {name: Moments() for name in walk.anatomy.family.linears}
        walk.advance(layer, states, taps=moments)
        found |= {f"{walk.anatomy.path(layer, name)}.weight": each.result().norm for name, each in moments.items()}
    return found


#: buffers of a linear: squares of its inputs summed over a step, and their running mean over about the last 20 steps
_SUMS, _SQUARES = "input_sums", "input_squares"
_SHARE = 0.05
#: weights whose masks are chosen at once, about
_AT_ONCE = 2**23


def _measure(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
    if linear.training:
        getattr(linear, _SUMS).add_(args[0].detach().float().square().flatten(0, -2).sum(0))


def _branches(linears: Iterable[EffectiveLinear]) -> list[LowRankBranch]:
    return [branch for linear in linears for branch in linear.branches if isinstance(branch, LowRankBranch)]


def _check_slorb(path: str, slorb: SLoRB, outputs: int, inputs: int) -> None:
    rank = slorb.rank(inputs)
    if inputs % slorb.size or not 1 <= rank <= min(outputs, inputs):
        raise ShearlingError(
            f"{path}: slorb.size = {slorb.size} must divide its {inputs} inputs and give a rank of 1 to "
            f"{min(outputs, inputs)}"
        )


def _local(tensor: Tensor) -> Tensor:
    """This process' part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _part(mask: Tensor, parameter: Tensor) -> Tensor:
    """The part of a mask that belongs to this process' part of a parameter."""
    if not isinstance(parameter, DTensor):
        return mask
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return mask[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
