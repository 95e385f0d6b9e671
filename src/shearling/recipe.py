"""Recipes: what to do, typed. Imports neither torch nor transformers."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from shearling.errors import RecipeError, check_domains

STDLIB = "stdlib:"
RECOVERY_TEXT = "stdlib:recovery"
SOURCE = "source"
UNSTRUCTURED = "unstructured"
TOP_K = 64
Tokens = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Strict):
    """Text that is measured: ``sequences`` windows of ``length`` tokens, ``batch`` at a time.

    With ``stream`` the weights stay in host memory and visit the device block by block while they are measured.
    """

    text: str = "stdlib:calibration"
    sequences: Tokens = 128
    length: Annotated[int, Field(ge=2)] = 2048
    batch: Tokens = 8
    stream: bool = False


class Evaluation(_Strict):
    """What is reported of each model; ``samples`` are prompts that every model continues."""

    text: str = "stdlib:evaluation"
    context: Annotated[int, Field(ge=2)] = 1024
    stride: Tokens = 1024
    max_tokens: Tokens | None = None
    batch: Tokens = 1
    samples: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    data: str | None = None


class Reconstruct(_Strict):
    """Gradient steps on one block's output at a time, after its cut; each reads one batch of the calibration text."""

    steps: Tokens = 200
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3


class _Prune(_Strict):
    stage: Literal["prune"] = "prune"
    #: share removed
    sparsity: float
    #: of what: FFN channels, all parameters, or all bytes
    of: Literal["ffn", "parameters", "bytes"] = "ffn"
    #: widths are multiples of this
    round_to: Tokens = 1
    #: one width for all blocks, so that any engine loads the result
    uniform: bool = False

    @field_validator("sparsity")
    @classmethod
    def _share(cls, value: float) -> float:
        if not (math.isfinite(value) and 0 < value < 1):
            raise ValueError("must be above 0 and below 1")
        return value


def _per_layer(value: bool, found: ValidationInfo) -> bool:
    if value and found.data.get("uniform"):
        raise ValueError("needs a width per block; leave uniform off")
    return value


class CFSP(_Prune):
    """CFSP: block importance shares out the channels, a score spends them."""

    method: Literal["cfsp"] = "cfsp"
    score: Literal["act", "wanda", "eq8", "eq8xn", "flap", "obs"] = "act"
    allocation: Literal["sigmoid", "uniform"] = "sigmoid"
    temperature: Annotated[float, Field(gt=0)] = 13.1072
    #: least-squares refit of the down projection on the channels that stay
    refit: bool = True
    #: KV groups go too, out of the same budget (our extension)
    heads: bool = False

    _heads = field_validator("heads")(_per_layer)


class CFSPReference(_Prune):
    """CFSP as released: its score, its allocation, its rounding."""

    method: Literal["cfsp-reference"] = "cfsp-reference"


class Shearling(_Prune):
    """Sequential least squares over heads and channels in one budget, then optional block reconstruction."""

    method: Literal["shearling"] = "shearling"
    #: KV groups go too, out of the same budget
    heads: bool = False
    #: share of what earlier blocks lost that a block makes good
    correction: Annotated[float, Field(ge=0, le=1)] = 0.5
    damping: Annotated[float, Field(gt=0)] = 0.1
    #: windows that the dense model writes itself, measured beside the calibration text
    sampled: Annotated[int, Field(ge=0)] = 0
    reconstruct: Reconstruct | None = None

    _heads = field_validator("heads")(_per_layer)


class Baseline(_Prune):
    """The simple methods, one width for all blocks; FLAP shares channels out globally and adds a bias."""

    method: Literal["wanda-sp", "flap", "magnitude", "random"]


