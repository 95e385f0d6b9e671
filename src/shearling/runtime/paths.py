"""The ways to multiply by a 2:4 weight, and the copy of it that each one reads. M tokens, O outputs, I inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from shearling.errors import ShearlingError
from shearling.kernels.compact24 import (
    Compact24,
    Compact24Int4,
    pack24,
    pack24_int4,
    random_24,
    unpack24,
    unpack24_int4,
)
from shearling.kernels.expand24 import DTYPES as MASKED_DTYPES
from shearling.kernels.expand24 import TOKENS as MASKED_TOKENS
from shearling.kernels.expand24 import Masked24, inflated, masked24, masked_product
from shearling.kernels.expand24 import obstacle as cpu_obstacle
from shearling.kernels.nvrtc import obstacle
from shearling.kernels.product24 import (
    GROUPS,
    SUMS,
    Config,
    Fragments,
    Up,
    configs,
    dense24,
    fragments_of,
    in_8_bits,
    product24,
    up_fragments,
)
from shearling.kernels.product24 import TOKENS as FRAGMENT_TOKENS
from shearling.plan import Codes, Grid

#: cuSPARSELt takes tokens by the eight, and weights whose sides are multiples of 16
CUSPARSELT_TOKENS, CUSPARSELT_SIDE = 8, 16

Copy = Tensor | Compact24 | Compact24Int4 | Fragments | Masked24


class Path(NamedTuple):
    """One way: ``name`` of ``COPIES``, and which of its variants (an algorithm's number, a config's fields)."""

    name: str
    option: tuple[int, ...] = ()


class Branch(NamedTuple):
    """A low-rank branch ``(x down^T) up^T``: ``down`` [R, I] and ``up`` [O, R], in the type of the inputs.

    ``fragments`` is ``up`` once more, as the way ``mma`` takes it; those of a block mean need no ``down``.
    """

    down: Tensor
    up: Tensor
    fragments: Up | None = None


class Beside(NamedTuple):
    """What of a branch decides which way is the fastest.

    ``block`` inputs are summed up for each of its ``rank``; 0 where t is multiplied for. ``bits`` of S are 8, or 16 for
    the type of the inputs.
    """

    rank: int
    block: int
    bits: int = 16


#: which copy of the weight a way reads
COPIES = {
    "dense": "dense",
    "decompress": "compact",
    "unpack": "fragments",
    "mma": "fragments",
    "cusparselt": "cusparselt",
    "inflate": "masked",
    "expand": "masked",
}
#: copies that are made of a compact one, where values have 4 bits too
_OF_COMPACT: dict[str, Callable[[Compact24 | Compact24Int4], Copy]] = {
    "compact": lambda compact: compact,
    "fragments": fragments_of,
    "masked": masked24,
}


def copy_of(kind: str, weight_OI: Tensor, group: int = 0, codes: Codes | None = None) -> Copy:
    """A copy, one of the values of ``COPIES``, of a 2:4 weight.

    With a ``group`` its values have 4 bits, and so many inputs share a scale: as ``codes`` say, or else rounded to the
    nearest. Raises ShearlingError for a weight that is not 2:4, and where groups do not fill the inputs.
    """
    if group:
        codes_OI, scales_OG, _ = Grid("int4", group).quantise(weight_OI) if codes is None else codes
        device = weight_OI.device
        rounded = pack24_int4(codes_OI.to(device), scales_OG.to(device, weight_OI.dtype))
        if kind in _OF_COMPACT:
            return _OF_COMPACT[kind](rounded)
        weight_OI = unpack24_int4(rounded, weight_OI.dtype)
    if kind in _OF_COMPACT:
        return _OF_COMPACT[kind](pack24(weight_OI))
    # cuSPARSELt itself would drop what is too much
    pack24(weight_OI)
    if kind == "cusparselt":
        return torch._cslt_compress(weight_OI.contiguous())  # pyrefly: ignore[missing-attribute]
    assert kind == "dense", kind
    return weight_OI.contiguous()


def check_group(name: str, inputs: int, group: int) -> None:
    """Raise ShearlingError unless there are kernels for 4-bit values in such groups, and they fill the inputs."""
    if group not in GROUPS or inputs % group:
        raise ShearlingError(
            f"{name}: {inputs} inputs in groups of {group}; in 4 bits groups must be of {', '.join(map(str, GROUPS))} "
            "inputs and fill all of them"
        )


def bytes_of(copy: Copy) -> int:
    """What a copy holds in memory."""
    return copy.nbytes if isinstance(copy, Tensor) else copy.bytes


def branch_of(down_RI: Tensor, up_OR: Tensor, kinds: Collection[str], eight_bits: bool = False) -> Branch:
    """A branch for ways that read those kinds of copies; with ``eight_bits`` S is rounded to 8 bits in all of them."""
    if eight_bits:
        codes_OR, scales = in_8_bits(up_OR)
        up_OR = (codes_OR * scales[:, None]).to(up_OR.dtype)
    if "fragments" not in kinds:
        return Branch(down_RI, up_OR)
    block = _block_of(down_RI)
    if not block and (missing := -down_RI.shape[0] % 8):
        down_RI, up_OR = F.pad(down_RI, (0, 0, 0, missing)).contiguous(), F.pad(up_OR, (0, missing)).contiguous()
    return Branch(down_RI, up_OR, up_fragments(up_OR, block=block, eight_bits=eight_bits))


def beside_of(down_RI: Tensor, eight_bits: bool = False) -> Beside:
    """What ``branch_of`` makes of such a ``down``, in the type of the inputs."""
    return Beside(down_RI.shape[0], _block_of(down_RI), 8 if eight_bits else 16)


def random_branch(outputs: int, inputs: int, beside: Beside, like: Tensor, kinds: Collection[str]) -> Branch:
    """A random branch of a kind beside a weight [outputs, inputs], of the type and device of ``like``.

    ``kinds`` as ``branch_of`` takes them. Raises ShearlingError for sums that no kernel takes, or not of all inputs.
    """
    rank, block, bits = beside
    if block and (block not in SUMS or rank * block != inputs):
        raise ShearlingError(
            f"branch: {rank} sums of {block} out of {inputs} inputs; they must be of {', '.join(map(str, SUMS))} and "
            "take in all inputs"
        )
    if block:
        down_RI = torch.eye(rank, device=like.device).repeat_interleave(block, 1)
    else:
        down_RI = torch.randn(rank, inputs, device=like.device) / inputs**0.5
    up_OR = torch.randn(outputs, rank, device=like.device) / (rank * max(block, 1)) ** 0.5
    return branch_of(down_RI.to(like.dtype), up_OR.to(like.dtype), kinds, bits == 8)


def _block_of(down_RI: Tensor) -> int:
    """So many inputs does every row sum up, one row after another, in blocks that a kernel can take; 0 for others."""
    rank, inputs = down_RI.shape
    block = inputs // rank
    if block * rank != inputs or block not in SUMS:
        return 0
    sums = torch.eye(rank, dtype=down_RI.dtype, device=down_RI.device).repeat_interleave(block, 1)
    return block if torch.equal(sums, down_RI) else 0


def paths(
    outputs: int,
    inputs: int,
    tokens: int,
    like: Tensor,
    group: int = 0,
    names: Collection[str] | None = None,
) -> tuple[Path, ...]:
    """What can multiply ``tokens`` inputs of the type and device of ``like`` by such a weight; dense comes first.

    ``group`` as ``copy_of`` takes it. ``names`` are the ways to look for, all where None.
    """
    found = [Path("dense"), Path("decompress")]
    bfloat16, wanted = like.dtype == torch.bfloat16, set(COPIES if names is None else names)
    if "cusparselt" in wanted and _takes_cusparselt(outputs, inputs, like) and not group:
        found += [Path("cusparselt", option) for option in _algorithms(outputs, inputs, tokens, like)]
    if wanted & {"mma", "unpack"} and bfloat16 and not inputs % 8 and not obstacle(like.device):
        found.append(Path("unpack"))
        if tokens <= FRAGMENT_TOKENS:
            found += [Path("mma", tuple(config)) for config in configs(outputs, inputs, tokens, group > 0)]
    if (
        wanted & {"expand", "inflate"}
        and like.device.type == "cpu"
        and like.dtype in MASKED_DTYPES
        and not cpu_obstacle()
    ):
        found += [Path("inflate"), *([Path("expand")] if tokens <= MASKED_TOKENS else [])]
    return tuple(path for path in found if path.name in wanted)


def _takes_cusparselt(outputs: int, inputs: int, like: Tensor) -> bool:
    return like.is_cuda and outputs % CUSPARSELT_SIDE == inputs % CUSPARSELT_SIDE == 0


def _algorithms(outputs: int, inputs: int, tokens: int, like: Tensor) -> tuple[tuple[int, ...], ...]:
    """The algorithm, splits of the inputs and their kind that cuSPARSELt's own search prefers, and its defaults.

    None where it cannot be used. The search multiplies random values: of zeros a GPU makes more at the same power.
    """
    weight_OI = random_24(outputs, inputs, like.dtype, like.device)
    x_MI = torch.randn(_padded(tokens), inputs, dtype=like.dtype, device=like.device)
    try:
        found = _preferred(torch._cslt_compress(weight_OI), x_MI.T)  # pyrefly: ignore[missing-attribute]
    except RuntimeError:
        # not in this build of torch, or not on this device
        return ()
    return tuple(dict.fromkeys(((0, 1, -1), found)))


def _preferred(packed: Tensor, x_IM: Tensor) -> tuple[int, ...]:
    """What the search prefers, by the function that PyTorch wants called, where a build has it."""
    given = packed, x_IM, None, None, None, True
    search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if search is None:
        return int(torch._cslt_sparse_mm_search(*given)), 1, -1  # pyrefly: ignore[missing-attribute]
    return tuple(int(number) for number in search(*given)[:3])


def product(path: Path, x_MI: Tensor, copy: Copy, branch: Branch | None = None) -> Tensor:
    """``x W^T`` [M, O], and what the branch adds."""
    if path.name == "mma":
        assert isinstance(copy, Fragments)
        up = None if branch is None else branch.fragments
        assert up is not None or branch is None, "made for other copies"
        # pyrefly: ignore[missing-attribute]
        given = F.linear(x_MI, branch.down) if up is not None and not up.block else None
        return product24(x_MI, copy, Config(*path.option), up, given)  # pyrefly: ignore[bad-argument-type]
    if path.name == "cusparselt":
        assert isinstance(copy, Tensor)
        y_MO = _cusparselt(x_MI, copy, *path.option)
    elif isinstance(copy, Masked24) and path.name == "expand" and x_MI.shape[0] <= MASKED_TOKENS:
        y_MO = masked_product(x_MI, copy)
    else:
        y_MO = F.linear(x_MI, copy if isinstance(copy, Tensor) else decompressed(copy, x_MI.dtype))
    if branch is not None:
        y_MO = y_MO.addmm_(F.linear(x_MI, branch.down), branch.up.T)
    return y_MO


def decompressed(copy: Compact24 | Compact24Int4 | Fragments | Masked24, dtype: torch.dtype) -> Tensor:
    """The dense weight [O, I] of a compact one."""
    if isinstance(copy, Masked24):
        return inflated(copy)
    if isinstance(copy, Fragments):
        return dense24(copy)
    return unpack24(copy) if isinstance(copy, Compact24) else unpack24_int4(copy, dtype)


def _cusparselt(x_MI: Tensor, packed: Tensor, algorithm: int, splits: int, kind: int) -> Tensor:
    tokens = x_MI.shape[0]
    if missing := _padded(tokens) - tokens:
        x_MI = F.pad(x_MI, (0, 0, 0, missing))
    # pyrefly: ignore[missing-attribute]
    y_MO = torch._cslt_sparse_mm(
        packed, x_MI.T, transpose_result=True, alg_id=algorithm, split_k=splits, split_k_mode=kind
    )
    return y_MO[:tokens]


def _padded(tokens: int) -> int:
    return -(-tokens // CUSPARSELT_TOKENS) * CUSPARSELT_TOKENS
