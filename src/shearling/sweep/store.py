"""What a walk has finished, kept so that a killed one goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shearling.files import write_whole
from shearling.plan import write_tensors


class Store:
    """Named results in a folder, each whole or not there; without a folder nothing is kept.

    Writing raises ShearlingError where the folder cannot be written.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """Tensors kept under a name, on the CPU."""
        file = self._file(f"{name}.safetensors")
        return load_file(file) if file is not None and file.exists() else None

    def keep_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        file = self._file(f"{name}.safetensors")
        if file is not None:
            write_tensors(tensors, file)

    def content(self, name: str) -> Any:
        """What JSON can say, kept under a name; None where there is nothing."""
        file = self._file(f"{name}.json")
        return json.loads(file.read_text()) if file is not None and file.exists() else None

    def keep_content(self, name: str, content: Any) -> None:
        file = self._file(f"{name}.json")
        if file is not None:
            write_whole(file, json.dumps(content))

    def _file(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name


def block_tensors(block: nn.Module) -> dict[str, Tensor]:
    """All values of a block, under names that leave room for others beside them."""
    return {f"value/{name}": parameter for name, parameter in block.named_parameters()}


@torch.no_grad()
def take_values_(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a block the values that ``block_tensors`` named."""
    for name, parameter in block.named_parameters():
        parameter.copy_(tensors[f"value/{name}"])
