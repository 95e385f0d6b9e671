"""Files and folders that are whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from shearling.errors import ShearlingError
from shearling.files import beside, writing
from shearling.plan import Delta, Edit, Structure, load_edits, save_edits


def test_edits_survive_the_disk(tmp_path: Path) -> None:
    edits: list[Edit] = [Structure({"ffn.1": (1, 3)}), Delta({"a": torch.randn(2, 3)})]
    save_edits(edits, tmp_path)
    structure, delta = load_edits(tmp_path)
    assert structure == edits[0]
    assert isinstance(delta, Delta) and isinstance(edits[1], Delta)
    assert torch.equal(delta.values["a"], edits[1].values["a"])


def make(kind: str, place: Path, content: str) -> None:
    if kind == "folder":
        place.mkdir()
        # only this content's own
        place = place / content
    place.write_text(content)


def read(folder: Path) -> dict[str, str]:
    """Files by their paths."""
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(params=["file", "folder"])
def kind(request: Any) -> str:
    return request.param


def test_what_is_made_appears_when_it_is_whole(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "deep" / "a"
    with beside(place) as unfinished:
        make(kind, unfinished, "whole")
        unfinished.with_suffix(".more").write_text("only for the work")
        assert not place.exists()
    assert read(tmp_path) == {"deep/a" if kind == "file" else "deep/a/whole": "whole"}
    assert [path.name for path in place.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), OSError("of the work"), ShearlingError("no")])
def test_an_end_amid_the_work_leaves_nothing(tmp_path: Path, kind: str, error: BaseException) -> None:
    def work() -> None:
        with beside(tmp_path / "a") as unfinished:
            make(kind, unfinished, "half")
            raise error

    with pytest.raises(type(error)) as raised:
        work()
    assert raised.value is error
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "a"
    began = []

    def work() -> None:
        with beside(place) as unfinished:
            began.append(unfinished)
            make(kind, unfinished, "ours")
            # someone else is faster
            place.write_text("theirs")

    for _ in range(2):
        with pytest.raises(ShearlingError, match="a: already exists; choose another name"):
            work()
        assert read(tmp_path) == {"a": "theirs"}
    assert len(began) == 1


def test_a_place_that_cannot_be_written_is_one_line_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ShearlingError, match=r"file/a: cannot be written \(Not a directory\)"),
        beside(tmp_path / "file" / "a"),
    ):
        pytest.fail("the work began")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("No space left on device")]
)
def test_what_cannot_be_written_is_one_line(error: Exception) -> None:
    with pytest.raises(ShearlingError, match=r"^a: cannot be written \(No space left on device\)"), writing(Path("a")):
        raise error


def test_what_a_killed_process_left_goes(tmp_path: Path, kind: str) -> None:
    killed = beside(tmp_path / "a")
    make(kind, killed.__enter__(), "killed")
    with beside(tmp_path / "a") as unfinished:
        make(kind, unfinished, "whole")
    assert list(read(tmp_path).values()) == ["whole"]


def test_no_process_moves_what_another_has_half_written(tmp_path: Path, kind: str, monkeypatch: Any) -> None:
    processes = [beside(tmp_path / "a") for _ in range(2)]
    for number, process in enumerate(processes):
        monkeypatch.setattr("os.getpid", lambda number=number: number)
        make(kind, process.__enter__(), "half")
    with pytest.raises(ShearlingError, match="cannot be written"):
        processes[0].__exit__(None, None, None)
    assert not (tmp_path / "a").exists()
