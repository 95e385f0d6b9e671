"""A model in a format that engines load: written beside its place, read back, compared, and then moved there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.anatomy import anatomy_of
from shearling.errors import ShearlingError
from shearling.export.deci import pad_shapes, write_deci
from shearling.export.gguf import gguf_architecture, write_gguf
from shearling.export.gguf_readers import verify_gguf
from shearling.export.llama_quantize import K_QUANTS, quantize_file
from shearling.export.onnx import check_packages, onnx_logits, write_onnx
from shearling.export.verify import Verification, logits_of, prompt_ids, verify
from shearling.files import beside, writing

#: formats beside the Hugging Face folder that ``save_model`` writes
FORMATS = ("gguf", "deci", "onnx")
#: of a GGUF file, where none is named
GGUF_TYPE = "f16"
_RECORD = "shearling.json"
#: relative difference of logits where nothing is rounded, in float32 and in halves
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.05


def check_format(config: Any, to: str, kind: str | None) -> None:
    """Raise ShearlingError where the format ``to`` cannot hold a model with this config, and say what can.

    ``kind`` is GGUF's type; other formats have none.
    """
    if to not in FORMATS:
        raise ShearlingError(f"format {to!r}: must be one of {', '.join(FORMATS)}")
    if to == "gguf":
        gguf_architecture(config, kind or GGUF_TYPE)
    elif kind is not None:
        raise ShearlingError(f"type {kind!r}: is for gguf; {to} keeps the model's own, leave it out")
    elif to == "deci":
        pad_shapes(anatomy_of(config))
    else:
        check_packages()


def export_gguf(
    model: Any, tokenizer: Any, file: Path | str, *, kind: str, provenance: Mapping[str, Any], check: bool = True
) -> dict[str, Any]:
    """Write a model as a GGUF file, with ``FILE.json`` beside it; returns what that says of the export.

    With ``check`` other readers compare it first (``verify_gguf``). Raises ShearlingError where the file exists, the
    model does not fit the format, or a reader reads another model; then nothing is left.
    """
    file = Path(file)
    name = str(provenance.get("recipe", {}).get("model") or file.stem)
    gguf_architecture(model.config, kind)
    with beside(file) as unfinished, writing(file):
        if kind in K_QUANTS:
            wide = unfinished.with_suffix(".f32")
            write_gguf(model, tokenizer, wide, "f32", name)
            if check:
                verify_gguf(model, tokenizer, wide, "f32")
            quantize_file(wide, unfinished, kind)
            # 4 bytes a weight that no reader needs
            wide.unlink()
        else:
            write_gguf(model, tokenizer, unfinished, kind, name)
        found = verify_gguf(model, tokenizer, unfinished, kind) if check else []
        record = _record("gguf", found, type=kind, bytes=unfinished.stat().st_size)
    _write_record(file.with_name(f"{file.name}.json"), provenance, record)
    return record


def export_deci(
    model: Any, tokenizer: Any, folder: Path | str, *, provenance: Mapping[str, Any], check: bool = True
) -> dict[str, Any]:
    """Write a model as a DeciLM folder; returns what its ``shearling.json`` says of the export.

    ``added_bytes`` is what filling blocks up to shapes of the format costs. With ``check`` transformers loads it with
    the module in the folder, which is not Shearling's. Raises ShearlingError as ``export_gguf`` does.
    """

    def write(unfinished: Path) -> dict[str, Any]:
        padding, added = write_deci(model, tokenizer, unfinished)
        ffn = [shape.ffn for shape in padding.shapes]
        kv_heads = [shape.kv_heads for shape in padding.shapes]
        return {"ffn": ffn, "kv_heads": kv_heads, "added_bytes": added}

    def read(unfinished: Path) -> Verification:
        from transformers import AutoModelForCausalLM

        def by_transformers(prompts: list[Tensor]) -> list[Tensor]:
            options = {"trust_remote_code": True, "dtype": model.dtype, "use_safetensors": True}
            return logits_of(AutoModelForCausalLM.from_pretrained(unfinished, **options).eval(), prompts)

        return _compare(model, tokenizer, "transformers", by_transformers)

    return _export_folder("deci", Path(folder), write, read if check else None, provenance)


def export_onnx(
    model: Any, tokenizer: Any, folder: Path | str, *, provenance: Mapping[str, Any], check: bool = True
) -> dict[str, Any]:
    """Write a model as a folder with an ONNX graph; returns what its ``shearling.json`` says of the export.

    With ``check`` onnxruntime runs it first. Raises ShearlingError as ``export_gguf`` does.
    """

    def write(unfinished: Path) -> dict[str, Any]:
        write_onnx(model, tokenizer, unfinished)
        return {}

    def read(unfinished: Path) -> Verification:
        def by_onnxruntime(prompts: list[Tensor]) -> list[Tensor]:
            return onnx_logits(unfinished, prompts)

        return _compare(model, tokenizer, "onnxruntime", by_onnxruntime)

    return _export_folder("onnx", Path(folder), write, read if check else None, provenance)


def _export_folder(
    name: str,
    folder: Path,
    write: Callable[[Path], dict[str, Any]],
    read: Callable[[Path], Verification] | None,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    with beside(folder) as unfinished, writing(folder):
        unfinished.mkdir()
        details = write(unfinished)
        found = [] if read is None else [read(unfinished)]
        size = sum(file.stat().st_size for file in unfinished.iterdir())
        record = _record(name, found, **details, bytes=size)
        _write_record(unfinished / _RECORD, provenance, record)
    return record


def _record(name: str, found: list[Verification], **details: Any) -> dict[str, Any]:
    return {"format": name, **details, "verified": [verification.to_json() for verification in found]}


def _write_record(file: Path, provenance: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    file.write_text(json.dumps({**provenance, "export": record}, indent=2) + "\n")


def _compare(model: Any, tokenizer: Any, reader: str, read: Callable[[list[Tensor]], list[Tensor]]) -> Verification:
    prompts = prompt_ids(tokenizer, anatomy_of(model.config).vocab)
    tolerance = _TOLERANCE if model.dtype == torch.float32 else _HALF_TOLERANCE
    return verify(reader, read, prompts, logits_of(model, prompts), tolerance=tolerance)


def describe(record: Mapping[str, Any]) -> list[str]:
    """Lines for a person: what was written, and who read it back with what difference."""
    lines = [f"{record['format']} {record.get('type', '')}".strip() + f"  {record['bytes']:,} bytes"]
    if record.get("added_bytes"):
        lines.append(f"{record['added_bytes']:,} of them are zeros that fill blocks up to shapes of the format")
    for found in record["verified"]:
        lines.append(
            f"read back by {found['reader']} {found['version']}: relative difference {found['relative']:.2g}, "
            f"{found['beyond_rounding']:.2g} beyond the rounding, {found['agreement']:.1%} the same likeliest token"
        )
    return lines
