"""A worker that trains many adapters of one cohort on its own base, as a task of Ray; or one of several that share the
adapters' rows (`parallel.sequence`).

What happens goes to the events' sink in one call a round, whose answer says which adapters are to end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, Protocol

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle

from jobs.events import Event, encode
from jobs.runs.folders import RunFolder, name_of, open_runs
from jobs.workers.worker import num_threads
from loray.bases.registry import ensure_base
from loray.errors import IntegrityError, LorayError
from loray.priority import compute_in_background
from loray.settings import Settings
from loray.spec import EndStatus, Frozen, TrainSpec
from loray.telemetry import configure_logging, get_logger

log = get_logger(__name__)

SNAPSHOT = "round_"  # before the round, in the name of a snapshot's folder
ENDED = "ended.json"  # in the run of an adapter that has ended
_TOLD_S = 1.0  # between two calls of the sink while no round ends
_STEPS_PER_S = 50  # lines of steps that a job's own log has, of all adapters


class EndedRun(Frozen):
    """How the training of an adapter has ended, by this recipe. `checkpoint`: the folder in its run; None where it left
    none.
    """

    recipe: TrainSpec
    status: EndStatus
    message: str | None = None
    checkpoint: str | None = None


class Rendezvous(NamedTuple):
    """Where the ranks of a sequence group meet: the store of the driver, and what they call themselves in it."""

    host: str
    port: int
    prefix: str
    rank: int
    size: int


class Places(NamedTuple):
    """Folders by name, below those of a kind (`open_runs`)."""

    kind: Literal["runs", "sweeps", "many"]
    at: Mapping[str, str]


class Share(NamedTuple):
    """What one worker trains.

    runs       the run of each adapter
    snapshots  the one folder of the share's snapshots
    data       the Dataset of each in the object store; `initial` has the InitialFiles of those that go on from another
    per_node   workers that share a node
    sink       the actor of `EventSink`
    """

    specs: tuple[TrainSpec, ...]
    runs: Places
    snapshots: Places
    data: Mapping[str, ObjectRef]
    initial: Mapping[str, ObjectRef]
    base_fingerprint: str
    dtype_reason: str
    tokens_per_pass: int
    per_node: int
    settings: Settings
    sink: ActorHandle
    group: Rendezvous | None = None


class Judge(Protocol):
    """Says after each round which adapters are to end. It is a part of the sink, whose process it lives in."""

    def ended_by(self, events: Sequence[tuple[str, Event]]) -> Collection[str]: ...


class EventSink:
    """The actor that writes the events of a job of several adapters: each into the run of its adapter, and all into the
    file `job`, with the adapter's name and of its steps few enough to be followed. It says which adapters are to end.
    """

    def __init__(self, job: str, files: Mapping[str, str], judge: Judge | None = None) -> None:
        self._job, self._files, self._judge = Path(job), {name: Path(path) for name, path in files.items()}, judge
        self._ending: set[str] = set()
        self._ended: set[str] = set()
        self._told_at: dict[str, float] = {}
        self._step_s = max(1.0, len(files) / _STEPS_PER_S)

    def take(self, lines: Sequence[tuple[str | None, str]]) -> frozenset[str]:
        """Writes events, as JSON, of these adapters; None: of all of them."""
        by_file: dict[Path, list[str]] = {}
        events: list[tuple[str, Event]] = []
        for name, line in lines:
            event = json.loads(line)
            if name is not None:
                by_file.setdefault(self._files[name], []).append(line)
                events.append((name, event))
                self._ended |= {name} if event["event"] == "end" else set()
                line = json.dumps(event | {"adapter": name})
            if name is None or self._is_told(name, event):
                by_file.setdefault(self._job, []).append(line)
        for path, written in by_file.items():
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in written))
        if self._judge is not None:
            self._ending |= set(self._judge.ended_by(events))
        return frozenset(self._ending)

    def ended(self) -> frozenset[str]:
        """Returns the adapters whose training has ended."""
        return frozenset(self._ended)

    def end(self, names: Collection[str]) -> None:
        """Has these adapters end after the round."""
        self._ending |= set(names)

    def _is_told(self, name: str, event: Mapping[str, Any]) -> bool:
        if event["event"] != "step" or event["step"] == event["num_steps"]:
            return True
        now = time.monotonic()
        is_due = now - self._told_at.get(name, 0.0) >= self._step_s
        if is_due:
            self._told_at[name] = now
        return is_due


class _Outbox:
    """Collects events, and sends them to the sink, of the first rank alone."""

    def __init__(self, sink: ActorHandle, *, is_first: bool) -> None:
        self._sink, self.is_first = sink, is_first
        self._lines: list[tuple[str | None, str]] = []
        self._sent_at = time.monotonic()

    def add(self, name: str | None, event: Mapping[str, Any]) -> None:
        self._lines.append((name, encode(event, time.time())))  # type: ignore[arg-type]
        if time.monotonic() - self._sent_at > _TOLD_S:
            self.flush()

    def flush(self) -> frozenset[str]:
        """Waits until all is written. Returns the adapters that are to end."""
        lines, self._lines, self._sent_at = self._lines, [], time.monotonic()
        if not self.is_first:
            return frozenset()
        ending: frozenset[str] = ray.get(self._sink.take.remote(lines))
        return ending


@dataclass
class _Run:
    """Reports what happens to one adapter. Its checkpoint goes into its run."""

    spec: TrainSpec
    folder: RunFolder
    outbox: _Outbox
    kept: str | None = field(default=None)

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if metrics["event"] == "checkpoint":
            self.kept = name_of(metrics["step"])
            metrics |= {"path": f"{self.folder}/{self.kept}"}
        if checkpoint is not None and self.kept is not None:
            self.folder.keep(checkpoint, self.kept)
        if metrics["event"] == "end" and self.outbox.is_first:
            how = {"status": metrics["status"], "message": metrics["message"], "checkpoint": self.kept}
            ended = EndedRun(recipe=self.spec, **how)
            self.folder.write_model(ENDED, ended)
        self.outbox.add(self.spec.name, metrics)


@dataclass
class _Cohort:
    """Reports what happens to all. A snapshot replaces the one before in the job's folder."""

    folder: RunFolder
    outbox: _Outbox

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if checkpoint is not None:
            before = self.folder.folders(SNAPSHOT)
            made = f"{SNAPSHOT}{metrics['step']:08}"
            self.folder.keep(checkpoint, made)
            for old in before:
                if old != made:
                    self.folder.remove_folder(old)
        if metrics["event"] != "checkpoint":
            self.outbox.add(None, metrics)


