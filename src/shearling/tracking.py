"""Numbers of training, sent to TensorBoard or trackio while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shearling.errors import ShearlingError
from shearling.recipe import Recipe


def check_tracker(recipe: Recipe) -> None:
    """Raise ShearlingError where the package that ``track`` names is not installed."""
    if recipe.track is not None and find_spec(recipe.track) is None:
        raise ShearlingError(
            f"track = {recipe.track!r}: needs the package {recipe.track}; pip install 'shearling[track]'"
        )


def scalars(event: dict[str, Any]) -> dict[str, float]:
    """The numbers of one step of training or validation as ``stage/quantity``; none of other events."""
    if "step" not in event:
        return {}
    numbers = {name: value for name, value in event.items() if type(value) in (int, float)}
    return {f"{event['stage']}/{name}": value for name, value in numbers.items() if name not in ("step", "steps")}


class Tracker:
    """Sends the numbers of a run's events to what the recipe's ``track`` names; use it as a context manager.

    It starts with the first number, so that a run which has nothing to train leaves nothing there. Raises
    ShearlingError where it cannot start, send or end.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe, self._folder = recipe, folder
        self._open: _TensorBoard | _Trackio | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            with self._one_line():
                self._open.close()

    def __call__(self, event: dict[str, Any]) -> None:
        """One event of the run."""
        numbers = scalars(event)
        if self._recipe.track is None or not numbers:
            return
        with self._one_line():
            if self._open is None:
                kind = _TensorBoard if self._recipe.track == "tensorboard" else _Trackio
                self._open = kind(self._recipe, self._folder, event["step"])
            self._open.log(numbers, event["step"])

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a package of someone else's making sets off
            reason = " ".join(str(error).split())
            raise ShearlingError(
                f"track = {self._recipe.track!r}: failed ({reason[:300]}); the run goes on with --resume, if need be "
                "without track"
            ) from error


class _TensorBoard:
    """Event files in ``tensorboard/`` of the run directory."""

    def __init__(self, recipe: Recipe, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # a killed run may have gone beyond the checkpoint from which its steps are done again
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    """A run of the project that has the run directory's name; a resumed one goes on, and tells repeated steps twice."""

    def __init__(self, recipe: Recipe, folder: Path, step: int) -> None:
        import trackio

        self._trackio = trackio
        place = folder.resolve()
        trackio.init(
            project=place.name,
            # other folders may have that name too
            name=str(place),
            config=recipe.model_dump(mode="json"),
            resume="allow" if step > 1 else "never",
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._trackio.log(numbers, step=step)

    def close(self) -> None:
        self._trackio.finish()
