"""Publication in bulk: a few threads describe and store adapters as they end, and many are registered at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

from jobs.driver.publication import driver_of, record_published, staged, to_publish
from jobs.events import PublishedEvent, first_line
from jobs.runs.folders import RunFolder
from jobs.workers.many import ENDED, EndedRun
from loray.bases.registry import BaseModel
from loray.catalog import AdapterVersion, Catalog, Registration
from loray.errors import GateRefused, LorayError, TrainingError
from loray.publishing import Destination, store
from loray.recipes.load import Recipe
from loray.settings import Settings
from loray.store import AdapterStore, open_store
from loray.telemetry import get_logger
from loray.train.checkpoint import check_publishable, read_state

log = get_logger(__name__)

_NUM_THREADS = 4  # they wait for the store
_AT_ONCE = 100  # in one transaction, in which other writers of the catalog wait


class Ready(NamedTuple):
    """An adapter whose training has ended, and whose run has its checkpoint."""

    name: str
    run: RunFolder
    recipe: Recipe


class _Stored(NamedTuple):
    ready: Ready
    step: int
    asked: Registration


Outcome = PublishedEvent | LorayError


class Publisher:
    """Publishes adapters on one base. `add` and `register` are called by one thread, `done` by that of `register`, with
    what became of each. A refusal concerns one adapter.
    """

    def __init__(
        self,
        settings: Settings,
        tenant: str,
        base: BaseModel,
        form: BaseModel,
        done: Callable[[Ready, Outcome], None],
    ) -> None:
        """`form`: what the adapters were trained on, the base or its quantised form."""
        self._base, self._form, self._done = base, form, done
        self._catalog = Catalog.of(settings).view(driver_of(tenant))
        self._store = AdapterStore(open_store(settings.store))
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="publish")
        self._stored = SimpleQueue[_Stored | tuple[Ready, LorayError]]()
        self._storing: list[Future[None]] = []

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, ready: Ready) -> None:
        self._storing.append(self._pool.submit(self._put, ready))

    def finish(self) -> None:
        """Waits until all are stored, and registers them."""
        wait(self._storing)
        while self.register():
            pass

    def register(self) -> int:
        """Registers what is stored by now, in one transaction, and returns how many adapters were dealt with."""
        self._storing = [each for each in self._storing if not each.done()]
        found: list[_Stored] = []
        failed: list[tuple[Ready, LorayError]] = []
        while len(found) < _AT_ONCE:
            try:
                item = self._stored.get_nowait()
            except Empty:
                break
            (found if isinstance(item, _Stored) else failed).append(item)  # type: ignore[arg-type]
        outcomes = self._registered(found) if found else {}
        for stored in found:
            version, refusal = outcomes[stored.ready.name]
            if isinstance(version, LorayError):
                failed.append((stored.ready, version))
                continue
            aliases = () if refusal else stored.asked.aliases
            try:
                told = record_published(version, stored.ready.run, stored.ready.recipe, stored.step, aliases, refusal)
            except LorayError as e:
                failed.append((stored.ready, e))
            else:
                self._done(stored.ready, told)
        for ready, error in failed:
            self._done(ready, error)
        return len(found) + len(failed)

    def _registered(self, found: Sequence[_Stored]) -> Mapping[str, tuple[AdapterVersion | LorayError, str | None]]:
        """Registers with the aliases, and without them what the gate refuses: it can be measured later, and promoted.
        Returns by name the version, or why there is none, and the gate's refusal.
        """
        try:
            first = self._catalog.adapters.register_many([stored.asked for stored in found])
            refused = [i for i, version in enumerate(first) if isinstance(version, GateRefused)]
            plain = [found[i].asked._replace(aliases=(), no_gate=None) for i in refused]
            again = dict(zip(refused, self._catalog.adapters.register_many(plain), strict=True)) if plain else {}
        except LorayError as e:  # the catalog cannot be reached
            return {stored.ready.name: (e, None) for stored in found}
        return {
            stored.ready.name: (again[i], str(first[i])) if i in again else (first[i], None)
            for i, stored in enumerate(found)
        }

    def _put(self, ready: Ready) -> None:
        try:
            self._stored.put(self._described(ready))
        except LorayError as e:
            self._stored.put((ready, e))
        except Exception as e:  # a disk that is full, or a bug: it ends this adapter alone
            log.debug("%s is not stored", ready.name, exc_info=True)
            self._stored.put((ready, TrainingError(f"it could not be stored: {first_line(e)}")))

    def _described(self, ready: Ready) -> _Stored:
        ended = ready.run.read_model(EndedRun, ENDED)
        if ended is None or ended.checkpoint is None:
            raise TrainingError(f"the run in {ready.run} ended without a checkpoint; nothing was published")
        with ready.run.fetched(ended.checkpoint) as checkpoint, tempfile.TemporaryDirectory() as temporary:
            state = read_state(checkpoint)
            check_publishable(state)
            spec = to_publish(state.recipe, ready.recipe.spec)
            folder, details = staged(checkpoint, Path(temporary), spec, ready.run, self._base)
            to = Destination(spec.name, self._store, self._catalog)
            to = replace(to, aliases=spec.publish.aliases, no_gate=spec.publish.no_gate)
            return _Stored(ready, state.step, store(folder, self._form, to, details))
