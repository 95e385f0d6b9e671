"""Low-rank branches as a LoRA folder of peft: ``adapter_config.json`` and ``adapter_model.safetensors``.

peft's ``lora_A`` is ``down`` and its ``lora_B`` is ``up``, in this orientation beside Conv1D too; the scale is
alpha / r, or alpha / sqrt(r) where the config says ``use_rslora``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shearling.anatomy import Anatomy
from shearling.errors import ShearlingError
from shearling.files import write_whole
from shearling.plan import Adapters, write_tensors

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
#: config fields under which the same tensors mean something else
_REFUSED = ("alora_invocation_tokens", "arrow_config", "layer_replication", "use_dora", "use_qalora")


def save_adapters(adapters: Adapters, folder: Path | str, anatomy: Anatomy) -> None:
    """Write branches of a model of that anatomy as a folder that ``peft.PeftModel.from_pretrained`` loads.

    The config comes last, so a folder without it is unfinished. Raises ShearlingError when the folder cannot be
    written.
    """
    folder = Path(folder)
    tensors = {f"{_PREFIX}{path}{_DOWN}": down for path, down in adapters.down.items()}
    tensors |= {f"{_PREFIX}{path}{_UP}": up for path, up in adapters.up.items()}
    write_tensors(tensors, folder / TENSORS, {"format": "pt"})
    write_whole(folder / CONFIG, json.dumps(_config(adapters, anatomy), indent=2) + "\n")


def load_adapters(folder: Path | str) -> Adapters:
    """Read the branches of such a folder, whoever wrote it.

    Raises ShearlingError where the folder is not whole and where its adapter does more than low-rank branches do.
    """
    folder = Path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).exists():
            raise ShearlingError(f"{folder}: no {name}; give a peft folder with {CONFIG} and {TENSORS}")
    try:
        config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ShearlingError(f"{folder}: cannot be read ({error}); write it again") from error
    _check_plain(config, folder)
    down, up = _part(tensors, _DOWN), _part(tensors, _UP)
    if unknown := sorted(tensors.keys() - {_PREFIX + path + _DOWN for path in down} - {_PREFIX + p + _UP for p in up}):
        raise ShearlingError(f"{folder}: {unknown[0]} is no factor of a LoRA branch; only lora_A and lora_B are read")
    if alone := sorted(down.keys() ^ up.keys()):
        raise ShearlingError(f"{folder}: {alone[0]} has one factor; it needs both lora_A and lora_B")
    return Adapters(down, up, {path: _scale(config, path, len(factor)) for path, factor in down.items()})


def _config(adapters: Adapters, anatomy: Anatomy) -> dict[str, Any]:
    ranks = {path: len(down) for path, down in adapters.down.items()}
    alphas = {path: adapters.scale[path] * rank for path, rank in ranks.items()}
    # engines that ignore the patterns allocate r, and are right where all scales are the same
    widest = max(ranks, key=lambda path: ranks[path])
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": ranks[widest],
        "lora_alpha": alphas[widest],
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": list(ranks),
        "fan_in_fan_out": anatomy.family.input_first,
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _check_plain(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ShearlingError(f"{folder}: peft_type={config.get('peft_type')!r} is not supported; must be LORA")
    for field in _REFUSED:
        if config.get(field):
            raise ShearlingError(f"{folder}: {field}={config[field]!r} is not supported; only plain LoRA is")


def _part(tensors: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(_PREFIX).removesuffix(suffix): tensor
        for name, tensor in tensors.items()
        if name.startswith(_PREFIX) and name.endswith(suffix)
    }


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    alpha = config.get("lora_alpha", 8)  # peft's default
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        # peft takes keys for regular expressions that the end of a path matches, and the first that does
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = own
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
