"""Processes under test: they are started, exchange lines of JSON, and are ended with all their children."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from benchmarks.serving.adapters import Library
from benchmarks.serving.cases import EngineOptions
from benchmarks.serving.figures.rows import EngineWork
from benchmarks.serving.replay import Record
from benchmarks.serving.systems.cpu import CpuSeconds, of_tree
from benchmarks.serving.workload import TimedRequest
from loray.bases.registry import BaseModel
from loray.spec import ServeSpec

_END_S = 20.0
_TAIL = 3000


class PassResult(NamedTuple):
    records: list[Record]
    work: EngineWork | None


class Session(Protocol):
    """A running system.

    pid         the root of its processes, if they have one
    start_s     seconds of its start
    idle_cores  what it uses of the processor when it has nothing to do; NaN if that was not measured
    cpu         seconds of the processor since its start, by what its processes do
    """

    pid: int | None
    start_s: float
    idle_cores: float
    cpu: CpuSeconds

    def run(self, requests: Sequence[TimedRequest], at_once: int | None) -> PassResult: ...


@dataclass(frozen=True, slots=True)
class Setting:
    """Values that all sessions of a run share. `pythons`: the interpreter of each peer."""

    base: BaseModel
    library: Library
    folder: Path
    device: str = "cpu"
    num_threads: int = 1
    pool_bytes: int | None = None
    pythons: Mapping[str, str] = field(default_factory=dict)


def serve_spec(setting: Setting, options: EngineOptions) -> ServeSpec:
    """The spec of loray's engine for these options."""
    return ServeSpec(
        base=setting.base.name,
        device=setting.device,
        pool_bytes=setting.pool_bytes or options.pool_bytes(setting.base.config),
        host_bytes=options.host_bytes,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        num_threads=setting.num_threads,
    )


class _Worker:
    """A process that answers each line of JSON with one line."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: Path) -> None:
        self._name, self._process, self._log = name, process, log
        self.pid: int | None = process.pid
        self.start_s, self.idle_cores = 0.0, float("nan")
        self.cpu = of_tree(name, process.pid)

    def exchange(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SystemExit(f"{self._name} failed:\n{tail(self._log)}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def run(self, requests: Sequence[TimedRequest], at_once: int | None) -> PassResult:
        answer = self.exchange(json.dumps({"requests": list(requests), "at_once": at_once}))
        work = answer["work"]
        return PassResult([Record(**r) for r in answer["records"]], None if work is None else EngineWork(**work))


@contextmanager
def run_worker(name: str, command: list[str], setup: str, setting: Setting) -> Iterator[_Worker]:
    with run_process(name, command, setting, pipes=True) as (process, log):
        began = time.perf_counter()
        worker = _Worker(name, process, log)
        worker.exchange(setup)
        worker.start_s = time.perf_counter() - began
        yield worker
        assert process.stdin is not None
        process.stdin.close()
        process.wait(_END_S)


@contextmanager
def run_process(
    name: str, command: list[str], setting: Setting, *, pipes: bool = False, env: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Start a process in a new session; end it and all its children after the block. The folder keeps its log."""
    logs = setting.folder / "logs"
    logs.mkdir(exist_ok=True)
    log = logs / f"{name}.log"
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else out,
            stderr=out,
            env=environment(setting, env or {}),
            text=True,
            start_new_session=True,
        )
    try:
        yield process, log
    finally:
        _end(process)


def environment(setting: Setting, more: Mapping[str, str]) -> dict[str, str]:
    """Without what importing loray has set, which a peer would not have."""
    inherited = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    return inherited | {"OMP_NUM_THREADS": str(setting.num_threads), "PYTHONWARNINGS": "ignore"} | dict(more)


def tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]


def _end(process: subprocess.Popen[str]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(_END_S)
        except ProcessLookupError:
            return  # all its children have ended too
        except subprocess.TimeoutExpired:
            continue
