"""A model of a trainer outside of its bank: its queue of operations and their results, its journal and its snapshot.

Its folder `trainers/BASE/MODEL` holds

    model.json     ModelRecord, which is written when the model is created
    journal        operations that were accepted, by their numbers (`loray.train.journal`)
    state.json     the last snapshot, without which the model has its first weights: the number of the next operation,
                   counters, and the name of the file of weights
    weights-N.pt   masters, moments, and gradients that no step has used, after the operations before N
    result-N       of operations before the snapshot's next one, which nobody had fetched by then
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from jobs.runs.folders import RunFolder
from jobs.runs.journals import open_journal
from loray import errors
from loray.errors import ConflictError, IntegrityError, LorayError, NotFoundError, Overloaded
from loray.spec import AdapterRef, AdapterSpec, Frozen
from loray.spec.datums import LossOutput, Op, op_from_bytes, op_to_bytes, output_from_bytes, output_to_bytes
from loray.train.optimizer import OptimizerState

Published = tuple[AdapterRef, str]
Result = LossOutput | Mapping[str, Any] | Published | LorayError

KEEP_RESULTS_S = 3600.0  # those that nobody has fetched
_KEEP_FETCHED_S = 60.0  # an answer may be lost on its way, and asked for again
_MAX_WAITING = 256 << 20  # bytes of operations that wait
_MAX_KNOWN = 4096  # operations that were done, of which it is known whether another one has their number

_STATE = "state.json"


class ModelRecord(Frozen):
    """Describes a model from its beginning on. `initial`: a digest, or a folder of a saved state."""

    FILE: ClassVar[str] = "model.json"

    model: str
    adapter: AdapterSpec
    seed: int
    initial: str | None
    created_at: datetime


class _State(Frozen):
    """A snapshot. `known`: SHA-256 of the last operations, by number; `results`: of each its number, and the time at
    which it came, in seconds since 1970.
    """

    next_seq: int
    num_steps: int
    num_tokens: int
    loss: float | None
    weights: str
    known: dict[int, str]
    results: tuple[tuple[int, float], ...]


class Snapshot(NamedTuple):
    """A snapshot that is written, but for weights."""

    state: _State
    results: Mapping[int, Result]


class _Written(NamedTuple):
    """An operation in the journal: its digest, its bytes, and those of its entry."""

    sha256: str
    num_op_bytes: int
    num_journal_bytes: int


@dataclass
class _Kept:
    """A result, the time of the day at which it came, and until when it is kept once it was fetched."""

    value: Result
    at: float
    fetched_until: float | None = None


@dataclass(eq=False)
class TrainedModel:
    """Owns a model's queue and results, and its folder. Used from the actor's event loop, but for `write`, `read` and
    `_write_down`.

    next_seq   number of the operation that is done next
    resident   it has a slot of the bank
    is_dirty   operations were done since the last snapshot
    used_at    of `time.monotonic`
    """

    record: ModelRecord
    folder: RunFolder
    next_seq: int = 1
    num_steps: int = 0
    num_tokens: int = 0
    loss: float | None = None
    resident: bool = False
    is_dirty: bool = False
    used_at: float = field(default_factory=time.monotonic)
    _weights: str | None = None
    _waiting: dict[int, tuple[Op, int]] = field(default_factory=dict)
    _known: dict[int, str] = field(default_factory=dict)
    _results: dict[int, _Kept] = field(default_factory=dict)
    _asking: dict[int, list[asyncio.Future[None]]] = field(default_factory=dict)
    _num_waiting_bytes: int = 0

    def __post_init__(self) -> None:
        self.journal = open_journal(self.folder)
        self._writing = asyncio.Lock()  # of the journal

    @property
    def name(self) -> str:
        return self.record.model

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_weights(self) -> bool:
        """Return whether there is a snapshot; without one the model has its first weights."""
        return self._weights is not None

    # -- the queue ----------------------------------------------------------------------------------------------------

    async def accept(self, seq: int, op: Op) -> int:
        """Write an operation down and queue it; returns the bytes that the journal has grown by, 0 where it was
        accepted before.

        Raises ConflictError where another operation has the number, and Overloaded where too much waits.
        """
        async with self._writing:
            written = await asyncio.to_thread(self._write_down, seq, op)
            if written is None:
                return 0
            self._known[seq] = written.sha256
            self._queue(seq, op, written.num_op_bytes)
        self.used_at = time.monotonic()
        return written.num_journal_bytes

    def _write_down(self, seq: int, op: Op) -> _Written | None:
        """Append an operation to the journal; None where it was accepted before. Raises as `accept`."""
        data = op_to_bytes(op)
        sha256 = hashlib.sha256(data).hexdigest()
        known = self._known.get(seq)
        if known is not None and known != sha256:
            raise ConflictError(f"operation {seq} of {self.name} was another one; number operations one by one")
        if known is not None or seq < self.next_seq:
            return None
        if seq != self.next_seq and self._num_waiting_bytes + len(data) > _MAX_WAITING:
            raise Overloaded(f"{self._num_waiting_bytes:,} bytes of operations of {self.name} wait; send them later")
        return _Written(sha256, len(data), self.journal.append(0, seq, data))

    def _queue(self, seq: int, op: Op, nbytes: int) -> None:
        self._waiting[seq] = (op, nbytes)
        self._num_waiting_bytes += nbytes

    def head(self, offset: int = 0) -> Op | None:
        """Find the operation that is done next, or the one so many after it; None where it has not come yet."""
        found = self._waiting.get(self.next_seq + offset)
        return None if found is None else found[0]

    def done(self, result: Result) -> None:
        """Take the result of the next operation, which has its number whether it has failed or not."""
        _, nbytes = self._waiting.pop(self.next_seq)
        self._num_waiting_bytes -= nbytes
        self._results[self.next_seq] = _Kept(result, time.time())
        self._known.pop(self.next_seq - _MAX_KNOWN, None)
        for asking in self._asking.pop(self.next_seq, ()):
            if not asking.done():
                asking.set_result(None)
        self.next_seq += 1
        self.is_dirty, self.used_at = True, time.monotonic()

    async def result(self, seq: int, timeout_s: float) -> LossOutput | Mapping[str, Any] | Published | None:
        """Wait for a result; None where it does not come in time. Raises what the operation has failed with, and
        NotFoundError where the result is not kept any more.
        """
        if seq not in self._results and seq >= self.next_seq:
            asking = asyncio.get_running_loop().create_future()
            self._asking.setdefault(seq, []).append(asking)
            try:
                await asyncio.wait_for(asking, timeout_s)
            except TimeoutError:
                self._asking[seq].remove(asking)
                return None
        kept = self._results.get(seq)
        if kept is None:
            raise NotFoundError(f"the result of operation {seq} of {self.name} is not kept any more")
        kept.fetched_until = kept.fetched_until or time.monotonic() + _KEEP_FETCHED_S
        if isinstance(kept.value, LorayError):
            raise kept.value
        return kept.value

    def forget_results(self) -> None:
        """Drop results that were fetched a while ago, and those that nobody has fetched for an hour."""
        now, today = time.monotonic(), time.time()
        for seq, kept in list(self._results.items()):
            if today - kept.at > KEEP_RESULTS_S or (kept.fetched_until is not None and now > kept.fetched_until):
                del self._results[seq]

    # -- the folder ---------------------------------------------------------------------------------------------------

    def begin_snapshot(self) -> Snapshot:
        """Say what a snapshot has beside weights. Until `write` ends no operation is done."""
        unread = {seq: kept for seq, kept in self._results.items() if kept.fetched_until is None}
        state = _State(
            next_seq=self.next_seq,
            num_steps=self.num_steps,
            num_tokens=self.num_tokens,
            loss=self.loss,
            weights=f"weights-{self.next_seq}.pt",
            known={seq: sha256 for seq, sha256 in self._known.items() if seq < self.next_seq},
            results=tuple((seq, kept.at) for seq, kept in unread.items()),
        )
        return Snapshot(state, {seq: kept.value for seq, kept in unread.items()})

    def write(self, snapshot: Snapshot, state: OptimizerState, gradients: Mapping[str, Tensor]) -> None:
        """Write a snapshot: files of their own first, then what names them. May run in any thread."""
        content = io.BytesIO()
        torch.save({"state": state._asdict(), "gradients": dict(gradients)}, content)
        self.folder.write(snapshot.state.weights, content.getvalue())
        there, needed = set(self.folder.names()), {snapshot.state.weights}
        for seq, value in snapshot.results.items():
            needed.add(name := f"result-{seq}")
            if name not in there:
                self.folder.write(name, _result_to_bytes(value))
        self.folder.write_model(_STATE, snapshot.state)
        self._weights, self.is_dirty = snapshot.state.weights, False
        for name in there - needed:
            if name.startswith(("weights-", "result-")):
                self.folder.remove(name)

    async def cut(self) -> None:
        """Remove what the snapshot contains from the journal."""
        done = self.next_seq
        async with self._writing:
            await asyncio.to_thread(self.journal.cut, lambda entry: entry.number < done)

    def read(self) -> int:
        """Go on where another process has ended: from its last snapshot, with the operations that came after it, whose
        bytes are returned. Raises IntegrityError where they cannot be read.
        """
        found = self.folder.read(_STATE)
        if found is not None:
            state = _State.parse(json.loads(found), source=f"{_STATE} of {self.folder}")
            self.next_seq, self.num_steps, self.num_tokens = state.next_seq, state.num_steps, state.num_tokens
            self.loss, self._weights, self._known = state.loss, state.weights, dict(state.known)
            for seq, at in state.results:
                data = self.folder.read(f"result-{seq}")
                if data is not None:
                    self._results[seq] = _Kept(_result_from_bytes(data), at)
        for entry in self.journal.recover():
            if entry.number >= self.next_seq:
                self._known[entry.number] = hashlib.sha256(entry.payload).hexdigest()
                self._queue(entry.number, op_from_bytes(entry.payload), len(entry.payload))
        return self._num_waiting_bytes

    def weights(self) -> tuple[OptimizerState, dict[str, Tensor]]:
        """Read the snapshot's weights and gradients. Raises IntegrityError."""
        data = None if self._weights is None else self.folder.read(self._weights)
        if data is None:
            raise IntegrityError(f"{self.folder} has no {self._weights}: the model cannot go on")
        read = torch.load(io.BytesIO(data), weights_only=True)
        return OptimizerState(**read["state"]), read["gradients"]


def _result_to_bytes(result: Result) -> bytes:
    if isinstance(result, LossOutput):
        return b"L" + output_to_bytes(result)
    if isinstance(result, LorayError):
        return b"E" + json.dumps([type(result).__name__, str(result)]).encode()
    if isinstance(result, tuple):
        return b"P" + json.dumps([asdict(result[0]), result[1]]).encode()
    return b"M" + json.dumps(dict(result)).encode()


def _result_from_bytes(data: bytes) -> Result:
    kind, content = data[:1], data[1:]
    if kind == b"L":
        return output_from_bytes(content)
    read = json.loads(content)
    if kind == b"E":
        error: LorayError = getattr(errors, read[0])(read[1])
        return error
    if kind == b"P":
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in read[0].items()}
        return AdapterRef(**fields), read[1]
    metrics: Mapping[str, Any] = read
    return metrics
