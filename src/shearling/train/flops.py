"""How much of a GPU's arithmetic a training run uses: model FLOPs over what the data sheet allows."""

from __future__ import annotations

from typing import Any

import torch

from shearling.anatomy import anatomy_of
from shearling.plan import inventory_of, sizes

#: dense FLOP/s of 16-bit products by data sheet; the first name found in the device's counts
_PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def forward_flops(model: Any, length: int) -> float:
    """FLOPs of one token's forward pass in windows of ``length``: matrix products, output head, causal attention.

    Two per multiply-add; the half of attention that the causal mask leaves out is not counted.
    """
    anatomy = anatomy_of(model.config)
    products = sizes(inventory_of(model), anatomy).flops_per_token
    # a token sees half of the window on average, once for the scores and once for the values
    return products + sum(2 * length * shape.query_heads * anatomy.head_dim for shape in anatomy.shapes)


def peak_flops(device: torch.device, count: int = 1) -> float | None:
    """FLOP/s of that many devices for 16-bit products, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * count for key, peak in _PEAKS.items() if key in name), None)