class Target(_Strict):
    """The shape that a model is cut to, the same in every block; what is not named stays, or follows.

    Without ``heads`` (query heads) they follow ``kv_heads`` as many to each as before; without ``kv_heads`` these stay,
    or follow ``heads`` where each has its own.
    """

    layers: Tokens | None = None
    hidden: Tokens | None = None
    heads: Tokens | None = None
    kv_heads: Tokens | None = None
    ffn: Tokens | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if all(size is None for _, size in self):
            raise ValueError(f"needs at least one of {', '.join(type(self).model_fields)}")
        return self


Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Budget(_Strict):
    """What the model may weigh, cost a token, or take: one of four, below 1 a share of what it has, else a number.

    ``propose_shapes`` finds shapes for it; ``profile`` says which of them is taken. ``latency`` is in milliseconds, and
    measured in the recipe's precision on the device that it names, or is run on.
    """

    parameters: Amount | None = None
    bytes: Amount | None = None
    flops: Amount | None = None
    latency: Amount | None = None
    profile: Literal["balanced", "deeper", "shallower"] = "balanced"
    #: whose latency: of one token more in every row, or of all tokens of the context at once
    phase: Literal["decode", "prefill"] = "decode"
    #: rows
    batch: Tokens = 1
    #: tokens of a row
    context: Tokens = 1024

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(amount is not None for amount in (self.parameters, self.bytes, self.flops, self.latency)) != 1:
            raise ValueError("needs one of parameters, bytes, flops, latency, and no other of them")
        changed = [name for name in ("phase", "batch", "context") if getattr(self, name) != _default(self, name)]
        if changed and self.latency is None:
            raise ValueError(f"has {', '.join(changed)}, which only a latency is measured by")
        return self

    @property
    def of(self) -> Literal["parameters", "bytes", "flops_per_token", "milliseconds"]:
        """What is bounded."""
        counted = "parameters" if self.parameters else "bytes" if self.bytes else "flops_per_token"
        return "milliseconds" if self.latency else counted

    @property
    def amount(self) -> float:
        """The bound."""
        return self.parameters or self.bytes or self.flops or self.latency or 0.0


def _default(model: BaseModel, field: str) -> Any:
    return type(model).model_fields[field].default


def _named(value: Any, kind: type[BaseModel]) -> list[str]:
    return [name for name in kind.model_fields if name in value] if isinstance(value, dict) else []


def _form(value: Any) -> str:
    return "budget" if isinstance(value, Budget) or _named(value, Budget) else "shape"


def _one_form(value: Any) -> Any:
    shape, budget = _named(value, Target), _named(value, Budget)
    if shape and budget:
        raise ValueError(
            f"has {', '.join(shape)} of a shape and {', '.join(budget)} of a budget; give one or the other"
        )
    return value


ShapeOrBudget = Annotated[
    Annotated[Target, Tag("shape")] | Annotated[Budget, Tag("budget")], Discriminator(_form), BeforeValidator(_one_form)
]


class Ranked(_Strict):
    """Cut to an exact shape in one go: units ranked by one forward sweep, or drawn from the seed."""

    stage: Literal["prune"] = "prune"
    method: Literal["minitron", "shortgpt", "random-shape"]
    target: ShapeOrBudget

    @field_validator("target")
    @classmethod
    def _whole_blocks(cls, value: Target | Budget, found: ValidationInfo) -> Target | Budget:
        named = {size for size, wanted in value if wanted is not None}
        if found.data.get("method") == "shortgpt" and named != {"layers"}:
            raise ValueError("shortgpt drops whole blocks; name layers alone, or use minitron")
        return value


