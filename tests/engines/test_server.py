"""A pruned model behind the server that comes with transformers, asked as OpenAI's clients ask."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shearling.export import save_model
from tests.engines.reference import PROMPTS, greedy

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason=f"{package} is not installed, which transformers serve needs; make engines")

#: how long a server may take until it answers, and an answer
SECONDS = 120
TOKENS = 12


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def opener() -> urllib.request.OpenerDirector:
    """Whatever proxy the environment names, this machine is asked itself."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with opener().open(f"{address}/health", timeout=1) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the server does not answer: {log.read_text()}")


@pytest.fixture(scope="module")
def server(cut_smollm2: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of a server of the pruned model, and the model's folder."""
    place = tmp_path_factory.mktemp("served")
    save_model(*cut_smollm2, place / "model", provenance={})
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(place / "model")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (place / "log").open("wb") as log:
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(f"http://127.0.0.1:{port}", running, place / "log")
            yield f"http://127.0.0.1:{port}", place / "model"
        finally:
            running.kill()
            running.wait()


def ask(address: str, path: str, **body: Any) -> dict[str, Any]:
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}{path}", json.dumps(body).encode(), kind)
    with opener().open(request, timeout=SECONDS) as answer:
        return json.load(answer)


def test_completions_are_the_models_greedy_text(server: tuple[str, Path], cut_smollm2: tuple[Any, Any]) -> None:
    address, folder = server
    for prompt in PROMPTS:
        answer = ask(address, "/v1/completions", model=str(folder), prompt=prompt, max_tokens=TOKENS, temperature=0)
        text = answer["choices"][0]["text"]
        assert text.strip() and text == greedy(*cut_smollm2, prompt, TOKENS)


def test_a_chat_follows_the_template(server: tuple[str, Path], cut_smollm2: tuple[Any, Any]) -> None:
    (address, folder), (model, tokenizer) = server, cut_smollm2
    messages = [{"role": "user", "content": "Name a colour."}]
    answer = ask(
        address, "/v1/chat/completions", model=str(folder), messages=messages, max_tokens=TOKENS, temperature=0
    )
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = answer["choices"][0]["message"]["content"]
    assert text.strip() and text == greedy(model, tokenizer, prompt, TOKENS)
