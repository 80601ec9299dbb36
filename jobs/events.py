"""Events of a run: their fields, as lines of JSON and for people."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from loray.spec import OBJECTIVES, PERPLEXITY, EndStatus, Subject

_POLL_S = 0.2
_FEW_ROWS = 20  # held out, below which one row more or less moves their loss visibly
_ENDS: Mapping[EndStatus, str] = {"succeeded": "trained", "failed": "failed", "stopped": "was stopped"}
_STAGE_S = 1.0  # from one event of a stage to the next


class StartEvent(TypedDict):
    """Training starts, or resumes after `step`. Rank 0 adds why the dtype is what it is, and how MFU is
    computed (`jobs.workers.reporting`).
    """

    event: Literal["start"]
    step: int
    num_steps: int
    num_parameters: int
    num_trainable: int
    trainable_share: float
    num_workers: int
    num_threads: int
    device: str
    dtype: str
    pid: int
    data: dict[str, Any]
    dtype_reason: NotRequired[str]
    flops_per_token: NotRequired[float]
    peak_flops: NotRequired[float]
    peak_source: NotRequired[str]


class StepEvent(TypedDict):
    """One optimizer step, with its objective's metrics: see `figures`. A loss or norm that is not finite is null in
    JSON. Rank 0 adds MFU, the peak FLOP/s of a worker that it is a share of, and peak memory.
    """

    event: Literal["step"]
    step: int
    num_steps: int
    epoch: int
    loss: float | None
    lr: float
    grad_norm: float | None
    tokens_per_s: float
    num_tokens: int
    skipped_steps: int
    eta_s: float
    mfu: NotRequired[float]
    peak_flops: NotRequired[float]
    memory_bytes: NotRequired[int]


class RolloutEvent(TypedDict):
    """A step of reinforcement learning: how its answers were, what it learned, and how long that took. `version` is the
    one that it made, by its number of updates; `samples`: some answers, as in SamplesEvent, with rewards and versions.
    """

    event: Literal["rollout"]
    step: int
    num_steps: int
    version: int
    digest: str
    metrics: dict[str, Any]
    samples: list[dict[str, str]]


class EvalEvent(TypedDict):
    """Losses of held-out rows, with the objective's metrics. Rewards have no loss beside them."""

    event: Literal["eval"]
    step: int
    subject: Subject
    eval_loss: float | None


class EarlyStopEvent(TypedDict):
    """The run ends here: `num_stale` evaluations in a row were no better than the best one before them."""

    event: Literal["early_stop"]
    step: int
    num_steps: int
    best_eval_loss: float | None
    num_stale: int


class CheckpointEvent(TypedDict):
    """A checkpoint; `path` is where it was uploaded to."""

    event: Literal["checkpoint"]
    step: int
    eval_loss: float | None
    path: NotRequired[str]


class BatchEvent(TypedDict):
    """The rows of a step are cut into so many micro-batches (`accumulation`), by what the workers' memory holds."""

    event: Literal["batch"]
    rows: int
    accumulation: int
    reason: str


class WarningEvent(TypedDict):
    event: Literal["warning"]
    message: str


class WorkerLostEvent(TypedDict):
    event: Literal["worker_lost"]
    message: str


class ProgressEvent(TypedDict):
    """A stage before or after the steps, or between them: `done` of `total`. A total of 1 says that `done` is a share;
    None: nobody knows how much there is. `eta_s`: until the run's last stage ends, where that can be told.
    """

    event: Literal["progress"]
    stage: str
    done: float
    total: float | None
    eta_s: NotRequired[float]


class MeasureEvent(TypedDict):
    """The evaluation before publishing begins."""

    event: Literal["measure"]
    tasks: list[str]


class SamplesEvent(TypedDict):
    """Base and adapter have answered a few held-out prompts: `prompt`, `expected` of the data, `base`, `adapter`."""

    event: Literal["samples"]
    samples: list[dict[str, str]]


