"""A progress bar fed by the events of training."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class TrainProgress:
    """Shows steps, loss, learning rate, speed and the time left; give it to ``train`` as ``on_event``.

    Use it as a context manager.
    """

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
        )
        self._task = self._progress.add_task("training", total=total_steps, state="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        if "loss" in event:
            used = f" ({event['flops_utilisation']:.0%} of FLOPs)" if "flops_utilisation" in event else ""
            state = (
                f"loss {event['loss']:.3f}  lr {event['learning_rate']:.1e}  "
                f"{event['tokens_per_second']:.0f} tokens/s{used}  {_duration(event['eta_seconds'])} left"
            )
            self._progress.update(self._task, completed=event["step"], state=state)
        elif "validation_loss" in event:
            self._say(f"step {event['step']}: validation loss {event['validation_loss']:.4f}")
        elif "warning" in event:
            self._say(f"step {event['step']}: {event['warning']}")

    def _say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
