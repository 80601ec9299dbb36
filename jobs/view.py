"""How a terminal shows a run that it follows: a bar from the first second on, and the losses as a picture."""

from __future__ import annotations

from collections import deque

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from jobs.events import ErrorEvent, Event, PublishedEvent, StepEvent, decode, describe, number, shown, speed

_LOG_LINES = 20
_LINES_OF_STEPS = 10  # step lines that a run prints without a terminal


class RunView:
    """Shows the lines of a job's log. Keeps the events `published` and `error`, and the last other lines in `log`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=None, figures="")
        self._eval_loss: float | None = None
        self.published: PublishedEvent | None = None
        self.error: ErrorEvent | None = None
        self.log: deque[str] = deque(maxlen=_LOG_LINES)

    def __enter__(self) -> RunView:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def feed(self, line: str) -> None:
        event = decode(line)
        if event is None:
            if line.strip():
                self.log.append(line)
            return
        match event["event"]:
            case "start":
                self._progress.update(
                    self._task, description="training", total=event["num_steps"], completed=event["step"]
                )
                self._print(event)
            case "step":
                self._step(event)
            case "eval":
                self._eval_loss = event["eval_loss"]
                self._print(event)
            case "warning" | "worker_lost" | "measure" | "early_stop":
                self._print(event)
            case "published":
                self.published = event
            case "error":
                self.error = event

    def _step(self, event: StepEvent) -> None:
        held_out = "" if self._eval_loss is None else f"  held out {number(self._eval_loss)}"
        figures = f"loss {number(event['loss'])}{shown(event)}{held_out}  {speed(event)}"
        self._progress.update(self._task, completed=event["step"], figures=figures)
        every = max(1, event["num_steps"] // _LINES_OF_STEPS)
        if not self._console.is_terminal and event["step"] % every == 0:
            self._print(event)

    def _print(self, event: Event) -> None:
        self._console.print(escape(describe(event)), highlight=False, soft_wrap=True)