def pattern_numbers(text: str) -> tuple[int, int] | None:
    """N and M of ``"N:M"``, None unless 0 < N < M."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    keep, of = map(int, found.groups()) if found else (0, 0)
    return (keep, of) if 0 < keep < of else None


class Sparsify(_Strict):
    """One-shot masks over all linears of the blocks; no shape changes."""

    stage: Literal["sparsify"] = "sparsify"
    method: Literal["magnitude", "wanda", "sparsegpt", "alps"] = "sparsegpt"
    #: N:M along the input, or ``unstructured``: a share of each row
    pattern: str = "2:4"
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    #: inputs are measured with everything before them pruned, with the blocks before them pruned, or in the dense model
    statistics: Literal["sequential", "block", "dense"] = "sequential"
    damping: Annotated[float, Field(gt=0)] = 0.01
    reconstruct: Reconstruct | None = None

    @field_validator("pattern")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != UNSTRUCTURED and pattern_numbers(value) is None:
            raise ValueError(f"must be N:M with 0 < N < M, such as 2:4, or {UNSTRUCTURED}")
        return value


class Denoise(_Strict):
    """Weights of some blocks by tensors or matrices of low rank (TRAWL, LASER); all shapes stay."""

    stage: Literal["denoise"] = "denoise"
    method: Literal["cp", "tucker", "svd"] = "cp"
    #: blocks from 0, or from -1 backwards
    layers: Annotated[tuple[int, ...], Field(min_length=1)]
    part: Literal["ffn", "attention"] = "ffn"
    #: of the smaller side of a weight
    rank: Annotated[float, Field(gt=0, le=1)] = 0.5


PruneStage = Annotated[CFSP | CFSPReference | Shearling | Baseline | Ranked, Field(discriminator="method")]


class Domain(_Strict):
    """A named corpus: text that is read, held-out text (its first windows) that is scored."""

    text: str
    validation: str | None = None
    #: its share of what is read at first, over the sum of all weights
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0


class Loading(_Strict):
    """Dynamic batch loading: at every validation domains gain by how far their loss lies above its reference."""

    method: Literal["dynamic"] = "dynamic"
    #: losses by domain (see ``reference_table``), a YAML or JSON file of them, or ``source``: those of the dense model
    reference: str | dict[str, float | dict[float, float]]
    #: weights grow by exp(eta * excess)
    eta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    #: a domain that is better than its reference keeps its weight, as in the paper; off, it loses, as in its code
    clamp: bool = True
    #: share of the weights that is dealt out evenly
    smoothing: Annotated[float, Field(ge=0, le=1)] = 1e-4
    #: no domain has less
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0

    @field_validator("reference", mode="before")
    @classmethod
    def _table(cls, value: Any) -> Any:
        return value if isinstance(value, str) else reference_table(value)


def reference_table(content: Any) -> dict[str, float | dict[float, float]]:
    """Losses by domain, of plain values: a loss, or at least three of a model family by their numbers of parameters.

    The latter are extrapolated to the size of the model that is trained. Raises ValueError for anything else.
    """
    if not isinstance(content, dict) or not content:
        raise ValueError("must be a table of losses by domain, a file of one, or source")
    return {str(name): _reference(f"domain {name!r}", entry) for name, entry in content.items()}


def _reference(what: str, entry: Any) -> float | dict[float, float]:
    if not isinstance(entry, dict):
        return _number(f"{what}: loss", entry)
    if len(entry) < 3:
        raise ValueError(f"{what}: {len(entry)} models; a scaling law needs at least 3")
    losses = {_number(f"{what}: parameters", size): _number(f"{what}: loss", loss) for size, loss in entry.items()}
    if 0 in losses:
        raise ValueError(f"{what}: parameters = 0; must be above 0")
    return losses


def _number(what: str, value: Any) -> float:
    try:
        # YAML takes 7e9 for a text
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{what} = {value!r}; must be a finite number, 0 or more")
    return number


class _Train(_Strict):
    #: named corpora instead of one text, read by their weights
    domains: dict[str, Domain] | None = None
    text: Annotated[str | None, Field(validate_default=True)] = None
    tokens: Tokens = 1_000_000
    length: Annotated[int, Field(ge=2)] = 512
    #: of a window; apart, each has attention and positions of its own, and its first token is not predicted
    documents: Literal["together", "apart"] = "together"
    batch: Tokens = 8
    micro_batch: Tokens = 8
    warmup: Annotated[float, Field(ge=0)] = 0.05
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    #: weight of the next token's loss; 0 follows the teacher alone
    cross_entropy: Annotated[float, Field(ge=0)] = 1.0
    #: weight of the divergence from the teacher; 0 trains on text alone
    distill: Annotated[float, Field(ge=0)] = 0.0
    #: which one: KL(teacher || model), KL(model || teacher), or the mean of both against their average
    divergence: Literal["forward", "reverse", "jensen-shannon"] = "forward"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    #: weight of the relative squared error of the states after each block
    layerwise: Annotated[float, Field(ge=0)] = 0.0
    #: model that is followed, by its name, folder or hub id; the recipe's own, as it was loaded, by default
    teacher: str | None = None
    #: precision of its weights; the recipe's by default
    teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    #: its weights stay in host memory and visit the device block by block
    teacher_offload: bool = False
    #: torch.compile runs it
    teacher_compile: bool = False
    #: folder that keeps its likeliest next tokens at every position, made where it is not finished
    teacher_cache: str | None = None
    teacher_top_k: Tokens = TOP_K
    #: activations inside a block are computed again in the backward pass instead of kept
    recompute: bool = False
    #: torch compiles the blocks: a slow first step, faster ones after it
    compile: bool = False
    #: forward and backward pass become a CUDA graph: for small models, on one GPU
    capture: bool = False
    checkpoint_every: Annotated[int, Field(ge=0)] = 20
    #: held-out text (its first windows) that is scored every so many steps
    validation: str | None = None
    #: of every domain; ``auto``: as many as take a twentieth of the time
    validation_windows: int | Literal["auto"] = 32
    validate_every: Tokens = 50
    #: parameters that the stage ends with: the last, or those of the best validation
    keep: Literal["last", "best"] = "last"
    #: how weights of domains change
    loading: Loading | None = None

    @property
    def validates(self) -> bool:
        """Whether there is held-out text, of one kind or of every domain."""
        return self.validation is not None or any(d.validation is not None for d in (self.domains or {}).values())

    @field_validator("domains")
    @classmethod
    def _mixed(cls, value: dict[str, Domain] | None) -> dict[str, Domain] | None:
        if value is None:
            return value
        if not any(domain.weight for domain in value.values()):
            raise ValueError("needs a domain whose weight is above 0")
        silent = [name for name, domain in value.items() if domain.validation is None]
        if silent and len(silent) < len(value):
            raise ValueError(f"domain {silent[0]!r} has no validation text; all must have one, or none")
        return value

    @field_validator("text")
    @classmethod
    def _one_text(cls, value: str | None, found: ValidationInfo) -> str | None:
        if found.data.get("domains") is None:
            return RECOVERY_TEXT if value is None else value
        if value is not None:
            raise ValueError("leave it out; domains name texts of their own")
        return None

    @field_validator("validation")
    @classmethod
    def _one_validation(cls, value: str | None, found: ValidationInfo) -> str | None:
        if value is not None and found.data.get("domains") is not None:
            raise ValueError("leave it out; domains name validation texts of their own")
        return value

    @field_validator("validation_windows", mode="before")
    @classmethod
    def _counted(cls, value: Any) -> Any:
        if value != "auto" and not (type(value) is int and value > 0):
            raise ValueError("must be a number above 0, or auto")
        return value

    @field_validator("loading")
    @classmethod
    def _loaded(cls, value: Loading | None, found: ValidationInfo) -> Loading | None:
        domains = found.data.get("domains")
        if value is None:
            return value
        if domains is None or any(domain.validation is None for domain in domains.values()):
            raise ValueError("needs domains with a validation text each")
        if isinstance(value.reference, dict):
            check_domains("reference", value.reference, domains)
        if value.floor * len(domains) > 1:
            raise ValueError(f"floor = {value.floor:g}; must be at most 1/{len(domains)}, or weights exceed 1")
        return value

    @field_validator("teacher", "teacher_dtype", "teacher_offload", "teacher_compile", "teacher_cache")
    @classmethod
    def _followed(cls, value: Any, found: ValidationInfo) -> Any:
        if value and not (found.data.get("distill") or found.data.get("layerwise")):
            raise ValueError("needs distill or layerwise above 0")
        return value

    @field_validator("teacher_compile")
    @classmethod
    def _compiled(cls, value: bool, found: ValidationInfo) -> bool:
        if value and found.data.get("teacher_offload"):
            raise ValueError("leave teacher_offload off; compiled code needs its weights in one place")
        return value

    @field_validator("capture")
    @classmethod
    def _captured(cls, value: bool, found: ValidationInfo) -> bool:
        for other in ("recompute", "teacher_offload", "teacher_cache"):
            if value and found.data.get(other):
                raise ValueError(f"leave {other} off; a CUDA graph repeats its kernels and nothing else")
        if value and found.data.get("documents") == "apart":
            raise ValueError("leave documents together; a CUDA graph weighs all windows alike")
        return value

    @field_validator("teacher_cache")
    @classmethod
    def _cached(cls, value: str | None, found: ValidationInfo) -> str | None:
        if value is not None and found.data.get("layerwise"):
            raise ValueError("leave layerwise at 0; a cache holds no block outputs")
        if value is not None and (found.data.get("divergence"), found.data.get("temperature")) != ("forward", 1):
            raise ValueError("needs divergence = forward and temperature = 1")
        return value

    @field_validator("teacher_top_k")
    @classmethod
    def _kept(cls, value: int, found: ValidationInfo) -> int:
        if value != TOP_K and found.data.get("teacher_cache") is None:
            raise ValueError("needs teacher_cache")
        return value

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Self:
        if not (self.cross_entropy or self.distill or self.layerwise):
            raise ValueError("cross_entropy, distill and layerwise are all 0; one must be above")
        return self

    @model_validator(mode="after")
    def _chosen_by_validation(self) -> Self:
        if self.keep == "best" and not self.validates:
            raise ValueError("keep = 'best' needs a validation text")
        return self


class _Recover(_Train):
    stage: Literal["recover"] = "recover"


class LoRA(_Recover):
    """Low-rank branches, ranks shared out over blocks, merged at the end."""

    method: Literal["lora"] = "lora"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    mean_rank: Tokens = 8
    ranks: Literal["important", "damaged", "uniform"] = "important"
    alpha_over_rank: Annotated[float, Field(gt=0)] = 2.0


class Full(_Recover):
    """All parameters."""

    method: Literal["full"] = "full"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5


class SLoRB(_Strict):
    """A low-rank branch beside every masked linear, trained with it and kept as an adapter.

    Its rank is a linear's inputs over ``size``, so that all starts weigh the same.
    """

    #: from what the mask takes: its mean in blocks of ``size`` inputs, or its leading singular vectors, as they are or
    #: with each input weighed by its norm in the dense model
    start: Literal["block-mean", "svd", "activation-svd"] = "svd"
    size: Tokens = 16
    #: the factor that reads the inputs is trained too
    train_down: bool = True

    def rank(self, inputs: int) -> int:
        """Of the branch beside a linear with so many inputs."""
        return inputs // self.size


class AST(_Recover):
    """AST: all parameters, under masks that follow the weights; needs masks to start from."""

    method: Literal["ast"] = "ast"
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    #: steps between two choices of the masks; 0 keeps those of the start
    refresh_every: Annotated[int, Field(ge=0)] = 10
    #: share of the steps, at the end, in which masks stay
    freeze: Annotated[float, Field(ge=0, lt=1)] = 0.0
    #: what masks are chosen by: the weight's size, alone or times the norm of its input, in the dense model or of late
    score: Literal["magnitude", "activation", "activation-refreshed"] = "activation"
    #: multiplied weights: masked, or thresholded softly (S-STE)
    forward: Literal["hard", "soft"] = "hard"
    #: decay of masked weights (lambda), and the share of the steps over which it rises
    decay: Annotated[float, Field(ge=0)] = 6e-5
    anneal: Annotated[float, Field(ge=0, le=1)] = 0.25
    #: beside Adam's first moment, as part of the gradient, or by the weight's sign
    decay_by: Literal["decoupled", "coupled", "l1"] = "decoupled"
    #: second moment of the gradient, or of what the weight moves by
    second_moment: Literal["adam", "ast"] = "adam"
    #: what moves the weights under masks: Adam, or Muon, whose steps have all singular values alike
    optimizer: Literal["adam", "muon"] = "adam"
    slorb: SLoRB | None = None
    #: weights are rounded to this grid in training, in groups along the input (a row each by default)
    quantise: Literal["int4", "int8", "uint4", "uint8", "float8_e4m3"] | None = None
    group: Tokens | None = None

    @property
    def needs_norms(self) -> bool:
        """Whether the norms of the linears' inputs are asked for."""
        by_score = bool(self.refresh_every) and self.score == "activation"
        return by_score or (self.slorb is not None and self.slorb.start == "activation-svd")

    @model_validator(mode="after")
    def _applies(self) -> Self:
        given = self.model_fields_set
        if not self.refresh_every and {"freeze", "score"} & given:
            raise ValueError("refresh_every = 0 keeps the masks of the start; leave freeze and score out")
        if self.group is not None and self.quantise is None:
            raise ValueError("group needs quantise")
        if self.forward == "soft" and self.decay:
            raise ValueError("forward = 'soft' moves what is masked by itself; it needs decay = 0")
        return self


