"""CUDA C++ compiled when it is first used, by the compiler that comes with PyTorch, and launched through the driver.

Neither a CUDA toolkit nor a C++ compiler is needed, and launches may have what PyTorch's own do not: clusters, and a
start before the kernel before has ended.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from shearling.errors import ShearlingError

#: ids of cuda.h
_SHARED_MEMORY, _CLUSTER, _EARLY = 8, 4, 6
_ARCHITECTURE = "sm_90a"


def obstacle(device: torch.device) -> str | None:
    """What stands in the way of such kernels on a device, in one line; None where nothing does."""
    if device.type != "cuda" or torch.version.hip:
        return f"{device}: is no NVIDIA GPU"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return f"{torch.cuda.get_device_name(device)}: the kernels are for Hopper (compute capability 9.0)"
    try:
        _compiler()
    except ShearlingError as error:
        return str(error)
    return None


def compiled(source: str, macros: Mapping[str, int]) -> bytes:
    """Machine code for Hopper of a source without headers.

    Raises ShearlingError where there is no NVRTC, and RuntimeError with its words where it refuses the source.
    """
    options = [f"--gpu-architecture={_ARCHITECTURE}", "--std=c++17", *(f"-D{k}={v}" for k, v in macros.items())]
    return _compile(_compiler(), source, options)


class Kernel:
    """A kernel of compiled code on the current device, which must have been used before."""

    def __init__(self, code: bytes, name: str) -> None:
        self._driver = _driver()
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(self._module), code))
        self._check(self._driver.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))
        self._shared = 48 * 1024

    def __call__(
        self,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        arguments: Sequence[ctypes.Structure | ctypes._SimpleCData],
        *,
        cluster: int = 1,
        early: bool = False,
    ) -> None:
        """Launch on the current stream; ``cluster`` blocks of a column of the grid share their memory.

        ``early`` lets it start before the kernel before has ended; it then waits for that itself.
        """
        if shared > self._shared:
            self._check(self._driver.cuFuncSetAttribute(self._function, _SHARED_MEMORY, shared))
            self._shared = shared
        attributes = (_Attribute * 2)()
        count = 0
        if cluster > 1:
            attributes[count].id = _CLUSTER
            attributes[count].value[:3] = [1, cluster, 1]
            count += 1
        if early:
            attributes[count].id = _EARLY
            attributes[count].value[0] = 1
            count += 1
        stream = torch.cuda.current_stream().cuda_stream
        config = _Config(*grid, 1, threads, 1, 1, shared, stream, attributes, count)
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        self._check(self._driver.cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None))

    def _check(self, result: int) -> None:
        if result:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(result, ctypes.byref(text))
            raise RuntimeError(f"CUDA driver: {text.value.decode() if text.value else result}")


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _compiler() -> ctypes.CDLL:
    """NVRTC: as the loader finds it (PyTorch may have loaded it), or in the packages that PyTorch depends on."""
    major = (torch.version.cuda or "13").partition(".")[0]
    name = f"libnvrtc.so.{major}"
    places = [name]
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or [] if package else []:
        places += [str(file) for file in Path(folder).glob(f"*/lib/{name}")]
    places += [str(Path(home) / "lib64" / name) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    for place in places:
        try:
            # it looks for these by their name alone
            for builtins in Path(place).parent.glob("libnvrtc-builtins.so.*") if place != name else ():
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise ShearlingError(
        f"{name}: not found; 2:4 kernels need NVIDIA's run-time compiler, pip install nvidia-cuda-nvrtc"
    )


def _compile(library: ctypes.CDLL, source: str, options: Sequence[str]) -> bytes:
    program = ctypes.c_void_p()
    _success(library, library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"source.cu", 0, None, None))
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), given):
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"CUDA source with {' '.join(options)}:\n{log.value.decode()}")
        size = ctypes.c_size_t()
        _success(library, library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        _success(library, library.nvrtcGetCUBIN(program, code))
        return code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _success(library: ctypes.CDLL, result: int) -> None:
    if result:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {library.nvrtcGetErrorString(result).decode()}")
