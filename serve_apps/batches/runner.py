"""The runner of batches, in a control process. Of all that share a catalog, the one that holds the lease works.

A batch passes through phases, each a task: its input is checked; its lines are answered, a part at a time, those of
one base and adapter behind each other; its files are written. A phase that a lost lease or an error ends is begun again
from what store and catalog have. `BaseLines` divides a base's lines at once among tenants, in turn.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import TypeVar

from loray.catalog import Catalog
from loray.catalog.batches import Batch, BatchError
from loray.catalog.leases import HOLD_S, RENEW_S, Lease
from loray.errors import ConflictError, IntegrityError, LorayError, RequestError
from loray.policy.batch_rate import BatchRate
from loray.publishing.user_files import remove_unneeded
from loray.store.objects import ObjectStore
from loray.telemetry import get_logger
from serve_apps.batches import results
from serve_apps.batches.lines import BaseLoad, GatewayLines, LineAnswer
from serve_apps.batches.results import Result
from serve_apps.batches.validation import Line, check_input, lines_of

_log = get_logger(__name__)

T = TypeVar("T")

LEASE = "batches"
TICK_S = 1.0  # between two looks at batches and bases
PART_LINES, PART_BYTES = 1000, 16 << 20  # read at once
CHUNK_LINES, CHUNK_S = 50, 30.0  # answers that may be lost with this process, and their age
_MAX_WORKING, _MAX_CHECKED = 16, 4  # batches whose lines are answered, and whose inputs are checked, at once
_CLEAN_S = 30.0
_RETRY_S = 5.0
_LONGEST_RETRY_S = 60.0


class BatchRunner:
    """Works on the batches of all tenants through one gateway. Used from one event loop.

    `catalog` and `store` are asked in threads at each use, and may raise.
    """

    def __init__(self, catalog: Callable[[], Catalog], store: Callable[[], ObjectStore], gateway: GatewayLines) -> None:
        self.gateway = gateway
        self._catalog, self._store = catalog, store
        self.lease = Lease(LEASE, f"{socket.gethostname()}-{secrets.token_hex(8)}"[:128])
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="batches")
        self._phases: dict[str, _Phase] = {}  # by batch
        self.bases: dict[str | None, BaseLines] = {}
        self._ended = asyncio.Event()  # a phase, so that the next one begins at once
        self._cleaned_at = float("-inf")

    async def run(self) -> None:
        """Work until cancelled, whenever this process holds the lease."""
        try:
            while True:
                try:
                    if await self.ask(lambda catalog: catalog.leases.hold(self.lease)):
                        await self._lead()
                except LorayError as e:
                    _log.warning("batches wait: %s", e)
                except Exception:  # noqa: BLE001 - the next attempt may succeed
                    _log.exception("batches wait")
                await asyncio.sleep(RENEW_S)
        finally:
            try:
                await self.ask(lambda catalog: catalog.leases.leave(self.lease))
            except LorayError as e:
                _log.debug("the lease of batches ends by itself: %s", e)
            self._threads.shutdown(wait=False)

    async def ask(self, question: Callable[[Catalog], T]) -> T:
        """Ask the catalog in a thread."""
        return await self.in_thread(lambda: question(self._catalog()))

    async def in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    @property
    def store(self) -> ObjectStore:
        return self._store()

    @property
    def opened(self) -> Catalog:
        return self._catalog()

    async def _lead(self) -> None:
        """Work until another may hold the lease."""
        held_at = time.monotonic()
        await self.in_thread(self._forget_chunks)
        try:
            while time.monotonic() < held_at + HOLD_S - RENEW_S:
                now = time.monotonic()
                try:
                    if now >= held_at + RENEW_S:
                        if not await self.ask(lambda catalog: catalog.leases.hold(self.lease)):
                            return
                        held_at = now
                    await self._tick(now)
                except LorayError as e:
                    _log.warning("batches cannot be looked at: %s", e)
                self._ended.clear()
                try:
                    async with asyncio.timeout(TICK_S):
                        await self._ended.wait()
                except TimeoutError:
                    pass
        finally:
            phases = [phase.task for phase in self._phases.values()]
            for task in phases:
                task.cancel()
            await asyncio.gather(*phases, return_exceptions=True)
            self._phases.clear()

    def _forget_chunks(self) -> None:
        """Remove what a runner has left that was killed at the end of a batch."""
        for batch in self.opened.batches.ended_lately():
            results.remove_chunks(self.store, batch)

    async def _tick(self, now: float) -> None:
        unfinished = await self.ask(lambda catalog: catalog.batches.unfinished())
        for batch in unfinished:
            known = self._phases.get(batch.id)
            if known is None:
                self._begin_phase(batch)
            elif known.is_to_end(batch):
                known.is_ending = True
                known.task.cancel()
        for lines in self.bases.values():
            lines.begin()
        if any(lines.is_busy for lines in self.bases.values()):
            for name, load in (await self.gateway.loads()).items():
                if name in self.bases:
                    self.bases[name].observe(load)
        if now >= self._cleaned_at + _CLEAN_S:
            self._cleaned_at = now
            await self.in_thread(lambda: remove_unneeded(self.opened, self.store))

    def _begin_phase(self, batch: Batch) -> None:
        names = [phase.name for phase in self._phases.values()]
        if batch.state == "validating":
            work, name = self._check, "check"
            if names.count(name) >= _MAX_CHECKED:
                return
        elif batch.state == "in_progress" and not _is_over(batch):
            work, name = self._answer, "answer"
            answering = [phase.batch.tenant for phase in self._phases.values() if phase.name == name]
            if len(answering) >= _MAX_WORKING or batch.tenant in answering:
                return
        else:
            work, name = self._close, "close"
        self._phases[batch.id] = _Phase(batch, name, asyncio.create_task(self._run_phase(batch, name, work)))

    async def _run_phase(self, batch: Batch, name: str, work: Callable[[Batch], Awaitable[None]]) -> None:
        try:
            await work(batch)
        except ConflictError as e:  # the lease has ended, or somebody cancels the batch at this moment
            _log.info("batch %s: %s", batch.id, e)
        except LorayError as e:
            _log.warning("batch %s waits (%s): %s", batch.id, name, e)
            await asyncio.sleep(_RETRY_S)
        except Exception:  # noqa: BLE001 - of this batch alone
            _log.exception("batch %s waits (%s)", batch.id, name)
            await asyncio.sleep(_RETRY_S)
        finally:
            del self._phases[batch.id]
            self._ended.set()

    # -- the phases ---------------------------------------------------------------------------------------------------

    async def _check(self, batch: Batch) -> None:
        file = await self.ask(lambda catalog: catalog.files.stored(batch.input_file_id))
        try:
            total, errors = await self.in_thread(lambda: check_input(self.store, file, batch.endpoint))
        except IntegrityError as e:
            total, errors = 0, [BatchError("file_damaged", str(e))]
        if not errors:
            try:
                await self.ask(lambda catalog: catalog.batches.begin(self.lease, batch.id, total))
                return
            except RequestError as e:
                errors = [BatchError("too_many_requests", str(e))]
        await self.ask(lambda catalog: catalog.batches.fail(self.lease, batch.id, errors))

    async def _answer(self, batch: Batch) -> None:
        file = await self.ask(lambda catalog: catalog.files.stored(batch.input_file_id))
        answered = await self.in_thread(lambda: results.read_answered(self.store, batch))
        lines = await self.in_thread(lambda: lines_of(self.store, file))
        left = (line for line in lines if line.number not in answered.numbers)
        async with _Answering(self, batch, answered) as answering:
            while part := await self.in_thread(lambda: _part(left)):
                await answering.add(part)
            await answering.end()
        await self.ask(lambda catalog: catalog.batches.finalize(self.lease, batch.id))

    async def _close(self, batch: Batch) -> None:
        """Write the files of a batch that is answered, over or cancelled."""
        if batch.state == "in_progress":
            await self.ask(lambda catalog: catalog.batches.finalize(self.lease, batch.id))
            return
        file = await self.ask(lambda catalog: catalog.files.stored(batch.input_file_id))
        await self.in_thread(lambda: results.write_files(self.opened, self.store, batch, file, self.lease))


@dataclass
class _Phase:
    """`is_ending`: it was cancelled, and keeps what it has."""

    batch: Batch
    name: str
    task: asyncio.Task[None]
    is_ending: bool = False

    def is_to_end(self, batch: Batch) -> bool:
        """The batch is being cancelled, or its time is over, while its lines are answered."""
        return self.name == "answer" and not self.is_ending and (batch.state != self.batch.state or _is_over(batch))


def _is_over(batch: Batch) -> bool:
    return datetime.now(UTC) >= batch.expires_at


def _part(left: Iterator[Line]) -> list[Line]:
    """Take the next lines, of so many bytes at most."""
    part: list[Line] = []
    num_bytes = 0
    for line in islice(left, PART_LINES):
        part.append(line)
        num_bytes += len(line.body)
        if num_bytes >= PART_BYTES:
            break
    return part


class BaseLines:
    """The lines of one base that wait and run."""

    def __init__(self) -> None:
        self.rate = BatchRate()
        self._waiting: dict[str, deque[tuple[_Answering, Line]]] = {}  # by tenant, in the order of their turns
        self._running: set[asyncio.Task[None]] = set()
        self._is_waking = False  # the base ran nowhere, and has not answered since

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._running)

    def push(self, answering: _Answering, lines: Sequence[Line], *, is_first: bool = False) -> None:
        waiting = self._waiting.setdefault(answering.batch.tenant, deque())
        pairs = [(answering, line) for line in lines]
        if is_first:
            waiting.extendleft(reversed(pairs))
        else:
            waiting.extend(pairs)
        self.begin()

    def withdraw(self, answering: _Answering) -> None:
        """Forget the lines of a batch that wait."""
        for tenant, waiting in list(self._waiting.items()):
            self._waiting[tenant] = deque(pair for pair in waiting if pair[0] is not answering)
            if not self._waiting[tenant]:
                del self._waiting[tenant]

    def begin(self) -> None:
        """Begin lines, of tenants in turn, as many as may run."""
        while len(self._running) < self.rate.limit:
            tenant = next((t for t, waiting in self._waiting.items() if waiting[0][0].may_begin), None)
            if tenant is None:
                return
            waiting = self._waiting.pop(tenant)
            answering, line = waiting.popleft()
            if waiting:
                self._waiting[tenant] = waiting  # behind the others
            answering.num_waiting -= 1
            answering.changed.set()
            task = asyncio.create_task(answering.run(self, line))
            self._running.add(task)
            answering.tasks.add(task)
            task.add_done_callback(partial(self._has_ended, answering))

    def _has_ended(self, answering: _Answering, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        answering.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            answering.failed(error)
        answering.changed.set()
        self.begin()

    def observe(self, load: BaseLoad) -> None:
        if load.is_cold:
            self._is_waking = True
        if not self._is_waking:
            self.rate.observe(time.monotonic(), load.wait_s)
            self.begin()

    def answered(self, answer: LineAnswer) -> None:
        """Take what an answer says of the base."""
        if answer.refusal is None and self._is_waking:
            self._is_waking = False
        elif answer.refusal == "overloaded" and not self._is_waking:
            self.rate.shrink(time.monotonic())


class _Answering:
    """The lines of one batch that are answered now. Its block ends when all are, and keeps what has come in any case.

    num_waiting  lines in the queues of bases
    tasks        the lines that run
    changed      is set whenever a line has ended, or waits no more
    """

    def __init__(self, runner: BatchRunner, batch: Batch, answered: results.Answered) -> None:
        self.batch = batch
        self.num_waiting = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.changed = asyncio.Event()
        self._runner = runner
        self._num_failed, self._num_completed = answered.num_failed, len(answered.numbers) - answered.num_failed
        self._kept: list[Result] = []  # not stored yet
        self._oldest_at = float("inf")  # of these
        self._num_delayed = 0  # lines that come into a queue again later
        self._paused_until = float("-inf")
        self._reason: BatchError | None = None  # why lines wait
        self._told: BatchError | None = None
        self._error: BaseException | None = None
        self._timers: set[asyncio.TimerHandle] = set()

    @property
    def may_begin(self) -> bool:
        return len(self._kept) < CHUNK_LINES and time.monotonic() >= self._paused_until

    async def __aenter__(self) -> _Answering:
        self._keeping = asyncio.create_task(self._keep())
        return self

    async def __aexit__(self, *_: object) -> None:
        for timer in self._timers:
            timer.cancel()
        for lines in self._runner.bases.values():
            lines.withdraw(self)
        running = [*self.tasks, self._keeping]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if self._kept:
            await self._store()

    async def add(self, part: list[Line]) -> None:
        """Queue lines, and return when all of them have begun."""
        batch, gateway = self.batch, self._runner.gateway
        models = {line.model for line in part}
        bases = await gateway.bases_of(batch.key_id, batch.tenant, models)
        part.sort(key=lambda line: (bases[line.model] or "", line.model))
        of_bases: dict[str | None, list[Line]] = {}
        for line in part:
            of_bases.setdefault(bases[line.model], []).append(line)
        for base, lines in of_bases.items():
            self.num_waiting += len(lines)
            self._runner.bases.setdefault(base, BaseLines()).push(self, lines)
        await self._until(lambda: not self.num_waiting)

    async def end(self) -> None:
        """Return when all lines have an answer that is stored."""
        await self._until(lambda: not (self.num_waiting or self.tasks or self._num_delayed))
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)
        if self._kept:  # stored in the block: whoever cancels this leaves it to the block's end
            await self._store()

    async def run(self, lines: BaseLines, line: Line) -> None:
        """Answer one line, or queue it again."""
        batch = self.batch
        try:
            answer = await self._runner.gateway.run_line(batch.key_id, batch.tenant, batch.endpoint, line.body)
        except LorayError as e:
            _log.info("batch %s: a line is sent again: %s", batch.id, e)
            answer = LineAnswer(503, "", refusal="away", retry_after_s=e.retry_after_s or _RETRY_S)
        lines.answered(answer)
        if answer.refusal is None:
            if self._reason is not None and self._reason.code != "key_revoked":
                self._reason = None
            result = Result.of(line, answer)
            self._oldest_at = min(self._oldest_at, time.monotonic())
            self._kept.append(result)
        elif answer.refusal == "revoked":
            self._reason = error = BatchError("key_revoked", "the API key of this batch was revoked, or has expired")
            await self._runner.ask(lambda catalog: catalog.batches.revoke(self._runner.lease, batch.id, error))
            self._pause(_LONGEST_RETRY_S)
        else:
            delay_s = min(answer.retry_after_s, _LONGEST_RETRY_S)
            if answer.refusal in ("budget", "blocked", "limit"):
                self._pause(delay_s)
            if answer.refusal in ("budget", "blocked"):
                code = "budget_used_up" if answer.refusal == "budget" else "key_blocked"
                self._reason = BatchError(code, f"the batch waits: {_message(answer)}")
            self._again(lines, line, delay_s)

    def failed(self, error: BaseException) -> None:
        """A line has ended with an error that is nobody's answer: the phase ends with it."""
        self._error = self._error or error

    def _pause(self, delay_s: float) -> None:
        self._paused_until = time.monotonic() + delay_s

    def _again(self, lines: BaseLines, line: Line, delay_s: float) -> None:
        self._num_delayed += 1

        def push() -> None:
            self._timers.discard(timer)
            self._num_delayed -= 1
            self.num_waiting += 1
            lines.push(self, [line], is_first=True)

        timer = asyncio.get_running_loop().call_later(delay_s, push)
        self._timers.add(timer)

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self.changed.clear()
            if self._error is not None:
                raise self._error
            await self.changed.wait()

    async def _keep(self) -> None:
        """Store what has come, again and again."""
        while True:
            is_due = len(self._kept) >= CHUNK_LINES or time.monotonic() >= self._oldest_at + CHUNK_S
            if is_due or self._reason != self._told:
                try:
                    await self._store()
                except ConflictError as e:
                    self.failed(e)
                    self.changed.set()
                    return
                except LorayError as e:
                    _log.warning("batch %s: answers cannot be kept yet: %s", self.batch.id, e)
                    await asyncio.sleep(_RETRY_S)
                    continue
                for lines in self._runner.bases.values():
                    lines.begin()
            try:
                async with asyncio.timeout(TICK_S):
                    await self._has_come()
            except TimeoutError:
                pass

    async def _has_come(self) -> None:
        while len(self._kept) < CHUNK_LINES:
            await self.changed.wait()
            self.changed.clear()

    async def _store(self) -> None:
        kept, reason, runner = list(self._kept), self._reason, self._runner
        if kept:
            await runner.in_thread(lambda: results.put_chunk(runner.store, self.batch, kept))
            del self._kept[: len(kept)]
            self._oldest_at = time.monotonic() if self._kept else float("inf")
            self._num_failed += sum(result.has_failed for result in kept)
            self._num_completed += sum(not result.has_failed for result in kept)
        counts, errors = (self._num_completed, self._num_failed), [] if reason is None else [reason]
        await runner.ask(lambda catalog: catalog.batches.progress(runner.lease, self.batch.id, *counts, errors))
        self._told = reason


def _message(answer: LineAnswer) -> str:
    found = json.loads(answer.body).get("error", {}).get("message", "")
    return str(found)
