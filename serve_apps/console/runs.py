"""Runs as their events, or Ray's log, tell them, and runs beside each other.

Of the steps and losses of a run an evenly thinned part is kept.
"""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

from jobs.events import Event, adapter_of, decode, in_words
from jobs.runs.history import RunEvents
from jobs.sweeps.history import SweepTrials, Trials
from jobs.sweeps.spec import TrialRecord, best, label, ranked
from loray.catalog import Job
from loray.errors import ClusterError, LogsGone, StoreError
from loray.settings import Settings
from loray.spec import Subject, TrainSpec, qualified_name, split_qualified
from loray.telemetry import get_logger

TRAINING, HELD_OUT, REWARDED = "training", "held out, adapter", "held out, greedy"
_MOST, _MOST_OF_BASELINE = 470, 20  # losses of a line
_BASELINES: tuple[Subject, ...] = ("parent", "base_scaled", "base")
MOST_POINTS = 2 * _MOST + len(_BASELINES) * _MOST_OF_BASELINE
MOST_STEPS = 400
MOST_JOBS = 64  # the one that nobody looked at for longest is read from its beginning again
LOG_LINES = 200
CURVE_LINES = 2000  # of Ray's log, where a curve is made of it
_DRAWN_TRIALS = 5  # lines that can be told apart
_SHOWN_TRIALS = 50

_log = get_logger(__name__)

T = TypeVar("T")
Line = Mapping[int, float]  # by step


class Curve(NamedTuple):
    """Two lists in JSON. `labels`: of x and of each line. `points`: the steps, and a list of values for each line, with
    null where a step has none.
    """

    labels: str
    points: str


def curve_of(lines: Mapping[str, Line]) -> Curve | None:
    """Write the lines as a curve; None where no line has a point."""
    steps = sorted(set().union(*lines.values()))
    if not steps:
        return None
    points = [steps, *([line.get(step) for step in steps] for line in lines.values())]
    return Curve(json.dumps(["step", *lines]), json.dumps(points))