class SPP(_Recover):
    """SPP: multiplicative adapters of frozen masked weights, merged at the end; needs masks, and never moves them."""

    method: Literal["spp"] = "spp"
    learning_rate: Annotated[float, Field(gt=0)] = 4e-3
    #: rows of the factor that the inputs have, each for as many outputs; must divide the outputs of every linear
    rank: Tokens = 16
    #: alpha over rank
    scale: Annotated[float, Field(gt=0)] = 2.0


class Shear(_Train):
    """Sheared LLaMA: gates learn, with all weights, which units an exact shape keeps; then the model is cut to it."""

    stage: Literal["shear"] = "shear"
    method: Literal["sheared-llama"] = "sheared-llama"
    target: ShapeOrBudget
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    warmup: Annotated[float, Field(ge=0)] = 0.1
    #: of gates and multipliers; follows the same schedule
    gate_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    #: share of the steps over which the targets rise
    target_warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2
    #: how: evenly, or as 1 - (1 - x)^3, fast at first and slowly in the end
    target_schedule: Literal["linear", "cubic"] = "linear"
    #: share of the steps, at the end, in which gates are 0 or 1
    binary: Annotated[float, Field(gt=0, lt=1)] = 0.05
    #: what the constraint counts: closed gates from 0 to 1, or their probability, which leaves dead units
    closed: Literal["corrected", "probability"] = "corrected"

    @field_validator("binary")
    @classmethod
    def _risen(cls, value: float, found: ValidationInfo) -> float:
        rise = found.data.get("target_warmup", 0.0)
        if value + rise > 1:
            raise ValueError(f"gates would be 0 or 1 before the targets have risen; choose at most {1 - rise:g}")
        return value

    @field_validator("keep")
    @classmethod
    def _last(cls, value: str) -> str:
        if value != "last":
            raise ValueError("must be last: earlier weights belong to other gates")
        return value


