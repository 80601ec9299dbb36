"""Events of a run, as one JSON object a line (`--events`) or as lines for people."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from jobs.events.schema import Emit, Event, RewardFigures, StartEvent, StepEvent
from loray.spec import PERPLEXITY

_POLL_S = 0.2


def encode(event: Event) -> str:
    """The event as one line of JSON. NaN and infinity become null."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()})


def decode(line: str) -> Event | None:
    """The event in a line of a job's log; None if the line is not an event. Its fields are not checked."""
    if not line.startswith('{"event"'):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return cast("Event", event) if isinstance(event, dict) else None


def describe(event: Event) -> str:
    """The event as a line for people."""
    match event["event"]:
        case "start":
            data = event["data"]
            rows = "pairs" if data.get("format") == "preference" else "rows"
            parts = [
                f"{event['num_trainable']:,} of {event['num_parameters']:,} parameters trained "
                f"({event['trainable_share']:.2%})",
                f"{event['num_steps']} steps" + (f" from {event['step']}" if event["step"] else ""),
                f"{data['num_rows']:,} {rows}, {data['num_tokens']:,} tokens, {data['num_eval_rows']} {rows} held out",
            ]
            if data["num_truncated"] or data["num_without_targets"]:
                parts.append(f"{data['num_truncated']} {rows} truncated, {data['num_without_targets']} dropped")
            parts.append(_device(event))
            return "; ".join(parts)
        case "step":
            skipped = f"  skipped {event['skipped_steps']}" if event["skipped_steps"] else ""
            return (
                f"step {event['step']}/{event['num_steps']}  loss {number(event['loss'])}{rewards(event)}  "
                f"lr {event['lr']:.2e}  grad norm {number(event['grad_norm'])}  "
                f"{speed(event)}  ETA {duration(event['eta_s'])}{skipped}"
            )
        case "eval":
            figures = f"{number(event['eval_loss'])}{rewards(event)}"
            return f"step {event['step']}  held-out loss {figures} ({event['subject']})"
        case "early_stop":
            return (
                f"step {event['step']}  ends early: {event['num_stale']} evaluations in a row were no better than "
                f"{number(event['best_eval_loss'])}"
            )
        case "checkpoint":
            return f"step {event['step']}  checkpoint saved"
        case "warning":
            return f"warning: {event['message']}"
        case "worker_lost":
            return f"a worker was lost ({event['message']}); going on from the last checkpoint"
        case "measure":
            return f"measuring {' and '.join(event['tasks'])} of base and adapter before publishing"
        case "published":
            aliases = f" ({', '.join(event['aliases'])})" if event["aliases"] else ""
            line = f"published {event['label']}{aliases}: {event['nbytes']:,} bytes, digest {event['digest'][:12]}"
            problems = filter(None, [event.get("unmeasured"), event.get("refusal")])
            return "\n".join([line, *_perplexities(event.get("evaluations", [])), *problems])
        case "trial":
            loss = f", held-out loss {number(event['losses'][-1][1])}" if event["losses"] else ""
            at = f"step {event['losses'][-1][0]:.0f}/{event['num_steps']}" if event["losses"] else "no step"
            fields = " ".join(f"{path}={value}" for path, value in event["values"].items())
            reason = f": {event['message']}" if event["message"] else ""
            return f"trial {event['trial']} of {event['num_trials']} ({fields}) {event['status']}, {at}{loss}{reason}"
        case "sweep":
            chosen = "no trial was completed" if event["best"] is None else f"the best is trial {event['best']}"
            return f"sweep {event['sweep']}: {chosen}; records and {event['picture']} are in {event['folder']}"
        case "error":
            return f"error: {event['message']}"
        case other:
            return str(other)


def _device(start: StartEvent) -> str:
    """Say what trains, and in which dtype; older events do not have it."""
    reason = f" ({start['dtype_reason']})" if start.get("dtype_reason") else ""
    return f"on {start['device']} in {start['dtype']}{reason}" if "dtype" in start else f"on {start['device']}"


def _perplexities(evaluations: Iterable[dict[str, Any]]) -> list[str]:
    """One line for each context length."""
    by_length: dict[int, list[str]] = {}
    for e in evaluations:
        if e["metric"] == PERPLEXITY:
            figures = by_length.setdefault(e["context_length"], [])
            figures.append(f"{e['subject'].replace('_', ' ')} {e['value']:.4g}")
    return [f"perplexity at {length:,} tokens: {', '.join(figures)}" for length, figures in by_length.items()]


def number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"


def rewards(figures: RewardFigures) -> str:
    """The share of pairs that are told apart, and the margin; nothing without pairs."""
    if "rewards/accuracies" not in figures:
        return ""
    return f"  accuracy {number(figures['rewards/accuracies'])}  margin {number(figures.get('rewards/margins'))}"


def speed(step: StepEvent) -> str:
    """Tokens per second of all workers, and model FLOPs utilisation (MFU)."""
    return f"{step['tokens_per_s']:,.0f} tokens/s  MFU {step['mfu']:.1%}"


def duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def first_line(error: BaseException) -> str:
    """The first line of the innermost cause: Ray wraps errors in layers that hold tracebacks as text."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"


class EventTail:
    """A thread that passes every event appended to a file to `emit`, until the `with` block ends.

    Another process, `jobs.events.sink`, writes the file, which remains as the run's history.
    """

    def __init__(self, path: Path, emit: Emit) -> None:
        self._path, self._emit = path, emit
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="loray-events", daemon=True)

    def __enter__(self) -> EventTail:
        self._path.touch()
        self._offset = self._path.stat().st_size  # events of earlier drivers are not emitted again
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        partial = ""
        with self._path.open(encoding="utf-8") as file:
            file.seek(self._offset)
            while True:
                finished = self._done.is_set()  # read first: events written before it is set are still emitted
                *lines, partial = (partial + file.read()).split("\n")
                for line in lines:
                    if event := decode(line):
                        self._emit(event)
                if finished:
                    return
                self._done.wait(_POLL_S)