class Series(Generic[T]):
    """Values by ascending step: every `stride`-th, of which fewer than `most` are kept, and the last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[int, T] = {}
        self._last: tuple[int, T] | None = None
        self._num_seen, self._stride = 0, 1

    def add(self, step: int, value: T) -> None:
        """A step before the last one begins the rest of the series anew."""
        if self._last is not None and step == self._last[0]:
            self._last = (step, value)
            self._kept |= {step: value} if step in self._kept else {}
            return
        if self._last is not None and step < self._last[0]:
            self._kept = {earlier: kept for earlier, kept in self._kept.items() if earlier < step}
        self._last = (step, value)
        if self._num_seen % self._stride == 0:
            self._kept[step] = value
            if len(self._kept) >= self._most:
                self._kept = dict(list(self._kept.items())[::2])
                self._stride *= 2
        self._num_seen += 1

    def values(self) -> dict[int, T]:
        return dict(self._kept) if self._last is None else self._kept | dict([self._last])


class Losses:
    """Collects losses from events, of each line an evenly thinned part: one of training, and one of held-out rows for
    each model that they were measured of.
    """

    def __init__(self) -> None:
        self._training, self._adapter = Series[float](_MOST), Series[float](_MOST)
        self._baselines: dict[str, Series[float]] = {subject: Series(_MOST_OF_BASELINE) for subject in _BASELINES}

    def take(self, events: Iterable[Event]) -> None:
        """A step before the last one begins the rest of its series anew.

        Held-out losses are those of evaluations: the event of a checkpoint repeats one, and may come late. Those of
        models that this version does not know are passed over.
        """
        for event in events:
            if not isinstance(step := event.get("step"), int):
                continue
            if isinstance(loss := event.get("loss"), float):
                self._training.add(step, loss)
            if event.get("event") == "eval" and isinstance(loss := event.get("eval_loss"), float):
                subject = str(event.get("subject", "adapter"))
                series = self._adapter if subject == "adapter" else self._baselines.get(subject)
                if series is not None:
                    series.add(step, loss)

    def lines(self) -> dict[str, Line]:
        """Return training and the adapter, then the baselines that were measured; nothing without any loss.

        A baseline is measured before training, which does not change it, so its line goes on to the last step.
        """
        lines: dict[str, Line] = {TRAINING: self._training.values(), HELD_OUT: self._adapter.values()}
        baselines = {s: values for s, series in self._baselines.items() if (values := series.values())}
        steps = set().union(*lines.values(), *baselines.values())
        if not steps:
            return {}
        for subject, values in baselines.items():
            lines[f"held out, {subject.replace('_', ' ')}"] = values | {max(steps): values[max(values)]}
        return lines


class RunStep(NamedTuple):
    """Figures of one step; None where its event has none. Seconds, bytes of the peak, MFU as a share."""

    step: int
    num_steps: int | None
    loss: float | None
    lr: float | None
    tokens_per_s: float | None
    mfu: float | None
    memory_bytes: float | None
    eta_s: float | None


class RunProgress:
    """Collects steps from events, an evenly thinned part of them and the last one."""

    def __init__(self) -> None:
        self._events = Series[Event](MOST_STEPS)  # of which few become a RunStep

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            if event.get("event") == "step" and isinstance(step := event.get("step"), int):
                self._events.add(step, event)

    def steps(self) -> tuple[RunStep, ...]:
        return tuple(_step(step, dict(event)) for step, event in self._events.values().items())


def _step(step: int, event: dict[str, Any]) -> RunStep:
    def figure(name: str) -> float | None:
        value = event.get(name)
        return value if isinstance(value, int | float) else None

    num_steps = event.get("num_steps")
    return RunStep(
        step,
        num_steps if isinstance(num_steps, int) else None,
        *(figure(name) for name in ("loss", "lr", "tokens_per_s", "mfu", "memory_bytes", "eta_s")),
    )


class Stage(NamedTuple):
    """A stage of a run and how far it is. `share` None: nobody knows."""

    text: str
    share: float | None
    eta_s: float | None


class RunStages:
    """Collects from events what goes on beside the steps, and what base and adapter have answered."""

    def __init__(self) -> None:
        self.stage: Stage | None = None
        self.samples: Sequence[Mapping[str, str]] = ()

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            match event.get("event"):
                case "progress":
                    figures: Mapping[str, Any] = dict(event)
                    done, total, eta_s = (figures.get(name) for name in ("done", "total", "eta_s"))
                    share = None
                    if isinstance(done, int | float) and isinstance(total, int | float) and total > 0:
                        share = done / total
                    self.stage = Stage(in_words(event), share, eta_s if isinstance(eta_s, int | float) else None)
                case "start" | "step":
                    self.stage = None
                case "samples" if isinstance(found := dict(event).get("samples"), list):
                    self.samples = [sample for sample in found if isinstance(sample, dict)]


class Rollout(NamedTuple):
    """The last step of a run that learns from rewards: the version that it made, and some of its answers."""

    step: int
    version: int
    digest: str
    samples: Sequence[Mapping[str, str]]


class Rewards:
    """Collects from events what answers were worth, by step, and how far trainer and engine were apart."""

    def __init__(self) -> None:
        self._sampled, self._held_out, self._mismatch = Series[float](_MOST), Series[float](_MOST), Series[float](_MOST)
        self.last: Rollout | None = None

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            found: Mapping[str, Any] = dict(event)
            if not isinstance(step := found.get("step"), int):
                continue
            metrics = found.get("metrics")
            if found.get("event") == "rollout" and isinstance(metrics, dict):
                for series, name in ((self._sampled, "reward_mean"), (self._mismatch, "mismatch_mean")):
                    if isinstance(value := metrics.get(name), int | float):
                        series.add(step, float(value))
                samples = [sample for sample in found.get("samples") or () if isinstance(sample, dict)]
                self.last = Rollout(step, int(found.get("version", 0)), str(found.get("digest", "")), samples)
            elif found.get("event") == "eval" and isinstance(value := found.get("reward"), int | float):
                self._held_out.add(step, float(value))

    @property
    def rewards(self) -> dict[str, Line]:
        lines: dict[str, Line] = {"sampled answers": self._sampled.values(), REWARDED: self._held_out.values()}
        return lines if any(lines.values()) else {}

    @property
    def mismatch(self) -> dict[str, Line]:
        return {"mismatch": line} if (line := self._mismatch.values()) else {}


class Seen(NamedTuple):
    """`lines`: its losses, by what they are of. `steps`: some, evenly spread, and the last one. `log`: its last lines.
    `problem`: why something is not there; may be empty. `trials`: of a sweep; None where the job is none. `stage`: what
    goes on beside the steps, None while they do. `samples`: as in their event. `rewards`, `mismatch`: of a run that
    learns from rewards, by step; `rollout`: its last step.
    """

    lines: Mapping[str, Line]
    steps: tuple[RunStep, ...]
    log: str
    problem: str
    trials: Trials | None = None
    stage: Stage | None = None
    samples: Sequence[Mapping[str, str]] = ()
    rewards: Mapping[str, Line] = MappingProxyType({})
    mismatch: Mapping[str, Line] = MappingProxyType({})
    rollout: Rollout | None = None

    @property
    def curve(self) -> Curve | None:
        """The curve of the losses; None without any."""
        return curve_of(self.lines)


class JobHistory:
    """Reads one job's events and log, each part once. Thread-safe.

    Losses and lines are those of the run's own events, which outlive Ray's cluster. Of a run that has none yet, and
    where its events are elsewhere, both are those of the end of Ray's log; of a job that failed or was stopped, the
    lines are. A sweep has the records of its trials instead of events.
    """

    def __init__(self, events: RunEvents, trials: SweepTrials) -> None:
        self._events, self._trials, self._lock = events, trials, Lock()
        self._losses, self._progress, self._stages = Losses(), RunProgress(), RunStages()
        self._rewards = Rewards()
        self._lines = deque[str](maxlen=LOG_LINES)
        self._has_events = False

    def look(self, job: Job, tail: Callable[[str, int], str]) -> Seen:
        """`tail`: the last lines of the log that Ray has of the job of this id."""
        with self._lock:
            problem, has_events = self._read_events(), self._has_events
            trials = None if has_events else self._read_trials()
        log: list[str] = []
        if not has_events or job.status in ("failed", "stopped"):
            try:  # Ray may be slow to answer: others look meanwhile
                log = tail(job.id, LOG_LINES if has_events else CURVE_LINES).splitlines()
            except (LogsGone, ClusterError) as e:
                problem = problem or str(e)
        with self._lock:
            lines = _described(log)[-LOG_LINES:] or list(self._lines)
            if not self._has_events:
                self._take(log if job.part_of else [line for line in log if not _is_of_part(line)])
            stages = self._stages
            stage = None if job.has_ended else stages.stage
            return Seen(
                self._losses.lines(),
                self._progress.steps(),
                "\n".join(lines),
                problem,
                trials,
                stage,
                stages.samples,
                self._rewards.rewards,
                self._rewards.mismatch,
                self._rewards.last,
            )

    def _take(self, lines: Sequence[str]) -> None:
        """Lines that are no events are passed over."""
        events = [event for line in lines if (event := decode(line)) is not None]
        self._losses.take(events)
        self._progress.take(events)
        self._stages.take(events)
        self._rewards.take(events)

    def _read_events(self) -> str:
        """Read what is new, and return why it cannot be read; empty where it can."""
        try:
            found = self._events.read()
        except StoreError as e:
            return str(e)
        if found.is_anew:
            self._losses, self._progress, self._stages = Losses(), RunProgress(), RunStages()
            self._rewards = Rewards()
            self._lines.clear()
        self._has_events |= bool(found.lines)
        self._take(found.lines)
        self._lines.extend(_described(found.lines))
        return ""

    def _read_trials(self) -> Trials | None:
        try:
            return self._trials.read()
        except StoreError as e:
            _log.warning("%s", e)
            return None


class Histories:
    """Keeps the histories of the jobs that were looked at last. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._by_job: OrderedDict[str, JobHistory] = OrderedDict()

    def of(self, job: Job, settings: Settings) -> JobHistory:
        with self._lock:
            found = self._by_job.pop(job.id, None)
            if found is None:
                name = qualified_name(job.tenant, split_qualified(job.name).name)
                whose = (settings, name, job.id, job.created_at)
                found = JobHistory(RunEvents(*whose), SweepTrials(*whose))
                if len(self._by_job) >= MOST_JOBS:
                    self._by_job.popitem(last=False)
            self._by_job[job.id] = found
            return found


