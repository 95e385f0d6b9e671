"""An export read back by a reader that is not its writer, and what its logits differ by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from shearling.errors import ShearlingError

#: tokenised, these are what an export is tried on; models without a tokenizer get random tokens
PROMPTS = (
    "The shearling was one year old when it was shorn for the first time.",
    "def merge(left, right):\n    return sorted(left + right)",
    "In 1889 the Eiffel Tower was 312 metres high; 7 + 5 = 12.",
)


@dataclass(frozen=True)
class Verification:
    """How an export's logits compare with the model's, over ``tokens`` positions.

    ``relative`` is the norm of the difference over the norm of the logits, without their mean over the vocabulary;
    ``agreement`` the share of positions with the same likeliest token. ``beyond_rounding`` is the relative difference
    from a model whose weights are rounded as the format rounds them: how well the reader understood the export.
    """

    reader: str
    version: str
    tokens: int
    max_difference: float
    relative: float
    beyond_rounding: float
    agreement: float

    def to_json(self) -> dict[str, Any]:
        """The content of ``shearling.json`` under ``verified``."""
        return asdict(self)


def prompt_ids(tokenizer: Any, vocab: int, length: int = 32) -> list[Tensor]:
    """Token ids [T] of each prompt, at most ``length`` tokens; random ones where there is no tokenizer."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(vocab, (size,), generator=generator) for size in (length, length // 2, 3)]
    return [torch.tensor(tokenizer(prompt)["input_ids"][:length]) for prompt in PROMPTS]


@torch.no_grad()
def logits_of(model: Any, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Logits [T, V] in float32 of each prompt."""
    device = model.get_input_embeddings().weight.device
    return [model(input_ids=ids[None].to(device), use_cache=False).logits[0].float().cpu() for ids in prompts]


def compare(
    reader: str, expected: Sequence[Tensor], rounded: Sequence[Tensor], found: Sequence[Tensor], *, tolerance: float
) -> Verification:
    """Compare found logits [T, V] with those expected, and with those of rounded weights; ``reader`` is a package.

    Raises ShearlingError where the latter differ by more than the tolerance, or shapes differ.
    """
    expected_NV, rounded_NV, found_NV = (torch.cat(list(logits)) for logits in (expected, rounded, found))
    if expected_NV.shape != found_NV.shape:
        raise ShearlingError(
            f"{reader} reads logits {list(found_NV.shape)} where the model has {list(expected_NV.shape)}"
        )
    beyond = _relative(found_NV, rounded_NV)
    if not beyond <= tolerance:
        raise ShearlingError(
            f"{reader} reads a model whose logits differ by {beyond:.3g} of their size, more than the {tolerance:g} "
            "that its arithmetic explains; nothing was written"
        )
    return Verification(
        reader=reader,
        version=_version(reader),
        tokens=len(expected_NV),
        max_difference=float((found_NV - expected_NV).abs().max()),
        relative=_relative(found_NV, expected_NV),
        beyond_rounding=beyond,
        agreement=float((expected_NV.argmax(-1) == found_NV.argmax(-1)).float().mean()),
    )


def verify(
    reader: str,
    read: Callable[[list[Tensor]], list[Tensor]],
    prompts: list[Tensor],
    expected: Sequence[Tensor],
    *,
    rounded: Sequence[Tensor] | None = None,
    tolerance: float,
) -> Verification:
    """Compare what ``read`` makes of the prompts with what is expected (of rounded weights, where given).

    Raises ShearlingError as ``compare`` does, and where the reader fails.
    """
    try:
        found = read(prompts)
    except ShearlingError:
        raise
    except Exception as error:  # whatever the reader makes of a file that it does not understand
        reason = " ".join(str(error).split())
        raise ShearlingError(f"{reader} cannot read the export ({reason[:300]}); nothing was written") from error
    return compare(reader, expected, expected if rounded is None else rounded, found, tolerance=tolerance)


def _relative(found_NV: Tensor, right_NV: Tensor) -> float:
    size = (right_NV - right_NV.mean(-1, keepdim=True)).norm()
    return float((found_NV - right_NV).norm() / size.clamp_min(1e-30))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
