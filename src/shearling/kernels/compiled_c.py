"""C compiled when it is first used, by the machine's compiler and for its processor, and kept in the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path

from shearling.cache import cache_folder
from shearling.errors import ShearlingError

#: where PyTorch has loaded an OpenMP of the same name, its threads are shared
OPTIONS = ("-O3", "-march=native", "-shared", "-fPIC", "-fopenmp")
_COMPILERS = ("cc", "gcc", "clang")
#: bytes of a digest behind a library, which a loader does not look at: a damaged one would end the process
_DIGEST = hashlib.sha256().digest_size


def cpu_flags() -> frozenset[str]:
    """What the processor can do, as Linux names it; nothing on other systems."""
    return frozenset(_described("flags").split())


def processor() -> str:
    """The processor's name, as Linux has it; empty on other systems."""
    return _described("model name")


def library(source: str, name: str, needs: Collection[str]) -> ctypes.CDLL:
    """The compiled source, from the cache folder where it is there and whole.

    Raises ShearlingError, in one line, where the machine is not x86-64, its processor lacks one of ``needs``, there is
    no compiler, or it refuses the source.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise ShearlingError(f"{name}: is for x86-64, this is {platform.machine()}")
    flags = cpu_flags()
    if missing := sorted(set(needs) - flags):
        raise ShearlingError(f"{name}: the processor lacks {', '.join(missing)}")
    compiler = _compiler(name)
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        described = "\n".join([source, version, *OPTIONS, *sorted(flags)])
        file = cache_folder() / "compiled" / f"{name}-{hashlib.sha256(described.encode()).hexdigest()[:20]}.so"
        if not _whole(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            _compile(compiler, source, name, file)
        return ctypes.CDLL(str(file))
    except (OSError, subprocess.SubprocessError) as error:
        raise ShearlingError(f"{name}: {str(error).splitlines()[0]}") from error


def _described(what: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(what)), "")


def _compiler(name: str) -> str:
    for candidate in (os.environ.get("CC"), *_COMPILERS):
        if candidate and (found := shutil.which(candidate)):
            return found
    raise ShearlingError(f"{name}: no C compiler; install gcc or clang, or name one in CC")


def _compile(compiler: str, source: str, name: str, file: Path) -> None:
    """Beside its place and then renamed, since several processes may do so at once."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{name}-") as folder:
        text, made = Path(folder) / f"{name}.c", Path(folder) / file.name
        text.write_text(source)
        done = subprocess.run(
            [compiler, *OPTIONS, "-o", str(made), str(text)], capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
            said = next((line for line in lines if "error" in line), lines[0])
            raise ShearlingError(f"{name}: {Path(compiler).name}: {said.replace(f'{folder}{os.sep}', '')}")
        with made.open("r+b") as stream:
            digest = hashlib.sha256(stream.read()).digest()
            stream.write(digest)
        made.replace(file)


def _whole(file: Path) -> bool:
    try:
        content = file.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]