def _is_of_part(line: str) -> bool:
    event = decode(line)
    return event is not None and adapter_of(event) is not None


def _described(lines: Iterable[str]) -> list[str]:
    """Describe the events of lines; a line without one, and an event of another version, stay as they are. Of how far a
    stage is, the page tells the last alone.
    """
    found = []
    for line in lines:
        event = decode(line)
        if event is None:
            found.append(line)
        elif event.get("event") != "progress":
            found.append(in_words(event))
    return found


class RunRow(NamedTuple):
    """A job among others. `step`: its last one; None before the first. `held_out`: the lowest loss of its adapter."""

    job: Job
    step: RunStep | None
    training: float | None
    held_out: float | None


class Difference(NamedTuple):
    """A field of the recipe, and what each job has there; empty where it has none."""

    path: str
    values: tuple[str, ...]


class Comparison(NamedTuple):
    rows: tuple[RunRow, ...]
    training: Curve | None
    held_out: Curve | None
    differences: tuple[Difference, ...]


class Ranked(NamedTuple):
    """A sweep's trials by their held-out loss: (trial, its values, its loss), the best first, and the first as a curve.
    `best`: the number of the one that is, or would be, published; None while records are still to be read.
    `num_trials`: of all.
    """

    rows: tuple[tuple[TrialRecord, str, float | None], ...]
    curve: Curve | None
    best: int | None
    num_trials: int