Scales = Literal["covering", "mse"]


class Quantise(_Strict):
    """Weights of the blocks' linears on a grid; what was pruned stays exactly zero."""

    stage: Literal["quantise"] = "quantise"
    method: Literal["rtn", "gptq", "slim"] = "gptq"
    format: Literal["int4", "int8", "uint4", "uint8", "float8_e4m3"] = "int4"
    #: weights along the input that share a scale; none: a row
    group: Annotated[int, Field(ge=1)] | None = None
    #: of a group's range: all of it, or the share with the least squared error; slim has one scale a weight
    scales: Scales = "mse"
    #: rank, as a share of a weight's smaller side, of branches that make up for what pruning and rounding took
    compensate: Annotated[float, Field(gt=0, lt=1)] | None = None
    #: grid of those branches' factors
    branches: Literal["int4", "int8"] | None = None
    #: gptq: columns in falling order of their inputs' energy
    order: bool = True
    damping: Annotated[float, Field(gt=0)] = 0.01

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.branches is not None and self.compensate is None:
            raise ValueError("branches needs compensate, the rank of the branches")
        if self.method == "slim" and self.format not in ("int4", "int8"):
            raise ValueError(f"method = slim is symmetric; format must be int4 or int8, not {self.format}")
        return self

    def rank(self, outputs: int, inputs: int) -> int:
        """Of the branch beside a linear of that shape; 0 where none is wanted."""
        return 0 if self.compensate is None else max(1, round(self.compensate * min(outputs, inputs)))