class PublishedEvent(TypedDict):
    """`refusal`: why the gate refused the aliases, None if it did not. `unmeasured`: why it could not be measured, and
    how to do it later, None if it was or was not to be. `evaluations`: as in the manifest.
    """

    event: Literal["published"]
    name: str
    version: int
    label: str
    digest: str
    nbytes: int
    aliases: list[str]
    refusal: NotRequired[str | None]
    unmeasured: NotRequired[str | None]
    step: int
    evaluations: NotRequired[list[dict[str, Any]]]


class TrialEvent(TypedDict):
    """A sweep's trial has changed: the fields are those of `jobs.sweeps.spec.TrialRecord`."""

    event: Literal["trial"]
    num_trials: int
    trial: int
    values: dict[str, str]
    status: str
    num_steps: int | None
    losses: list[list[float]]
    message: str


class SweepEvent(TypedDict):
    """All trials have ended. `folder` holds their records, and `picture` their losses; `best`: None if all failed.
    `keep_best`: trials rank by their lowest loss and not by their last one, as the recipe says.
    """

    event: Literal["sweep"]
    sweep: str
    folder: str
    picture: str
    best: int | None
    keep_best: bool


class AdaptersEvent(TypedDict):
    """A job trains these adapters, each as the job of this id, on so many workers. Events of one of them have its name
    in a further field, `adapter`.
    """

    event: Literal["adapters"]
    adapters: dict[str, str]
    num_workers: int


class PlanEvent(TypedDict):
    """Says what a cohort of adapters takes of its workers."""

    event: Literal["plan"]
    lines: list[str]


class RoundEvent(TypedDict):
    """Each of the active adapters of a worker has done a step, in so many passes through the base."""

    event: Literal["round"]
    round: int
    num_active: int
    num_passes: int
    num_tokens: int
    tokens_per_s: float
    eta_s: float


class EndEvent(TypedDict):
    """The training of one adapter among others has ended. `message`: why it failed, or None."""

    event: Literal["end"]
    step: int
    status: EndStatus
    message: str | None


class AdapterOutcome(TypedDict):
    """`label`: the version; empty where there is none. `message`: why; or the gate's refusal of the aliases."""

    name: str
    job_id: str
    status: EndStatus
    step: int
    label: str
    message: str


class OutcomesEvent(TypedDict):
    """All adapters of a job have ended."""

    event: Literal["outcomes"]
    adapters: list[AdapterOutcome]


class ErrorEvent(TypedDict):
    """`kind`: the name of the error's class."""

    event: Literal["error"]
    kind: str
    message: str


LoopEvent = StartEvent | StepEvent | EvalEvent | EarlyStopEvent | CheckpointEvent | ProgressEvent
Event = (
    LoopEvent
    | BatchEvent
    | RolloutEvent
    | WarningEvent
    | WorkerLostEvent
    | MeasureEvent
    | SamplesEvent
    | PublishedEvent
    | TrialEvent
    | SweepEvent
    | AdaptersEvent
    | PlanEvent
    | RoundEvent
    | EndEvent
    | OutcomesEvent
    | ErrorEvent
)
Emit = Callable[[Event], None]


class Stages:
    """Tells how far stages are, as events: the beginning of each, its end, and one a second between them."""

    def __init__(self, emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        self._emit, self._clock = emit, clock
        self._stage, self._told_at = "", 0.0

    def __call__(self, stage: str, done: float = 0, total: float | None = None, *, eta_s: float | None = None) -> None:
        """`stage` is what goes on, as "tokenising"; the other arguments are those of the event."""
        now = self._clock()
        if stage == self._stage and done != total and now - self._told_at < _STAGE_S:
            return
        self._stage, self._told_at = stage, now
        event: ProgressEvent = {"event": "progress", "stage": stage, "done": done, "total": total}
        if eta_s is not None:
            event["eta_s"] = eta_s
        self._emit(event)


SILENT = Stages(lambda event: None)


def encode(event: Event, at: float | None = None) -> str:
    """Writes the event as one line of JSON. NaN and infinity become null. `at` is added as its `time`, in seconds since
    1970, which lines of a run's file have.
    """
    fields = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()}
    return json.dumps(fields if at is None else fields | {"time": round(at, 3)})


def decode(line: str) -> Event | None:
    """Reads the event in a line of a job's log; None if the line is not an event. Its fields are not checked."""
    if not line.startswith('{"event"'):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return cast("Event", event) if isinstance(event, dict) else None


