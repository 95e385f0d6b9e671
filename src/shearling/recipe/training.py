"""Stages that train."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from shearling.errors import check_domains
from shearling.recipe.base import RECOVERY_TEXT, TOP_K, Strict, Tokens
from shearling.recipe.domains import Domain, Loading
from shearling.recipe.shapes import ShapeOrBudget


class Train(Strict):
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
    #: model that is followed, by its name, folder or hub id; the recipe's own by default, as it was loaded or adapted
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
    #: held-out text (windows spread over it) that is scored every so many steps
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
        weights = {name: domain.weight for name, domain in value.items()}
        bare = [name for name, weight in weights.items() if weight is None]
        if not weights:
            raise ValueError("needs at least one domain")
        if bare and len(bare) < len(weights):
            raise ValueError(f"domain {bare[0]!r} has no weight; all must have one, or none")
        if not bare and not any(weights.values()):
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


class Adapt(Train):
    """Teacher correction (Minitron, arXiv 2408.11796): the model learns the text before it is pruned and followed."""

    stage: Literal["adapt"] = "adapt"
    method: Literal["full"] = "full"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5


class Recover(Train):
    stage: Literal["recover"] = "recover"


class LoRA(Recover):
    """Low-rank branches, ranks shared out over blocks, merged at the end."""

    method: Literal["lora"] = "lora"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    mean_rank: Tokens = 8
    ranks: Literal["important", "damaged", "uniform"] = "important"
    alpha_over_rank: Annotated[float, Field(gt=0)] = 2.0


class Full(Recover):
    """All parameters."""

    method: Literal["full"] = "full"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5


class SLoRB(Strict):
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


class AST(Recover):
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


class SPP(Recover):
    """SPP: multiplicative adapters of frozen masked weights, merged at the end; needs masks, and never moves them."""

    method: Literal["spp"] = "spp"
    learning_rate: Annotated[float, Field(gt=0)] = 4e-3
    #: rows of the factor that the inputs have, each for as many outputs; must divide the outputs of every linear
    rank: Tokens = 16
    #: alpha over rank
    scale: Annotated[float, Field(gt=0)] = 2.0


class Shear(Train):
    """Sheared LLaMA: gates learn, with all weights, which units an exact shape keeps; then the model is cut to it."""

    stage: Literal["shear"] = "shear"
    method: Literal["sheared-llama"] = "sheared-llama"
    target: ShapeOrBudget
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    warmup: Annotated[float, Field(ge=0)] = 0.1
    #: of gates and of multipliers; both follow the same schedule
    gate_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    multiplier_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    #: all gates open, or in the order of Minitron's activations, measured on the calibration text
    gate_start: Literal["open", "ranked"] = "open"
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