def train_share(share: Share) -> None:
    """Trains the adapters of a share, from its last snapshot if there is one. How each has ended is in its run, and
    told as an event. Raises what concerns all of them.
    """
    from loray.methods.attach import InitialAdapter  # these import PEFT and models
    from loray.train.many.loop import train_many

    settings, group = share.settings, share.group
    configure_logging(settings.log_level)
    use_gpu = share.specs[0].use_gpu is True
    if not use_gpu:
        compute_in_background()
    torch.set_num_threads(num_threads(share.per_node))
    device = torch.device("cuda" if use_gpu else "cpu")
    outbox = _Outbox(share.sink, is_first=group is None or group.rank == 0)
    outbox.add(None, {"event": "progress", "stage": "loading the base", "done": 0, "total": None})
    outbox.flush()
    runs, (snapshots,) = open_runs(settings, share.runs.kind), share.snapshots.at.values()
    folder = open_runs(settings, share.snapshots.kind).make(snapshots)
    reporters = {spec.name: _Run(spec, runs.make(share.runs.at[spec.name]), outbox) for spec in share.specs}
    base = ensure_base(settings.home, share.specs[0].base, fingerprint=share.base_fingerprint)
    with ExitStack() as stack:
        workdir = settings.home / "checkpoints"
        workdir.mkdir(parents=True, exist_ok=True)
        workdir = Path(stack.enter_context(TemporaryDirectory(prefix="many-", dir=workdir)))
        initials = {}
        for name, ref in share.initial.items():
            files = ray.get(ref)
            initials[name] = InitialAdapter(files.digest, stack.enter_context(files.as_folder()))
        options: dict[str, Any] = {}
        if group is not None:
            options["group"] = _joined(group, device)
            stack.callback(torch.distributed.destroy_process_group)
        if (snapshot := _last_snapshot(folder)) is not None:
            options["resume_from"] = stack.enter_context(folder.fetched(snapshot))
        stack.callback(outbox.flush)
        train_many(
            share.specs,
            base,
            {name: ray.get(ref) for name, ref in share.data.items()},
            reporters=reporters,
            reporter=_Cohort(folder, outbox),
            workdir=workdir,
            tokens_per_pass=share.tokens_per_pass,
            checkpoints=_own_checkpoints(reporters, stack),
            initials=initials,
            device=device,
            dtype_reason=share.dtype_reason,
            stopped=outbox.flush,
            **options,
        )


def _joined(group: Rendezvous, device: torch.device) -> Any:
    """Joins the other ranks, and returns their sequence group. A collective call."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    from loray.train.mesh import Mesh

    store = TCPStore(group.host, group.port, is_master=False)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(group.prefix, store),
        rank=group.rank,
        world_size=group.size,
    )
    return Mesh.build(group.size, device).sequence


def _last_snapshot(folder: RunFolder) -> str | None:
    """Finds the last one that is whole: one that was being written when its worker died is not."""
    from loray.train.many.state import read_cohort

    for name in reversed(folder.folders(SNAPSHOT)):
        with suppress(IntegrityError), folder.fetched(name) as path:
            read_cohort(path)
            return name
    return None


def _own_checkpoints(runs: Mapping[str, _Run], stack: ExitStack) -> dict[str, Path]:
    """Returns the checkpoints of adapters that had ended and are tried again, where they have an optimizer's state."""
    from loray.train.checkpoint import read_optimizer

    found = {}
    for name, run in runs.items():
        ended = run.folder.read_model(EndedRun, ENDED)
        if ended is None or ended.checkpoint is None:
            continue
        path = stack.enter_context(run.folder.fetched(ended.checkpoint))
        with suppress(LorayError):
            read_optimizer(path)
            found[name] = path
    return found