def adapter_of(event: Event) -> str | None:
    """Returns the adapter that the event is of, in a job of several."""
    found: str | None = dict(event).get("adapter")  # type: ignore[assignment]
    return found


def describe(event: Event) -> str:
    """Writes the event as a line for people."""
    line, adapter = _described(event), adapter_of(event)
    return line if adapter is None else f"{adapter}: {line}"


def _described(event: Event) -> str:
    match event["event"]:
        case "start":
            data = event["data"]
            rows = "pairs" if data.get("format") in ("preference", "openai_preference") else "rows"
            parts = [
                f"{event['num_trainable']:,} of {event['num_parameters']:,} parameters trained "
                f"({event['trainable_share']:.2%})",
                f"{event['num_steps']} steps" + (f" from {event['step']}" if event["step"] else ""),
                data["rendering"],
                f"{data['num_rows']:,} {rows}, {data['num_tokens']:,} tokens, {data['num_eval_rows']} {rows} held out",
            ]
            if 0 < data["num_eval_rows"] < _FEW_ROWS:
                parts[-1] += f" (fewer than {_FEW_ROWS}: their loss is noisy)"
            if data["num_truncated"] or data["num_without_targets"]:
                parts.append(f"{data['num_truncated']} {rows} truncated, {data['num_without_targets']} dropped")
            cut_rows, cut_tokens, length_99 = data["cut"]
            if cut_rows:
                parts.append(
                    f"{cut_rows:.1%} of {rows} and {cut_tokens:.1%} of tokens beyond {data['max_length']:,} tokens, "
                    f"{length_99:,} keep 99 % whole"
                )
            reason = f" ({event['dtype_reason']})" if event.get("dtype_reason") else ""
            parts.append(f"on {event['device']} in {event['dtype']}{reason}")
            return "; ".join(parts)
        case "step":
            skipped = f"  skipped {event['skipped_steps']}" if event["skipped_steps"] else ""
            return (
                f"step {event['step']}/{event['num_steps']}  loss {number(event['loss'])}{shown(event)}  "
                f"lr {event['lr']:.2e}  grad norm {number(event['grad_norm'])}  "
                f"{speed(event)}  ETA {duration(event['eta_s'])}{skipped}"
            )
        case "rollout":
            known = event["metrics"]
            apart = known.get("mismatch_mean")
            return (
                f"step {event['step']}/{event['num_steps']}  reward {number(known['reward_mean'])}  "
                f"{known['groups_kept']} groups learned from, {known['groups_dropped']} alike, "
                f"{known['dropped_stale']} too old  {known['answer_tokens']:,} tokens"
                + ("" if apart is None else f"  mismatch {apart:.2g}")
            )
        case "eval" if event["eval_loss"] is None and "reward" in event:
            return f"step {event['step']}  held-out{shown(event)} ({event['subject']})"
        case "eval":
            loss = f"{number(event['eval_loss'])}{shown(event)}"
            return f"step {event['step']}  held-out loss {loss} ({event['subject']})"
        case "early_stop":
            return (
                f"step {event['step']}  ends early: {event['num_stale']} evaluations in a row were no better than "
                f"{number(event['best_eval_loss'])}"
            )
        case "checkpoint":
            return f"step {event['step']}  checkpoint saved"
        case "batch":
            at_once, times = event["rows"], event["accumulation"]
            is_cut = times > 1
            cut = f"{at_once} rows at once, {times} times a step" if is_cut else f"all {at_once} rows of a step at once"
            return f"batch: {cut} ({event['reason']})"
        case "warning":
            return f"warning: {event['message']}"
        case "worker_lost":
            return f"a worker was lost ({event['message']}); going on from the last checkpoint"
        case "progress":
            return f"{event['stage']}{portion(event)}"
        case "measure":
            return f"measuring {' and '.join(event['tasks'])} of base and adapter before publishing"
        case "samples":
            return "\n\n".join(_sample(sample) for sample in event["samples"])
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
        case "adapters":
            workers = f" on {event['num_workers']} workers" if event["num_workers"] > 1 else ""
            return f"training {len(event['adapters'])} adapters in one job{workers}"
        case "plan":
            return "\n".join(f"plan: {line}" for line in event["lines"])
        case "round":
            return (
                f"round {event['round']}  {event['num_active']} adapters in {event['num_passes']} passes  "
                f"{event['tokens_per_s']:,.0f} tokens/s  ETA {duration(event['eta_s'])}"
            )
        case "end":
            reason = f": {event['message']}" if event["message"] else ""
            return f"{_ENDS[event['status']]}, at step {event['step']}{reason}"
        case "outcomes":
            counts = Counter(outcome["status"] for outcome in event["adapters"])
            return ", ".join(f"{count} {status}" for status, count in counts.items())
        case "error":
            return f"error: {event['message']}"
        case other:
            return str(other)


