"""How a terminal shows a run that it follows: a bar from the first second on, and the losses as a picture."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from jobs.events import (
    AdapterOutcome,
    ErrorEvent,
    Event,
    ProgressEvent,
    PublishedEvent,
    StepEvent,
    adapter_of,
    decode,
    describe,
    duration,
    number,
    portion,
    shown,
    speed,
)
from loray.cli.output import table

_LOG_LINES = 20
_LINES_OF_STEPS = 10  # that a run prints without a terminal
_STAGE_LINE_S = 10.0  # between two lines of one stage there
_LABELS = ("loss", "held out")
_MOST_COLUMNS, _BESIDE = 100, 32  # of the picture, and of the label and figures around it


class _TimeLeft(ProgressColumn):
    """The time that the last event told, less what has passed since."""

    def render(self, task: Task) -> Text:
        ends_at = task.fields["ends_at"]
        return Text("" if ends_at is None else f"ETA {duration(max(0.0, ends_at - time.monotonic()))}")


_BLOCKS = "▁▂▃▄▅▆▇█"


def _sparkline(values: Sequence[float | None], low: float, high: float) -> str:
    """Draws a block for each value, from the lowest at `low` to the highest at `high`. None is the value before it, or
    a space where there is none yet.
    """
    drawn, block = [], " "
    for value in values:
        if value is not None:
            share = (value - low) / (high - low) if high > low else 0.0
            block = _BLOCKS[round(min(1.0, max(0.0, share)) * (len(_BLOCKS) - 1))]
        drawn.append(block)
    return "".join(drawn)


class LossPicture:
    """The losses of training and of held-out rows as two lines of blocks, which share a scale."""

    def __init__(self, num_columns: int) -> None:
        self._num_columns, self._num_steps = num_columns, 1
        self._lines: tuple[dict[int, float], ...] = ({}, {})  # means by column; of held-out rows the last loss
        self._ends: dict[str, tuple[float, float]] = {}  # first and last loss
        self._counted = (0, 0)  # the column of the last step, and how many steps are in its mean

    def begin(self, num_steps: int) -> None:
        self._num_steps = max(1, num_steps)

    def add(self, label: str, step: int, loss: float | None) -> None:
        if loss is None:
            return
        column = max(0, step - 1) * self._num_columns // self._num_steps
        line = self._lines[_LABELS.index(label)]
        self._ends[label] = (self._ends.get(label, (loss, loss))[0], loss)
        if label == "held out":
            line[column] = loss
            return
        count = self._counted[1] if self._counted[0] == column else 0
        self._counted = column, count + 1
        line[column] = (line.get(column, 0.0) * count + loss) / (count + 1)

    def summary(self) -> str:
        """Writes the first and the last loss of both; nothing without any."""
        ends = [(label, *self._ends[label]) for label in _LABELS if label in self._ends]
        return ", ".join(f"{label} {number(first)} → {number(last)}" for label, first, last in ends)

    def lines(self) -> list[str]:
        """Draws a line for each that has losses."""
        known = [loss for line in self._lines for loss in line.values()]
        drawn = []
        for label, line in zip(_LABELS, self._lines, strict=True):
            if line:
                first, last = self._ends[label]
                values = [line.get(column) for column in range(max(max(each, default=0) for each in self._lines) + 1)]
                picture = _sparkline(values, min(known), max(known))
                drawn.append(f"{label:8}  {picture}  {number(first)} → {number(last)}")
        return drawn


class _View:
    """Prints events. Stages have lines where there is no terminal: one at the beginning, and one each ten seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed: tuple[str, float] = ("", 0.0)  # the last stage that has a line, and when

    def _print(self, event: Event) -> None:
        self._console.print(escape(describe(event)), highlight=False, soft_wrap=True)

    def _print_stage(self, stage: str, event: Event) -> None:
        printed, printed_at = self._printed
        is_due = stage != printed or time.monotonic() - printed_at >= _STAGE_LINE_S
        if not self._console.is_terminal and is_due:
            self._printed = stage, time.monotonic()
            self._print(event)