RecoverStage = Annotated[LoRA | Full | AST | SPP, Field(discriminator="method")]
TrainStage = Shear | LoRA | Full | AST | SPP
Stage = Annotated[PruneStage | Sparsify | Denoise | Shear | RecoverStage | Quantise, Field(discriminator="stage")]
Section = TypeVar("Section", bound=_Strict)
MASK_METHODS = get_args(Sparsify.model_fields["method"].annotation)
STAGES = ("prune", "sparsify", "denoise", "shear", "recover", "quantise")
RECOVERIES = ("lora", "full", "ast", "spp")
RANKED = get_args(Ranked.model_fields["method"].annotation)
METHODS = ("cfsp", "cfsp-reference", "shearling", "wanda-sp", "flap", "magnitude", "random", *RANKED)
#: parts of an error's place that say which form something has
_TAGS = (*STAGES, *METHODS, *RECOVERIES, "sheared-llama", "shape", "budget")


class Recipe(_Strict):
    """A model, the texts, and the stages in their order."""

    model: str
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    calibration: Calibration = Calibration()
    evaluate: Evaluation = Evaluation()
    #: who is told the numbers of training while it runs
    track: Literal["tensorboard", "trackio"] | None = None
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]

    @field_validator("stages")
    @classmethod
    def _order(cls, stages: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [stage.stage for stage in stages]
        # quantise may end any recipe, or be alone
        before = names[:-1] if names[-1] == "quantise" else names
        if "quantise" in before or len(set(before)) < len(before) or before[1:] not in ([], ["recover"]):
            raise ValueError(
                "must be prune, sparsify, denoise or shear, then recover, then quantise, of which any may be left out; "
                f"got {', '.join(names)}"
            )
        if not before:
            return stages
        last, names, end = stages[len(before) - 1], before, stages[-1]
        if isinstance(last, AST) and last.quantise is not None and isinstance(end, Quantise):
            trained, stored = (last.quantise, last.group), (end.format, end.group)
            if trained != stored:
                raise ValueError(
                    f"recover trains weights on the grid {_grid(*trained)}; quantise.format and quantise.group must "
                    f"be the same, not {_grid(*stored)}"
                )
        if names == ["recover"]:
            if isinstance(last, AST | SPP):
                raise ValueError(
                    f"recover.method = {last.method} needs the masks of a sparsify stage; alone it must be lora or full"
                )
            if isinstance(last, LoRA) and last.ranks == "damaged":
                raise ValueError("recover.ranks = damaged needs a prune stage; alone it must be important or uniform")
        elif names[1:] and isinstance(last, AST | SPP) != (names[0] == "sparsify"):
            wanted = "ast or spp, which keep to masks" if names[0] == "sparsify" else "lora or full"
            raise ValueError(f"after {names[0]}, recover.method must be {wanted}")
        if isinstance(stages[0], Ranked | Shear | Denoise) and isinstance(last, LoRA) and last.ranks == "damaged":
            raise ValueError(
                "recover.ranks = damaged: needs widths that differ by block, as cfsp and shearling leave them; use "
                "important or uniform"
            )
        return stages

    @property
    def first(self) -> PruneStage | Sparsify | Denoise | Shear | None:
        """The stage that changes the model at once or by gates; None where the recipe only trains or quantises."""
        stage = self.stages[0]
        return None if isinstance(stage, _Recover | Quantise) else stage

    @property
    def recover(self) -> RecoverStage | None:
        """The stage that trains what was pruned, if there is one."""
        return next((stage for stage in self.stages if isinstance(stage, _Recover)), None)

    @property
    def quantise(self) -> Quantise | None:
        """The stage that quantises what the others left, if there is one."""
        stage = self.stages[-1]
        return stage if isinstance(stage, Quantise) else None

    @property
    def trained(self) -> tuple[TrainStage, ...]:
        """The stages that train, in their order."""
        return tuple(stage for stage in self.stages if isinstance(stage, _Train))

    def dump(self) -> str:
        """The recipe with every default spelled out, as YAML that loads back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _grid(form: str, group: int | None) -> str:
    return f"{form}, " + ("a scale a row" if group is None else f"groups of {group}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; ``overrides`` are ``stage.field=value`` or ``field=value``.

    Raises RecipeError, one line with file, field, value and what would be valid.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        raise RecipeError(
            f"{path}{line}: is no YAML ({getattr(error, 'problem', None) or 'cannot be parsed'})"
        ) from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: must be a mapping with the keys model and stages")
    for override in overrides:
        _override(content, override)
    return parse_recipe(content, str(path))


def parse_recipe(content: dict[str, Any], source: str = "recipe", kind: type[Section] = Recipe) -> Section:
    """A Recipe, or one of its sections, from plain values; RecipeError as ``load_recipe``."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_one_line(error, content)}") from error


