"""Sheared LLaMA (arXiv 2310.06694): gates that learn, with the weights, which units an exact shape keeps.

    z          hard-concrete gates (methods/hard_concrete.py) of layers, hidden dimensions, KV groups, query heads and
               FFN channels; drawn once a step
    s, t       expected share of closed gates of a row, and the share that the target closes; t rises from 0 over a
               share of the steps, linearly or as in gradual pruning, 1 - (1 - x)^3 (arXiv 1710.01878, Eq. 1)
    L = loss + sum over spaces of mean over rows of lam1 (s - t) + lam2 (s - t)^2        (Section 2.1, Algorithm 1)

Weights and gates descend, the multipliers lam1 and lam2 ascend. A row is what one target count holds for: all layers,
all hidden dimensions, the KV groups of a layer, the query heads of a group, the channels of a layer.

Gates multiply weights where they can, which is the same and costs less: a unit's gate the columns of the projection
that it writes through, those of a layer and of hidden dimensions its rows. In the last share of the steps gates are 0
or 1, the target's count in every row, so that the cut model is the gated one; the release folds soft gates into the
weights and cuts after that.

The paper sums over layers and counts units; as in the release a row counts by its share, and rows are averaged.
``corrected`` is methods/hard_concrete.py's.

Pruning-aware pretraining (EfficientLLM, arXiv 2502.06663) is this with a rise over nearly all steps of a long training
run: a little goes at every step, and the weights that stay are trained meanwhile. EfficientLLM drops channels for good,
by their saliency; here gates may open again until the last share of the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shearling.anatomy import Anatomy
from shearling.captured import Captured
from shearling.errors import ShearlingError
from shearling.methods.gate_step import GateStep
from shearling.methods.hard_concrete import LIMIT, most_open, settled, sparsity
from shearling.nn import HiddenGates, InputGate, OutputGates, unwrap_, wrap_
from shearling.plan import Edit, Structure
from shearling.train import Policy, StepContext, TrainSettings, decay_groups

#: log-alpha of an open gate at the start, and the noise on it (before the bound)
START, SPREAD = 5.0, 0.01
#: log-alpha of the lowest gate of a row at the start, where they start in an order
LOWEST = 2.0
#: units that stay and whose gate is below this, without noise, are dead when the gates are made 0 or 1
ALIVE = 0.9


@dataclass(frozen=True)
class Shearing:
    """How gates are learned.

    ``learning_rate`` is of gates and ``multiplier_rate`` of multipliers; both follow the schedule of the weights'.
    ``warmup`` is the share of the steps over which the targets rise: evenly, or with ``rise`` cubic most of it early,
    so that units go fast while many are superfluous and slowly in the end. ``binary`` is the share, at the end, in
    which gates are 0 or 1.
    """

    learning_rate: float = 1.0
    multiplier_rate: float = 1.0
    warmup: float = 0.2
    rise: Literal["linear", "cubic"] = "linear"
    binary: float = 0.05
    corrected: bool = True


class ShearingPolicy(Policy):
    """Learns the gates that cut a model to the counts of ``keep``; all weights are trained with them.

    ``keep`` has, of ``layers``, ``hidden``, ``kv_group``, ``query_head`` (in a group) and ``ffn``, those that are cut,
    each with how many of a row stay. Gates start open, all alike; or with ``scores`` of all units, shaped as
    ``gate_shapes`` has them, those of a row evenly spaced in their order, the lowest the nearest to being closed.
    ``finalize`` leaves the stock model as it was trained, and returns the Structure that cuts it to the model the last
    steps trained. Raises ShearlingError for a count that the model has not.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        keep: Mapping[str, int],
        shearing: Shearing,
        scores: Mapping[str, Tensor] | None = None,
    ) -> None:
        sizes = gate_shapes(anatomy)
        for space, count in keep.items():
            if not 1 <= count <= sizes[space][-1]:
                raise ShearlingError(f"target: {space} = {count}; the model has {sizes[space][-1]}")
        self.anatomy, self.shearing = anatomy, shearing
        #: only spaces that lose something have gates
        self.keep = {space: count for space, count in keep.items() if count < sizes[space][-1]}
        if not self.keep:
            raise ShearlingError("target: is the shape that the model has; nothing would be cut")
        self.log_alpha = {space: nn.Parameter(torch.empty(sizes[space])) for space in self.keep}
        self.multipliers = {space: nn.Parameter(torch.zeros(2)) for space in self.keep}
        #: how many of the units that stay were dead when the gates were made 0 or 1, by space; None until then
        self.dead: dict[str, int] | None = None
        self._scores = scores
        self._model: Any = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks = ExitStack()
        self._gates: Any = None
        self._captures = False

    def attach(self, model: Any, settings: TrainSettings) -> None:
        self._model = model
        self._validate_every, self._weight_decay = settings.validate_every, settings.weight_decay
        self._captures = settings.capture
        shape = self.anatomy.shapes[0]
        shapes = {space: tuple(log_alpha.shape) for space, log_alpha in self.log_alpha.items()}
        device = next(model.parameters()).device
        self._gates = GateStep(shapes, shape.query_heads // shape.kv_heads, self.shearing.corrected, device)
        for space, log_alpha in self._gates.parts(self._gates.log_alpha).items():
            # drawn on the CPU, so that a seed means the same on every device
            noise = SPREAD * torch.randn(log_alpha.shape)
            start = noise + (START if self._scores is None else in_order(self._scores[space]))
            log_alpha.copy_(start.clamp_(-LIMIT, LIMIT))
            # anew: with data of another kind put into it, such as fake tensors, a parameter would end on meta
            self.log_alpha[space] = nn.Parameter(log_alpha)
        self.multipliers = {
            space: nn.Parameter(pair) for space, pair in zip(shapes, self._gates.multipliers, strict=True)
        }
        self._install(model)

    def param_groups(self) -> list[dict[str, Any]]:
        return decay_groups(self._model.parameters(), self._weight_decay)

    def optimizer(self) -> torch.optim.Optimizer:
        gates, multipliers = self._rates
        groups = [
            {"params": list(self.log_alpha.values()), "lr": gates},
            {"params": list(self.multipliers.values()), "lr": multipliers, "maximize": True},
        ]
        device = self._gates.log_alpha.device.type
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=device in ("cpu", "cuda"))
        return self._optimizer

    @property
    def _rates(self) -> tuple[float, float]:
        """Learning rates of gates and of multipliers."""
        return self.shearing.learning_rate, self.shearing.multiplier_rate

    def capturable(self) -> bool:
        return True

    def begin_step(self, step: int, rng: torch.Generator) -> None:
        if self.dead is not None:
            self._gates.show(self._binary())
            return
        noise = self._gates.noise
        noise.copy_(torch.rand(noise.shape, generator=rng, pin_memory=noise.is_cuda), non_blocking=True)
        self._draw()

    def after_backward(self, ctx: StepContext) -> None:
        assert self._optimizer is not None
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * ctx.rate
        if self.dead is not None:
            for parameter in (*self.log_alpha.values(), *self.multipliers.values()):
                # a gradient of zero would let them drift on
                parameter.grad = None
            return
        gates = self._gates
        goals = {space: self.goal(space, ctx.step, ctx.total_steps) for space in self.keep}
        each = [goal for space, goal in goals.items() for _ in range(gates.rows[space])]
        gates.goals.copy_(torch.tensor(each), non_blocking=True)
        self._learn()
        for space, slopes in gates.parts(gates.slopes).items():
            self.log_alpha[space].grad = slopes
        for multipliers, slopes in zip(self.multipliers.values(), gates.multiplier_slopes.unbind(), strict=True):
            multipliers.grad = slopes
        ctx.metrics |= self._metrics(goals)

    def _metrics(self, goals: Mapping[str, float]) -> dict[str, float | Tensor]:
        gates = self._gates
        found: dict[str, float | Tensor] = {f"target/{space}": goal for space, goal in goals.items()}
        found |= {f"closed/{space}": share for space, share in zip(goals, gates.closed.unbind(), strict=True)}
        names = [f"lambda{number}/{space}" for space in goals for number in (1, 2)]
        found |= dict(zip(names, gates.multipliers.flatten().unbind(), strict=True))
        if "layers" in self.log_alpha:
            # the one space whose gates are few enough to be followed one by one
            layers = settled(self.log_alpha["layers"].detach()).unbind()
            found |= {f"layer/{number}": gate for number, gate in enumerate(layers)}
        return {**found, "lagrangian": gates.lagrangian}

    @torch.no_grad()
    def after_step(self, ctx: StepContext) -> None:
        self._gates.log_alpha.clamp_(-LIMIT, LIMIT)
        done = ctx.step + 1
        if self.dead is None and done >= ctx.total_steps - max(1, round(self.shearing.binary * ctx.total_steps)):
            self.dead = {space: self._count_dead(space) for space in self.keep}
        ctx.metrics |= {f"dead/{space}": count for space, count in (self.dead or {}).items()}
        if done == ctx.total_steps or (self._validate_every and done % self._validate_every == 0):
            self._gates.show(self._expected())

    def goal(self, space: str, step: int, steps: int) -> float:
        """t of a step."""
        size = self.log_alpha[space].shape[-1]
        risen = min(1.0, step / (self.shearing.warmup * steps)) if self.shearing.warmup else 1.0
        if self.shearing.rise == "cubic":
            risen = 1 - (1 - risen) ** 3
        return (1 - self.keep[space] / size) * risen

    @torch.no_grad()
    def finalize(self) -> Sequence[Edit]:
        self._hooks.close()
        self._model, self._optimizer, self._gates = None, None, None
        for name in ("_draw", "_learn"):
            vars(self).pop(name, None)
        return [
            structure_of(self.anatomy, {space: most_open(a, self.keep[space]) for space, a in self.log_alpha.items()})
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"dead": self.dead, "log_alpha": {k: v.detach() for k, v in self.log_alpha.items()},
                "multipliers": {k: v.detach() for k, v in self.multipliers.items()}}  # fmt: skip

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dead = state["dead"]
        for name, parameters in (("log_alpha", self.log_alpha), ("multipliers", self.multipliers)):
            for space, parameter in parameters.items():
                parameter.copy_(state[name][space])

    def _install(self, model: Any) -> None:
        """Let the gates multiply what they belong to."""
        anatomy, leaves = self.anatomy, self._gates.leaves
        inputs = (("ffn", anatomy.family.ffn_output, 1), ("heads", anatomy.family.attention_output, anatomy.head_dim))
        paths = {
            anatomy.path(layer, linear): (gates, width)
            for kind, linear, width in inputs
            for layer, gates in enumerate(leaves.get(kind, ()))
        }
        for path, linear in wrap_(model, paths).items():
            linear.transforms.append(InputGate(*paths[path], linear.transposed))
        self._hooks.callback(_drop_gates_, model, tuple(paths))
        for gates in leaves.get("hidden", ()):
            self._hooks.enter_context(HiddenGates(model, gates))
        branches = {
            anatomy.path(layer, name): gates
            for layer, gates in enumerate(leaves.get("layers", ()))
            for name in anatomy.family.branch_outputs
        }
        if anatomy.family.output_norms:
            for path, gates in branches.items():
                self._gate_output(model.get_submodule(path), gates)
        else:
            self._hooks.callback(OutputGates(model, branches).remove)

    def _gate_output(self, module: Any, gate: Tensor) -> None:
        """Let a gate multiply what a norm writes."""
        # on the module, so that torch compiles one hook for all
        module.gate = gate
        self._hooks.callback(delattr, module, "gate")
        self._hooks.callback(module.register_forward_hook(_times_gate).remove)

    @cached_property
    def _draw(self) -> Callable[[], None]:
        # not before it is needed: what is attached to count memory has no GPU
        return Captured(self._gates.draw) if self._captures else self._gates.draw

    @cached_property
    def _learn(self) -> Callable[[], None]:
        return Captured(self._gates.learn) if self._captures else self._gates.learn

    def _binary(self) -> dict[str, Tensor]:
        return {space: most_open(a, self.keep[space]).to(a.dtype) for space, a in self.log_alpha.items()}

    def _expected(self) -> dict[str, Tensor]:
        """Gates without noise: of each row as many are closed as are expected to be."""
        if self.dead is not None:
            return self._binary()
        found = {}
        for space, log_alpha in self.log_alpha.items():
            size = log_alpha.shape[-1]
            open_ = (size * (1 - sparsity(log_alpha, corrected=self.shearing.corrected))).round().clamp(1, size).long()
            rank = log_alpha.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            found[space] = torch.where(rank < open_[..., None], settled(log_alpha), 0.0)
        return found

    def _count_dead(self, space: str) -> int:
        log_alpha = self.log_alpha[space]
        return int((most_open(log_alpha, self.keep[space]) & (settled(log_alpha) < ALIVE)).sum())


