"""A GGUF file that llama.cpp runs on cells."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shearling.errors import ShearlingError
from shearling.evaluate.bench import Cell, Prefill
from shearling.evaluate.speed import now
from shearling.usage import held_bytes

#: positions that llama.cpp makes room for at a time
_ROOM = 256
_CPU = torch.device("cpu")


def check_gguf(file: Path) -> None:
    """Raise ShearlingError for what is no GGUF file, and where llama.cpp is missing."""
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise ShearlingError(f"{file}: cannot be read ({error.strerror}); give a GGUF file") from error
    if magic != b"GGUF":
        raise ShearlingError(f"{file}: is not a GGUF file; it must begin with GGUF")
    if importlib.util.find_spec("llama_cpp") is None:
        raise ShearlingError(f"{file}: needs the package llama_cpp; pip install llama-cpp-python")


class LlamaCppEngine:
    """An ``Engine`` of a GGUF file, with as many threads as PyTorch has; on CUDA all layers are on the GPU.

    Rows are sequences of one context. Raises ShearlingError for a file that llama.cpp cannot load, and for CUDA with a
    llama.cpp built without it.
    """

    runner = "llama.cpp"

    def __init__(self, file: Path, device: torch.device) -> None:
        check_gguf(file)
        import llama_cpp

        self.name, self.disk_bytes = str(file), file.stat().st_size
        self._api: Any = llama_cpp
        self._gpu = device.type == "cuda"
        if self._gpu and not llama_cpp.llama_supports_gpu_offload():
            raise ShearlingError(f"{file}: this llama_cpp is built without GPU support; use --device cpu")
        silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        # llama.cpp keeps the pointer alone
        self._silence = silence
        llama_cpp.llama_log_set(silence, None)
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 999 if self._gpu else 0
        before = held_bytes()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        if not self._model:
            raise ShearlingError(f"{file}: llama.cpp cannot load it; convert it with a current version")
        self.weight_bytes = None if self._gpu else held_bytes() - before
        self.parameters = llama_cpp.llama_model_n_params(self._model)
        told = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self._model, told, len(told))
        # names the types of its weights
        self.note = told.value.decode(errors="replace")
        self._words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context: Any = None

    def check(self, cell: Cell) -> None:
        # those with learned positions end the process beyond them
        limit, length = self._api.llama_model_n_ctx_train(self._model), cell.context + cell.generate
        if length > limit:
            raise ShearlingError(f"bench: {self.name}: context and steps: {length} tokens exceed its {limit} positions")

    def prepare(self, cell: Cell) -> None:
        self.release()
        self._cell = cell
        options = self._api.llama_context_default_params()
        options.n_ctx = cell.batch * (-(-(cell.context + cell.generate) // _ROOM) * _ROOM)
        options.n_batch = cell.batch * cell.context
        options.n_seq_max = cell.batch
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.offload_kqv = options.op_offload = self._gpu
        self._context = self._api.llama_init_from_model(self._model, options)
        if not self._context:
            raise ShearlingError(f"bench: {self.name}: llama.cpp has no memory for {cell}; take fewer or shorter rows")
        shape = (cell.batch, cell.context)
        ids_BT = torch.randint(self._words, shape, generator=torch.Generator().manual_seed(0))
        self._prompts = self._batch(ids_BT.tolist())
        self._next = self._batch([[0]] * cell.batch)

    def prefill(self) -> Prefill:
        self._api.llama_memory_clear(self._memory, True)
        start = now(_CPU)
        self._run(self._prompts)
        read = now(_CPU) - start
        width = self._cell.context
        self._first = self._most_likely(range(width - 1, width * self._cell.batch, width))
        return Prefill(read, now(_CPU) - start)

    def decode(self) -> list[float]:
        rows, times, tokens = range(self._cell.batch), [], self._first
        for row in rows:
            if not self._api.llama_memory_seq_rm(self._memory, row, self._cell.context, -1):
                raise ShearlingError(f"bench: {self.name}: llama.cpp cannot take its cache back; bench it without this")
        for step in range(self._cell.generate):
            start = now(_CPU)
            for row in rows:
                self._next.token[row], self._next.pos[row] = tokens[row], self._cell.context + step
            self._run(self._next)
            tokens = self._most_likely(rows)
            times.append(now(_CPU) - start)
        return times

    def release(self) -> None:
        if self._context is not None:
            for batch in (self._prompts, self._next):
                self._api.llama_batch_free(batch)
            self._api.llama_free(self._context)
        self._context = None

    @property
    def _memory(self) -> Any:
        return self._api.llama_get_memory(self._context)

    def _batch(self, rows: Sequence[Sequence[int]]) -> Any:
        """Tokens of sequences 0, 1, ... from position 0; the last of each is followed by logits."""
        batch = self._api.llama_batch_init(sum(map(len, rows)), 0, 1)
        place = 0
        for row, ids in enumerate(rows):
            for position, token in enumerate(ids):
                batch.token[place], batch.pos[place] = token, position
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
                batch.logits[place] = position == len(ids) - 1
                place += 1
        batch.n_tokens = place
        return batch

    def _run(self, batch: Any) -> None:
        code = self._api.llama_decode(self._context, batch)
        self._api.llama_synchronize(self._context)
        if code:
            raise ShearlingError(f"bench: {self.name}: llama.cpp could not run {self._cell} (code {code})")

    def _most_likely(self, places: Sequence[int]) -> list[int]:
        pointers = (self._api.llama_get_logits_ith(self._context, place) for place in places)
        return [int(np.ctypeslib.as_array(pointer, (self._words,)).argmax()) for pointer in pointers]