class RunView(_View):
    """Shows the lines of a job's log. Keeps the events `published` and `error`, and the last other lines in `log`.
    Calls `begun` once, when the job tells its first event.
    """

    def __init__(self, console: Console, begun: Callable[[], None] = lambda: None) -> None:
        super().__init__(console)
        self._begun, self._has_begun = begun, False
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            _TimeLeft(),
            console=console,
        )
        self._task = self._progress.add_task("starting", total=None, figures="", ends_at=None)
        self._picture = LossPicture(max(8, min(_MOST_COLUMNS, console.width - _BESIDE)))
        self._live = Live(get_renderable=self._render, console=console, transient=True)
        self._eval_loss: float | None = None
        self.published: PublishedEvent | None = None
        self.error: ErrorEvent | None = None
        self.log: deque[str] = deque(maxlen=_LOG_LINES)

    def __enter__(self) -> RunView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._console.is_terminal:
            self._live.stop()
        drawn = self._picture.lines() if self._console.is_terminal else [self._picture.summary()]
        if any(drawn):
            self._console.print(*drawn, sep="\n", highlight=False, markup=False, soft_wrap=True)

    def _render(self) -> Group:
        return Group(self._progress, *(Text(line, no_wrap=True) for line in self._picture.lines()))

    def feed(self, line: str) -> None:
        event = decode(line)
        if event is None:
            if line.strip():
                self.log.append(line)
            return
        if not self._has_begun:
            self._has_begun = True
            self._begun()
        match event["event"]:
            case "start":
                self._picture.begin(event["num_steps"])
                self._show("training", event["step"], event["num_steps"], "", None)
                self._print(event)
            case "step":
                self._step(event)
            case "eval":
                if event["subject"] == "adapter":
                    self._eval_loss = event["eval_loss"]
                self._picture.add("held out", event["step"], event["eval_loss"])
                self._print(event)
            case "progress":
                self._stage(event)
            case "rollout":
                every = max(1, event["num_steps"] // _LINES_OF_STEPS)
                if event["step"] % every == 0:
                    self._print(event)
            case "batch" | "warning" | "worker_lost" | "measure" | "early_stop" | "samples":
                self._print(event)
            case "published":
                self.published = event
            case "error":
                self.error = event

    def _step(self, event: StepEvent) -> None:
        held_out = "" if self._eval_loss is None else f"  held out {number(self._eval_loss)}"
        figures = f"loss {number(event['loss'])}{shown(event)}{held_out}  {speed(event)}"
        at, num_steps = event["step"], event["num_steps"]
        self._picture.add("loss", at, event["loss"])
        self._show("training", at, num_steps, f"{at:,}/{num_steps:,}  {figures}", event["eta_s"])
        every = max(1, num_steps // _LINES_OF_STEPS)
        if not self._console.is_terminal and at % every == 0:
            self._print(event)

    def _stage(self, event: ProgressEvent) -> None:
        stage, total = event["stage"], event["total"]
        self._show(stage, event["done"], total, portion(event).removeprefix(": "), event.get("eta_s"))
        self._print_stage(stage, event)

    def _show(self, stage: str, done: float, total: float | None, figures: str, eta_s: float | None) -> None:
        ends_at = None if eta_s is None else time.monotonic() + eta_s
        self._progress.update(
            self._task, description=stage, completed=done, total=total, figures=figures, ends_at=ends_at
        )


@dataclass
class _Line:
    """Holds what the table shows of one adapter."""

    state: str = "waiting"
    step: StepEvent | None = None
    num_steps: int | None = None
    eval_losses: tuple[float | None, ...] = ()  # the first one, of the base, and the last one


class ManyView(_View):
    """Shows the log of a job that trains several adapters: a table with a line for each, of many those that train.
    Keeps `outcomes`, the event `error`, and the last other lines in `log`. Calls `begun` at the first event.
    """

    def __init__(self, console: Console, begun: Callable[[], None] | None = None) -> None:
        super().__init__(console)
        self._begun = begun
        self._lines: dict[str, _Line] = {}
        self._stage = "starting"
        self._live = Live(get_renderable=self._render, console=console, transient=True)
        self.outcomes: list[AdapterOutcome] = []
        self.error: ErrorEvent | None = None
        self.log: deque[str] = deque(maxlen=_LOG_LINES)

    def __enter__(self) -> ManyView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def feed(self, line: str) -> None:
        event = decode(line)
        if event is None:
            if line.strip():
                self.log.append(line)
            return
        if self._begun is not None:
            self._begun()
            self._begun = None
        name = adapter_of(event)
        if name is not None:
            self._of_adapter(self._lines.setdefault(name, _Line()), event)
            return
        match event["event"]:
            case "adapters":
                self._lines = {name: _Line() for name in event["adapters"]}
                self._print(event)
            case "round":
                self._show(event, "training")
            case "progress":
                self._show(event, event["stage"])
            case "plan" | "warning" | "worker_lost":
                self._print(event)
            case "outcomes":
                self.outcomes = event["adapters"]
            case "error":
                self.error = event

    def table(self) -> Table:
        """Lists how each adapter has ended, and its held-out loss before and after."""
        rows = []
        for o in self.outcomes:
            losses = self._lines.get(o["name"], _Line()).eval_losses
            held_out, message = " → ".join(map(number, losses)), o["message"].partition("\n")[0]
            rows.append((o["name"], o["status"], o["step"], held_out, o["label"], message))
        return table(("ADAPTER", "STATE", "STEP", "HELD OUT", "VERSION", "MESSAGE"), rows, right=("STEP",))

    def _show(self, event: Event, stage: str) -> None:
        self._stage = describe(event)
        self._print_stage(stage, event)

    def _of_adapter(self, line: _Line, event: Event) -> None:
        match event["event"]:
            case "start":
                line.state, line.num_steps = "training", event["num_steps"]
            case "step":
                line.state, line.step = "training", event
            case "eval":
                line.eval_losses = (*line.eval_losses[:1], event["eval_loss"])
            case "end":
                line.state = "publishing" if event["status"] == "succeeded" else event["status"]
                if event["status"] != "succeeded":
                    self._print(event)
            case "published":
                line.state = f"published {event['label']}"
                self._print(event)
            case "early_stop" | "measure" | "warning":
                self._print(event)

    def _render(self) -> Group:
        lines = list(self._lines.items())
        most = max(4, self._console.height - 6)
        if len(lines) > most:  # those that have something to show
            lines.sort(key=lambda item: (item[1].state == "waiting", item[1].state != "training"))
        shown = [(name, *_figures(line)) for name, line in lines[:most]]
        made = table(("ADAPTER", "STEP", "LOSS", "TOKENS/S", "ETA", "STATE"), shown, right=_RIGHT)
        left = len(lines) - len(shown)
        more = [Text(f"and {left} more")] if left else []
        return Group(Text(self._stage, no_wrap=True), made, *more)


_RIGHT = ("STEP", "LOSS", "TOKENS/S", "ETA")


def _figures(line: _Line) -> tuple[str, str, str, str, str]:
    step = line.step
    if step is None:
        return "", "", "", "", line.state
    held_out = f" ({number(line.eval_losses[-1])})" if line.eval_losses else ""
    return (
        f"{step['step']}/{step['num_steps']}",
        f"{number(step['loss'])}{held_out}",
        f"{step['tokens_per_s']:,.0f}",
        duration(step["eta_s"]),
        line.state,
    )
