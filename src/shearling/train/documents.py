"""Documents of a packed window kept apart: where their tokens stand, what is predicted, what a token may look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

from shearling.errors import ShearlingError
from shearling.kernels import IGNORE

#: kinds of attention that take a mask as a tensor
_MASKED = ("sdpa", "eager")


def next_tokens(input_ids: Tensor, separator: int | None = None) -> Tensor:
    """Labels [B, T]: the token after each one, -100 after the last.

    With documents apart also -100 after a ``separator``: the next document's first token does not follow from it, and
    is never predicted, as with Megatron's ``eod-mask-loss``. The separator itself is: it says where documents end.
    """
    labels = nn.functional.pad(input_ids[:, 1:], (0, 1), value=IGNORE)
    return labels if separator is None else labels.masked_fill(input_ids == separator, IGNORE)


def document_positions(input_ids: Tensor, separator: int | None) -> Tensor | None:
    """Position [B, T] of each token in its document, from 0 after every ``separator`` and where a window begins.

    None without a separator: then all of a window is one document.
    """
    if separator is None:
        return None
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    begins = nn.functional.pad(input_ids[:, :-1] == separator, (1, 0), value=True)
    return place - torch.where(begins, place, 0).cummax(dim=1).values


def document_numbers(position_ids: Tensor) -> Tensor:
    """Number [B, T] of the document that each token is of, by positions as ``document_positions`` has them."""
    return (position_ids == 0).cumsum(dim=1)


def document_masks(model: Any, position_ids: Tensor) -> Any:
    """What a model takes for ``attention_mask`` so that no token looks beyond its document, nor ahead.

    One mask [B, 1, T, T], or one by each kind of layer where a config lists them. Must run where transformers asks
    ``document_numbers`` which tokens belong together. Raises ShearlingError for attention that takes no such mask.
    """
    kind = model.config._attn_implementation
    if kind not in _MASKED:
        raise ShearlingError(f"documents apart: attention by {kind} takes no mask of them; use {' or '.join(_MASKED)}")
    # its shape, type and device are read and nothing else
    like = torch.empty(*position_ids.shape, 0, dtype=model.dtype, device=position_ids.device)
    masks = create_masks_for_generate(model.config, like, None, None, position_ids)
    if kind == "eager":
        return masks
    return (
        {name: _added(mask, model) for name, mask in masks.items()} if isinstance(masks, dict) else _added(masks, model)
    )


def _added(mask: Tensor, model: Any) -> Tensor:
    """A bool mask as what is added to the scores, in the type of the products."""
    # else every layer makes, and keeps for the backward pass, such a mask of its own
    device = mask.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
