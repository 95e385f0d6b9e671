"""Architectures as data: the spaces a model lives in, and which axis of which tensor lies where.

A layout is written ``"ffn, hidden"``: one entry an axis, ``+`` between parts that are stored one after the
other (``"query+kv+kv, hidden"`` is a fused QKV). The spaces are

    hidden      the residual stream
    ffn         channels of one block's feed-forward layer
    query, kv   query heads and key/value heads of one block, each ``head_dim`` wide
    head_dim    one head
    fixed       anything that is never cut (vocabulary, positions)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from shearling.errors import ShearlingError

Layout = tuple[tuple[str, ...], ...]
SPACES = ("hidden", "ffn", "query", "kv", "head_dim", "fixed")


@cache
def parse_layout(text: str) -> Layout:
    """Axes of a layout string, each a tuple of the spaces stored along it.

    Raises ValueError for a space that does not exist.
    """
    layout = tuple(tuple(part.strip() for part in axis.split("+")) for axis in text.split(","))
    for axis in layout:
        for space in axis:
            if space not in SPACES:
                raise ValueError(f"layout {text!r}: no space {space!r}; spaces are {', '.join(SPACES)}")
    return layout


def is_branch(name: str) -> bool:
    """Whether a parameter belongs to a branch beside a linear, which the stock model has not."""
    return ".branches." in name


@dataclass(frozen=True)
class Family:
    """What every model of one ``model_type`` is made of.

    Tensors named here that a model lacks (a bias, a tied head) are passed over; a tensor that a model has and
    its family does not name is an error, found before anything is cut.
    """

    model_type: str
    #: module path of the list of blocks
    blocks: str
    #: tensor name inside a block -> layout
    block: Mapping[str, str]
    #: tensor name outside the blocks -> layout
    outside: Mapping[str, str]
    #: name of a size -> config field that holds it
    config: Mapping[str, str]
    #: linears of a block that read the residual stream into the feed-forward layer, and the one that writes back
    ffn_inputs: tuple[str, ...]
    ffn_output: str
    #: the same for attention
    attention_inputs: tuple[str, ...]
    attention_output: str
    #: modules whose outputs make up the residual stream before the first block, the one of tokens first
    embeddings: tuple[str, ...]
    #: module path of the norm before the head, if any
    final_norm: str | None
    norm: Literal["rms", "layer"] = "rms"
    #: the norm multiplies by (1 + weight)
    norm_one_plus: bool = False
    #: attributes inside a block that copy a width: path -> ffn | hidden | query_heads | kv_heads |
    #: queries_per_kv | query_width | head_dim | head_scale (1 / sqrt(head_dim))
    attributes: Mapping[str, str] = field(default_factory=dict)
    #: attributes and buffers outside the blocks: path -> hidden | embedding_scale (sqrt(hidden))
    outside_attributes: Mapping[str, str] = field(default_factory=dict)
    #: config fields that repeat a size: field -> name of the size
    config_copies: Mapping[str, str] = field(default_factory=dict)
    #: submodules of a block that read head counts from their config at run time
    reads_config: tuple[str, ...] = ()
    #: config lists with one entry a layer, gathered when layers go
    per_layer: tuple[str, ...] = ()
    #: sizes that the stock config can state freely, for all layers alike
    stock: frozenset[str] = frozenset({"layers", "ffn"})
    #: the stock config takes only hidden sizes that the number of query heads divides
    heads_divide_hidden: bool = False
    #: norms of what attention and the feed-forward layer write, before it is added to the residual stream
    output_norms: tuple[str, ...] = ()
    #: the embedding is multiplied by sqrt(hidden) on the way in
    embedding_scaled: bool = False
    #: config values under which this anatomy does not hold: field -> (the value it needs, why)
    requires: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    #: what llama.cpp calls this architecture, and the one of its own that holds such blocks with widths of their own
    gguf: str | None = None
    gguf_per_layer: str | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of all linears inside a block, in the order in which a token meets them."""
        return tuple(linear for group in self.readers for linear in group)

    @property
    def readers(self) -> tuple[tuple[str, ...], ...]:
        """The linears in that order, those together that read the same input."""
        return self.attention_inputs, (self.attention_output,), self.ffn_inputs, (self.ffn_output,)

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the norms over the residual stream inside a block."""
        return tuple(
            name.removesuffix(".weight")
            for name, text in self.block.items()
            if name.endswith(".weight") and parse_layout(text) == (("hidden",),)
        )

    @property
    def branch_outputs(self) -> tuple[str, ...]:
        """Modules of a block whose outputs are added to the residual stream."""
        return self.output_norms or (self.attention_output, self.ffn_output)

    @property
    def input_first(self) -> bool:
        """Whether the linears of a block store [in, out]."""
        return parse_layout(self.block[f"{self.ffn_output}.weight"])[0] == ("ffn",)


@dataclass(frozen=True)
class BlockShape:
    """Widths of one block: FFN channels, query heads, key/value heads."""

    ffn: int
    query_heads: int
    kv_heads: int


@dataclass(frozen=True)
class Anatomy:
    """One model's sizes in its family's spaces.

    ``shapes`` has one entry a block; in a stock model all are equal. ``biases`` names linears inside a block that
    carry a bias which the stock class has not (bias compensation).
    """

    family: Family
    hidden: int
    head_dim: int
    vocab: int
    shapes: tuple[BlockShape, ...]
    tied: bool
    biases: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.shapes)

    @property
    def uniform(self) -> bool:
        """Whether every block has the same widths."""
        return len(set(self.shapes)) <= 1

    def layout(self, name: str) -> Layout:
        """Layout of a tensor by its full name; ValueError when the family does not know it."""
        family, prefix = self.family, self.family.blocks + "."
        if name.startswith(prefix):
            layer, _, inner = name[len(prefix) :].partition(".")
            text = family.block.get(inner) if layer.isdigit() else None
            if text is None and inner in {f"{linear}.bias" for linear in self.biases}:
                text = "hidden"
        else:
            text = family.outside.get(name)
        if text is None and is_branch(name):
            raise ShearlingError(f"{name}: is a branch beside a linear, which no plan cuts; merge it first (unwrap_)")
        if text is None:
            raise ValueError(
                f"{name}: not described by the anatomy of {family.model_type}; "
                f"name it in anatomy/families/{family.model_type}.py"
            )
        return parse_layout(text)

    def layer_of(self, name: str) -> int | None:
        """Index of the block that a tensor belongs to, or None outside the blocks."""
        prefix = self.family.blocks + "."
        head = name[len(prefix) :].partition(".")[0] if name.startswith(prefix) else ""
        return int(head) if head.isdigit() else None

    def size(self, space: str, layer: int | None = None) -> int:
        """Number of indices along a space (query and kv in elements, not heads)."""
        if space == "hidden":
            return self.hidden
        if space == "head_dim":
            return self.head_dim
        assert layer is not None, f"space {space} lies inside a block"
        shape = self.shapes[layer]
        return {
            "ffn": shape.ffn,
            "query": shape.query_heads * self.head_dim,
            "kv": shape.kv_heads * self.head_dim,
        }[space]

    def weights(self, layer: int) -> list[str]:
        """Full names of the weights of a block's linears, in the order in which a token meets them."""
        return [f"{self.path(layer, linear)}.weight" for linear in self.family.linears]

    def path(self, layer: int, inner: str = "") -> str:
        """Full name of something inside a block."""
        return f"{self.family.blocks}.{layer}" + (f".{inner}" if inner else "")