def _sample(sample: Mapping[str, str]) -> str:
    """Writes a line for each part, however many it has."""
    width = max(map(len, sample))
    lines = {name: " ⏎ ".join(text.splitlines()) or "(nothing)" for name, text in sample.items()}
    return "\n".join(f"{name.ljust(width)}  {line}" for name, line in lines.items())


def _perplexities(evaluations: Iterable[dict[str, Any]]) -> list[str]:
    """Writes one line for each context length."""
    by_length: dict[int, list[str]] = {}
    for e in evaluations:
        if e["metric"] == PERPLEXITY:
            figures = by_length.setdefault(e["context_length"], [])
            figures.append(f"{e['subject'].replace('_', ' ')} {e['value']:.4g}")
    return [f"perplexity at {length:,} tokens: {', '.join(figures)}" for length, figures in by_length.items()]


def number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"


def figures(event: StepEvent | EvalEvent) -> dict[str, float | None]:
    """Returns the metrics of an event's objective, beside the loss."""
    values: Mapping[str, Any] = event
    names = (name for spec in OBJECTIVES.values() for name in spec.metrics)
    return {name: values[name] for name in names if name in values}


def shown(event: StepEvent | EvalEvent) -> str:
    """Writes those of them that a line for people has."""
    found = figures(event)
    labels = {name: label for spec in OBJECTIVES.values() for name, label in spec.shown.items()}
    return "".join(f"  {label} {number(found[name])}" for name, label in labels.items() if name in found)


def in_words(event: Event) -> str:
    """Describes an event that another version may have written; one that cannot be described stays JSON."""
    try:
        return describe(event)
    except (KeyError, TypeError, ValueError):
        return encode(event)


def portion(event: ProgressEvent) -> str:
    """Writes how far a stage is, after its name; nothing where nobody knows."""
    done, total = event["done"], event["total"]
    if total is None:
        return ""
    return f": {done:.0%}" if total == 1 else f": {done:,.0f} of {total:,.0f}"


def speed(step: StepEvent) -> str:
    """Writes the tokens per second of all workers, and model FLOPs utilisation (MFU) where it is known."""
    mfu = f"  MFU {step['mfu']:.1%}" if "mfu" in step else ""
    return f"{step['tokens_per_s']:,.0f} tokens/s{mfu}"


def duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def first_line(error: BaseException) -> str:
    """Returns the first line of the innermost cause: Ray wraps errors in layers that hold tracebacks as text."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"


def appending(path: Path) -> Emit:
    """Makes a function that appends an event to a file, in one write."""

    def append(event: Event) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{encode(event, time.time())}\n")

    return append


@contextmanager
def following(path: Path, emit: Emit) -> Iterator[None]:
    """Passes every event that is appended to a file to `emit`, in a thread, until the `with` block ends.

    Another process, `jobs.workers.reporting`, writes the file, which remains as the run's history.
    """
    path.touch()
    offset, done = path.stat().st_size, threading.Event()  # events of earlier drivers are not emitted again

    def follow() -> None:
        partial = ""
        with path.open(encoding="utf-8") as file:
            file.seek(offset)
            while True:
                finished = done.is_set()  # read first: events written before it is set are still emitted
                *lines, partial = (partial + file.read()).split("\n")
                for line in lines:
                    if event := decode(line):
                        emit(event)
                if finished:
                    return
                done.wait(_POLL_S)

    thread = threading.Thread(target=follow, name="loray-events", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
