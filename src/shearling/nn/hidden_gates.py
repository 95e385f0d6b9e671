"""Gates on what linears write and along the residual stream, and norms that take their statistics where one is open."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shearling.anatomy import anatomy_of
from shearling.nn.linear import EffectiveLinear, wrap_


class OutputGates:
    """While this stands, gates multiply what linears of a model write: by path a tensor [out], or [] for all alike.

    They multiply weight and bias, which is the same. ``HiddenGates`` says whose the tensors are and when to set them
    up.
    """

    def __init__(self, model: Any, gates: Mapping[str, Tensor]) -> None:
        self._model, self._gates = model, dict(gates)
        modules = {path: model.get_submodule(path) for path in gates}
        self._stock = {path: m for path, m in modules.items() if not isinstance(m, EffectiveLinear)}
        for path, linear in wrap_(model, gates).items():
            linear.output_gates = (*linear.output_gates, gates[path])

    def remove(self) -> None:
        """Take the gates away, and put stock linears back where nothing else is changed; nothing the second time."""
        for path, gate in self._gates.items():
            linear = self._model.get_submodule(path)
            linear.output_gates = tuple(other for other in linear.output_gates if other is not gate)
            if path in self._stock and not (linear.changed or linear.output_gates):
                _put_back(self._model, path, self._stock[path])
        self._gates, self._stock = {}, {}


class _GatedNorm(nn.Module):
    """What both norms share: the parameters and the epsilon of ``base``, and the gates, which are the caller's own."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, base: Any, z: Tensor) -> None:
        super().__init__()
        self.register_parameter("weight", base.weight)
        self.register_parameter("bias", getattr(base, "bias", None))
        self.eps: float = base.eps if hasattr(base, "eps") else base.variance_epsilon
        # in a tuple, where a Parameter does not become the model's
        self._gates = (z,)
        self.train(base.training)


class GatedRMSNorm(_GatedNorm):
    """``x / sqrt(mean of x^2 over dimensions with z != 0 + eps) * weight * z``, x [..., D], z [D] of any real values.

    Stands in for a stock RMS norm ``base``, whose weight ``one_plus`` says to be multiplied as 1 + weight. Computed in
    float32 and cast where the stock norm casts. From Sheared LLaMA (arXiv 2310.06694), whose code does the same.
    """

    def __init__(self, base: Any, z: Tensor, one_plus: bool) -> None:
        super().__init__(base, z)
        self.one_plus = one_plus

    def forward(self, x: Tensor) -> Tensor:
        z = self._gates[0].to(torch.float32)
        wide, kept = x.to(torch.float32), (z != 0).to(torch.float32)
        variance = (wide.square() * kept).sum(-1, keepdim=True) / kept.sum()
        normed = wide * torch.rsqrt(variance + self.eps)
        assert self.weight is not None
        # gates multiply the weight, not x: one gradient less that is summed over all tokens
        if self.one_plus:
            return (normed * ((1.0 + self.weight.float()) * z)).to(x.dtype)
        return self.weight * z.to(self.weight.dtype) * normed.to(x.dtype)


class GatedLayerNorm(_GatedNorm):
    """``((x - mean) / sqrt(variance + eps) * weight + bias) * z``, both moments over dimensions with z != 0.

    ``x`` [..., D], ``z`` [D]. Stands in for ``base``, with or without weight and bias. Computed in float32 at least, as
    the stock norm is.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        z = self._gates[0].to(wide.dtype)
        kept = (z != 0).to(wide.dtype)
        count = kept.sum()
        centred = wide - (wide * kept).sum(-1, keepdim=True) / count
        variance = (centred.square() * kept).sum(-1, keepdim=True) / count
        normed = centred * torch.rsqrt(variance + self.eps) * (z if self.weight is None else self.weight * z)
        if self.bias is not None:
            normed = normed + self.bias * z
        return normed.to(x.dtype)


class HiddenGates:
    """While this stands, ``z`` [D] multiplies whatever is written to a causal language model's residual stream.

    That is the output of its embeddings, of every attention and feed-forward output projection, and of every norm.
    Norms count only dimensions with z != 0. A dimension with z = 0 is out: the model computes what it would without it.
    With z = 1 it is the stock model, to rounding.

        gates = HiddenGates(model, z)      # or: with HiddenGates(model, z): ...
        model(ids)
        with torch.no_grad():
            z.copy_(other)                 # the next forward pass uses it, compiled or captured too
        gates.remove()                     # the stock modules are back, around the parameters that are there now

    ``z`` is the very tensor given, on the model's device, neither moved nor saved with the model. It may require grad:
    as a leaf it gathers ``z.grad`` over backward passes. Set gates up after linears are wrapped (``wrap_``; output
    projections that are not will be) and before the model is compiled or sharded, and remove them in the reverse order
    and before linears are unwrapped: they sit on the modules of the time.
    """

    def __init__(self, model: Any, z: Tensor) -> None:
        anatomy = anatomy_of(model.config)
        family = anatomy.family
        assert z.shape == (anatomy.hidden,), f"gates {tuple(z.shape)}, hidden size {anatomy.hidden}"
        blocks = range(anatomy.num_layers)
        embeddings = [model.get_submodule(name) for name in family.embeddings]
        self._handles = [module.register_forward_hook(partial(_times, z)) for module in embeddings]
        linears = (family.attention_output, family.ffn_output)
        self._outputs = OutputGates(model, {anatomy.path(layer, name): z for layer in blocks for name in linears})
        self._model = model
        self._stock: dict[str, nn.Module] = {}
        paths = [anatomy.path(layer, name) for layer in blocks for name in family.norms]
        for path in [*paths, *([family.final_norm] if family.final_norm else [])]:
            stock = model.get_submodule(path)
            assert not isinstance(stock, _GatedNorm), f"{path}: has gates already"
            self._stock[path] = stock
            gated = GatedLayerNorm(stock, z) if family.norm == "layer" else GatedRMSNorm(stock, z, family.norm_one_plus)
            _put(model, path, gated)

    def remove(self) -> None:
        """Put the stock modules back and take the gates away; nothing the second time."""
        for handle in self._handles:
            handle.remove()
        self._outputs.remove()
        for path, stock in self._stock.items():
            _put_back(self._model, path, stock)
        self._handles, self._stock = [], {}

    def __enter__(self) -> HiddenGates:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _times(z: Tensor, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * z.to(output.dtype)


def _put_back(model: nn.Module, path: str, stock: nn.Module) -> None:
    """Put a stock module where one stands in for it, with the parameters that this has now."""
    gated = model.get_submodule(path)
    # sharding may have made new ones meanwhile
    for name in stock._parameters:
        stock._parameters[name] = gated._parameters[name]
    _put(model, path, stock.train(gated.training))


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
