"""The terminal display of `herd raise`: a bar per stage, the remaining time, and live samples.

Without a terminal it prints plain lines, so that a log file is easy to read.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID

from ..units import duration

MIN_DONE = 15.0
"""Predicted seconds of finished stages that suffice to correct the prediction of the others."""


class Show:
    """A progress display of stages with predicted times. Use it as a context manager."""

    def __init__(self, predicted_seconds: dict[str, float], console: Console | None = None) -> None:
        self.console = console or Console()
        self.predicted = predicted_seconds
        self.finished: set[str] = set()
        self.done_seconds = self.done_predicted = 0.0
        self.stage = ""
        self.stage_began = time.monotonic()
        self.bar = Progress(
            "{task.description:<11}", BarColumn(bar_width=28), "{task.fields[note]}",
            console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task: TaskID | None = None
        self.fraction = 0.0

    def __enter__(self) -> Show:
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    @property
    def seconds_left(self) -> float:
        """The predicted time of the remaining work, corrected by the time of what is done."""
        over = self.finished | {self.stage}
        waiting = sum(seconds for name, seconds in self.predicted.items() if name not in over)
        if self.done_predicted > MIN_DONE:
            waiting *= self.done_seconds / self.done_predicted
        current = self.predicted.get(self.stage, 0.0)
        if self.fraction > 0.05:
            current = (time.monotonic() - self.stage_began) / self.fraction
        return waiting + current * (1 - self.fraction)

    def begin(self, stage: str, title: str) -> None:
        self.stage, self.stage_began, self.fraction = stage, time.monotonic(), 0.0
        left = f"  [dim]({duration(self.seconds_left)} left)[/dim]" if self.predicted else ""
        self.line(f"[bold]{stage}[/bold]  {title}{left}")
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(stage, total=1.0, note="")

    def advance(self, fraction: float, note: str) -> None:
        """Show that ``fraction`` of the current stage is done, with ``note`` next to the bar."""
        self.fraction = fraction
        if self.task is not None:
            self.bar.update(self.task, completed=fraction, note=f"{note}  {duration(self.seconds_left)} left")

    def end(self, seconds: float) -> None:
        self.finished.add(self.stage)
        said = ""
        if self.stage in self.predicted:
            self.done_seconds += seconds
            self.done_predicted += self.predicted[self.stage]
            said = f" [dim](predicted: {duration(self.predicted[self.stage])})[/dim]"
        self.line(f"  [green]done[/green] in {duration(seconds)}{said}")

    def skip(self, stage: str) -> None:
        self.finished.add(stage)
        self.line(f"[bold]{stage}[/bold]  [dim]already done[/dim]")

    def gate(self, name: str, passed: bool, value: str) -> None:
        mark = "[green]passed[/green]" if passed else "[red]failed[/red]"
        self.line(f"  gate “{name}” {mark} ({value})")

    def note(self, text: str) -> None:
        self.line(f"  [yellow]note[/yellow] {escape(text)}")

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Show on one line the prompt and the text that the model generates after it."""
        shown = " ".join((prompt + "\0" + text).split())[:150].split("\0")
        tail = shown[1] if len(shown) > 1 else ""
        self.line(f"  [dim]step {step}[/dim] {escape(shown[0])}[cyan]{escape(tail)}[/cyan]")

    def line(self, markup: str) -> None:
        self.console.print(markup, highlight=False, soft_wrap=not self.console.is_terminal)