def rank(trials: Trials) -> Ranked:
    order = ranked(trials.records, keep_best=trials.keep_best)
    chosen = best(trials.records, keep_best=trials.keep_best) if trials.is_whole else None
    lines = {f"{record.trial}: {label(record.values)}": dict(record.losses) for record in order[:_DRAWN_TRIALS]}
    rows = ((r, label(r.values), r.loss(keep_best=trials.keep_best)) for r in order[:_SHOWN_TRIALS])
    return Ranked(tuple(rows), curve_of(lines), None if chosen is None else chosen.trial, len(order))


def compare(seen: Mapping[str, tuple[Job, Seen]]) -> Comparison:
    """Put jobs beside each other, by their ids and in their order."""
    training = {id: found.lines.get(TRAINING, {}) for id, (_, found) in seen.items()}
    held_out = {id: found.lines.get(HELD_OUT, {}) for id, (_, found) in seen.items()}
    rows = (
        RunRow(
            job,
            found.steps[-1] if found.steps else None,
            _last(training[id]),
            min(held_out[id].values(), default=None),
        )
        for id, (job, found) in seen.items()
    )
    differences = differences_of([job.recipe for job, _ in seen.values()])
    return Comparison(tuple(rows), curve_of(training), curve_of(held_out), differences)


def differences_of(recipes: Sequence[TrainSpec]) -> tuple[Difference, ...]:
    """List the fields, by their paths, that not all of them have alike."""
    flat = [_flat(recipe.model_dump(mode="json")) for recipe in recipes]
    paths = dict.fromkeys(path for fields in flat for path in fields)
    found = (Difference(path, tuple(fields.get(path, "") for fields in flat)) for path in paths)
    return tuple(difference for difference in found if len(set(difference.values)) > 1)


def loss_rows(lines: Mapping[str, Line], most: int, held_out: str = HELD_OUT) -> list[tuple[int, list[float | None]]]:
    """List steps with the value of each line there, the last one first: half of them with those held out, if any."""
    if not lines:
        return []
    every, measured = sorted(set().union(*lines.values())), sorted(lines[held_out])
    half = most // 2
    chosen = sorted({*spread(measured, half), *spread(every, most - half)}, reverse=True)
    return [(step, [line.get(step) for line in lines.values()]) for step in chosen]


def _last(line: Line) -> float | None:
    return line[max(line)] if line else None


def spread(values: Sequence[T], most: int) -> list[T]:
    """Choose at most so many, evenly spread; the last is among them."""
    stride = -(-len(values) // most) or 1
    return list(values[::-1][::stride][::-1])


def _flat(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        return {p: text for name, inner in value.items() for p, text in _flat(inner, f"{path}.{name}").items()}
    return {} if value is None else {path.removeprefix("."): str(value)}
