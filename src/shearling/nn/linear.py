"""A linear whose weight passes through transforms and whose output gains branches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shearling.errors import ShearlingError
from shearling.nn.branches import Branch


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain Linear or Conv1D; subclasses may compute something else, so they are not."""
    return type(module) in (nn.Linear, Conv1D)


class EffectiveLinear(nn.Module):
    """Stands in for a Linear or a transformers Conv1D, holding the very same ``weight`` and ``bias`` parameters.

    ``transforms`` map the weight, in order and in its stored orientation, to the one that is multiplied;
    ``branches`` add to the output, and ``output_gates`` multiply all of it. Without any the output is bit-equal to the
    stock module's. Names and shapes of ``weight`` and ``bias`` in the state dict stay as they were.
    """

    bias: nn.Parameter | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        assert is_linear(base), type(base)
        self.weight: nn.Parameter = base.weight  # pyrefly: ignore[bad-assignment]
        self.register_parameter("bias", base.bias)  # pyrefly: ignore[bad-argument-type]
        #: Conv1D stores [in, out]
        self.transposed = isinstance(base, Conv1D)
        self.transforms = nn.ModuleList()
        self.branches = nn.ModuleList()
        #: each [out], or [] for all outputs alike; somebody else's (``OutputGates``), and never merged
        self.output_gates: tuple[Tensor, ...] = ()
        self.train(base.training)

    @property
    def input_dim(self) -> int:
        """Which dimension of the stored weight runs along the input."""
        return 0 if self.transposed else 1

    @property
    def in_features(self) -> int:
        return self.weight.shape[self.input_dim]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1 - self.input_dim]

    @property
    def changed(self) -> bool:
        """Whether there is any transform or branch."""
        return len(self.transforms) + len(self.branches) > 0

    def effective_weight(self) -> Tensor:
        """The weight after its transforms, in its stored orientation."""
        weight: Tensor = self.weight
        for transform in self.transforms:
            weight = transform(weight)
        return weight

    def merged_weight(self) -> Tensor:
        """The one weight that does what transforms and branches do together; summed in float64, then cast back."""
        weight = self.effective_weight()
        if not self.branches:
            return weight
        return self._folded(weight.double()).to(weight.dtype)

    def _folded(self, weight: Tensor) -> Tensor:
        """The branches added to a weight, in its type."""
        for branch in self.branches:
            assert isinstance(branch, Branch)
            matrix = branch.matrix(weight.dtype)
            weight = weight + (matrix.T if self.transposed else matrix)
        return weight

    def _folds(self, x: Tensor) -> bool:
        """Whether branches cost less in a weight whose gradient is computed anyway than beside it on every row."""
        if not (len(self.branches) and self.training and self.weight.requires_grad):
            return False
        inputs, outputs = self.in_features, self.out_features
        return x.numel() // inputs * (inputs + outputs) > inputs * outputs

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.effective_weight(), self.bias
        folds = self._folds(x)
        if folds:
            weight = self._folded(weight)
        gate = reduce(torch.mul, self.output_gates) if self.output_gates else None
        if gate is not None:
            # a pass over the weight instead of one over the output, which would be kept for the backward pass too
            weight = weight * (gate if self.transposed else gate[..., None]).to(weight.dtype)
            bias = bias if bias is None else bias * gate.to(bias.dtype)
        if self.transposed:
            # pyrefly: ignore[bad-argument-type]
            y = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], self.out_features)
        else:
            y = nn.functional.linear(x, weight, bias)
        if not folds:
            for branch in self.branches:
                added = branch(x).to(y.dtype)
                y = y + (added if gate is None else added * gate.to(y.dtype))
        return y

    def stock(self) -> nn.Module:
        """A plain Linear or Conv1D around the same parameters; transforms and branches are not in it."""
        with torch.device("meta"):
            if self.transposed:
                plain: nn.Module = Conv1D(self.out_features, self.in_features)
            else:
                plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        plain.weight = self.weight
        plain.bias = self.bias  # pyrefly: ignore[bad-argument-type, bad-assignment]
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def wrap_(model: nn.Module, names: Iterable[str]) -> dict[str, EffectiveLinear]:
    """Put an EffectiveLinear in the place of each named linear, in place; a wrapped one is returned as it is.

    A module that the model holds under several names is wrapped once, under all of them.
    Raises ShearlingError, before anything changes, for a name that is no Linear or Conv1D of the model.
    """
    names = list(names)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules:
            raise ShearlingError(f"{name}: the model has no such module; wrap linears by their full path")
        if not (is_linear(modules[name]) or isinstance(modules[name], EffectiveLinear)):
            kind = type(modules[name]).__name__
            raise ShearlingError(f"{name}: is a {kind}; only Linear and Conv1D can be wrapped")
    wrapped: dict[nn.Module, EffectiveLinear] = {}
    result: dict[str, EffectiveLinear] = {}
    for name in names:
        base = modules[name]
        if isinstance(base, EffectiveLinear):
            result[name] = base
            continue
        if base not in wrapped:
            wrapped[base] = EffectiveLinear(base)
        result[name] = wrapped[base]
    _replace(model, wrapped)
    return result


def wrapped_linears(model: nn.Module) -> dict[str, EffectiveLinear]:
    """Every EffectiveLinear of a model by its path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, EffectiveLinear)}


@torch.no_grad()
def unwrap_(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Merge transforms and branches into the weights and put plain modules back, in place.

    Without names, every EffectiveLinear goes and the model is exactly stock. The parameters stay the same objects.
    Raises ShearlingError, before anything changes, for a changed linear whose weight another module shares: merging
    would change that module too.
    """
    found = wrapped_linears(model)
    if names is not None:
        found = {name: found[name] for name in names}
    _check_untied(model, {name: module for name, module in found.items() if module.changed})
    for module in found.values():
        if module.changed:
            module.weight.copy_(module.merged_weight())
    _replace(model, {module: module.stock() for module in found.values()})


@torch.no_grad()
def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict of the stock model that multiplies the same weights: transforms are in them, branches left out.

    Raises ShearlingError for a transformed linear whose weight another module shares.
    """
    state, found = model.state_dict(), wrapped_linears(model)
    transformed = {name: module for name, module in found.items() if len(module.transforms)}
    _check_untied(model, transformed)
    ours = tuple(f"{name}.{part}." for name in found for part in ("transforms", "branches"))
    plain = {name: tensor for name, tensor in state.items() if not name.startswith(ours)}
    return plain | {f"{name}.weight": module.effective_weight() for name, module in transformed.items()}


def _check_untied(model: nn.Module, linears: dict[str, EffectiveLinear]) -> None:
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for name, module in linears.items():
        if holders[id(module.weight)] > 1:
            raise ShearlingError(f"{name}: its weight is tied to another module's; untie it before merging")


def _replace(model: nn.Module, new: dict[nn.Module, EffectiveLinear] | dict[EffectiveLinear, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])  # pyrefly: ignore[bad-index]
