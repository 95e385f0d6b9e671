"""llama.cpp's own quantiser, for the types whose rounding only it has."""

from __future__ import annotations

import logging
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from shearling.errors import ShearlingError

#: llama.cpp's number of each type (``llama_ftype``)
K_QUANTS = {
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
}


def quantize_file(source: Path, target: Path, kind: str) -> None:
    """Round a GGUF file into another by ``llama-quantize`` on PATH or the package ``llama_cpp``.

    llama.cpp itself takes another type for a tensor whose rows no block of 256 divides. Raises ShearlingError where
    there is neither program nor package, and where it fails.
    """
    program = shutil.which("llama-quantize")
    if program:
        done = subprocess.run([program, source, target, kind.upper()], capture_output=True, text=True, check=False)
        failure = done.stderr.strip().rpartition("\n")[2] if done.returncode else ""
    elif find_spec("llama_cpp"):
        failure = _by_package(source, target, kind)
    else:
        raise ShearlingError(
            f"type {kind!r}: is rounded by llama.cpp; put llama-quantize on PATH, pip install llama-cpp-python, or "
            "give q4_1"
        )
    if failure or not target.exists():
        target.unlink(missing_ok=True)
        raise ShearlingError(f"type {kind!r}: llama.cpp refused to round ({failure[:200] or 'no file came out'})")


def _by_package(source: Path, target: Path, kind: str) -> str:
    import llama_cpp

    wish = llama_cpp.llama_model_quantize_default_params()
    wish.ftype = K_QUANTS[kind]
    # it would print several lines a tensor; the package goes by this level
    log = logging.getLogger("llama-cpp-python")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), wish)
    finally:
        log.setLevel(level)
    return f"code {code}" if code else ""