def in_order(scores: Tensor) -> Tensor:
    """Log-alphas of units by their scores along the last axis: the lowest at LOWEST, the highest at the bound."""
    places = scores.argsort(dim=-1, stable=True).argsort(dim=-1)
    return LOWEST + (LIMIT - LOWEST) * places / max(1, scores.shape[-1] - 1)


def gate_shapes(anatomy: Anatomy) -> dict[str, tuple[int, ...]]:
    """Gates of every space, the rows' units along the last axis; ShearlingError where blocks differ in width."""
    if not anatomy.uniform:
        raise ShearlingError("target: the model's blocks differ in width; one shape for all needs one to start from")
    shape, layers = anatomy.shapes[0], anatomy.num_layers
    return {
        "layers": (layers,),
        "hidden": (anatomy.hidden,),
        "kv_group": (layers, shape.kv_heads),
        "query_head": (layers, shape.kv_heads, shape.query_heads // shape.kv_heads),
        "ffn": (layers, shape.ffn),
    }


def kept_of(after: Anatomy) -> dict[str, int]:
    """How many of each row stay in a model of that anatomy."""
    return {space: sizes[-1] for space, sizes in gate_shapes(after).items()}


def structure_of(anatomy: Anatomy, stays: Mapping[str, Tensor]) -> Structure:
    """The cut that keeps what bool masks say, each shaped as its space's gates; nothing is said of removed layers."""
    stays = {space: mask.cpu() for space, mask in stays.items()}
    layers = _indices(stays["layers"]) if "layers" in stays else tuple(range(anatomy.num_layers))
    kept: dict[str, tuple[int, ...]] = {}
    if "layers" in stays:
        kept["layers"] = layers
    if "hidden" in stays:
        kept["hidden"] = _indices(stays["hidden"])
    for layer in layers:
        if "ffn" in stays:
            kept[f"ffn.{layer}"] = _indices(stays["ffn"][layer])
        groups = stays["kv_group"][layer] if "kv_group" in stays else None
        if groups is not None:
            kept[f"kv_group.{layer}"] = _indices(groups)
        if "query_head" in stays:
            heads = stays["query_head"][layer]
            kept[f"query_head.{layer}"] = _indices((heads if groups is None else heads & groups[:, None]).flatten())
    return Structure(kept)


def _indices(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())


def _times_gate(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output * module.gate.to(output.dtype)


def _drop_gates_(model: Any, paths: Sequence[str]) -> None:
    """Take gates off linears, whose weights stay as they were trained; what nothing else changes becomes plain."""
    for path in paths:
        linear = model.get_submodule(path)
        linear.transforms = nn.ModuleList(t for t in linear.transforms if not isinstance(t, InputGate))
    unwrap_(model, [path for path in paths if not model.get_submodule(path).changed])