def schema() -> dict[str, Any]:
    """JSON schema of recipes."""
    return TypeAdapter(Recipe).json_schema()


def _override(content: dict[str, Any], override: str) -> None:
    address, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"--set {override}: must look like stage.field=value")
    *path, leaf = address.split(".")
    target: Any = content
    for part in path:
        stages = content.get("stages")
        found = [s for s in stages or [] if isinstance(s, dict) and s.get("stage") == part] if target is content else []
        if found:
            target = found[0]
        elif isinstance(target.get(part), dict):
            target = target[part]
        elif target is content and part not in Recipe.model_fields:
            known = [s.get("stage") for s in stages or [] if isinstance(s, dict)]
            raise RecipeError(
                f"--set {override}: no stage or section {part!r}; the recipe has {', '.join(map(str, known))}"
            )
        else:
            target[part] = {}
            target = target[part]
    target[leaf] = yaml.safe_load(text)


def _one_line(error: ValidationError, content: dict[str, Any]) -> str:
    problem = error.errors()[0]
    location = [part for part in problem["loc"] if part not in _TAGS]
    if location[:1] == ["stages"] and len(location) > 1:
        # as --set addresses it
        stage = content["stages"][location[1]]
        named = stage.get("stage") if isinstance(stage, dict) else None
        location[:2] = [named if named in STAGES else f"stages.{location[1]}"]
    field = ".".join(map(str, location))
    match problem["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(str(location[-1]), _names(problem["loc"]), 1, 0.4)
            return f"{field}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
        case "missing":
            return f"{field}: is missing"
        case "union_tag_invalid" | "union_tag_not_found":
            tag = problem.get("ctx", {}).get("discriminator", "'stage'").strip("'")
            valid = METHODS if tag == "method" and "recover" not in problem["loc"] else RECOVERIES
            valid = STAGES if tag == "stage" else valid
            given = problem["input"].get(tag) if isinstance(problem["input"], dict) else problem["input"]
            near = difflib.get_close_matches(str(given), valid, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f"{field}.{tag} = {given!r}: must be one of {', '.join(valid)}{hint}"
        case _:
            message = problem["msg"].removeprefix("Value error, ")
            message = message.replace("Input should be", "must be", 1)
            return f"{field} = {problem['input']!r}: {message}" if field else message


def _names(location: tuple[int | str, ...]) -> list[str]:
    """Field names that are valid where an unknown key stands."""
    tags = {str(part) for part in location}
    owners: list[type[BaseModel]] = [CFSP, CFSPReference, Shearling, Baseline, Ranked, Shear, LoRA, Full, AST, SPP]
    if "reconstruct" in tags:
        return list(Reconstruct.model_fields)
    if "target" in tags:
        return [*Target.model_fields, *Budget.model_fields]
    if "domains" in tags:
        return list(Domain.model_fields)
    if "loading" in tags:
        return list(Loading.model_fields)
    if "slorb" in tags:
        return list(SLoRB.model_fields)
    for stage in (Sparsify, Denoise, Quantise):
        if stage.model_fields["stage"].default in tags:
            return list(stage.model_fields)
    for owner in owners:
        if tags.intersection(get_args(owner.model_fields["method"].annotation)):
            return list(owner.model_fields)
    section = {"calibration": Calibration, "evaluate": Evaluation}.get(str(location[0]), Recipe)
    return list(section.model_fields)
