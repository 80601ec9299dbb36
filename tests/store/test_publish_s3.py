"""Publishers that die, or race, at S3: readers see nothing or a whole adapter, and publishing again completes it."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.errors import AdapterNotFound, ConflictError
from loray.locations import S3Location
from loray.publishing import Destination, publish
from loray.store import AdapterStore
from loray.store.s3 import S3Store

_TIMEOUT_S = 60
_CONFLICT = 3  # a child's exit code


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Forked from a process that has imported what is slow to import, and has neither threads nor connections."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "boto3.s3.transfer", "loray.adapters.peft_format", "sqlalchemy"])
    return context


@pytest.fixture(scope="module")
def empty_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("catalog") / "catalog.db"
    Catalog(f"sqlite:///{path}").close()
    return path


@dataclass(frozen=True)
class Publication:
    """What a publisher is to publish, and where."""

    folder: Path
    base: BaseModel
    location: S3Location
    catalog_file: Path
    parts_from: int | None = None
    version: int | None = None

    @property
    def catalog(self) -> Catalog:
        return Catalog(f"sqlite:///{self.catalog_file}")

    def run(self, kill_at: int | None = None, store: S3Store | None = None) -> None:
        """In this process, which is killed at the given step: before each request and transaction, and at the end."""
        store = store or S3Store(self.location)
        if self.parts_from is not None:
            store._parts_from = self.parts_from
        catalog = self.catalog
        if kill_at is not None:
            steps = itertools.count()
            store._client.meta.events.register("before-send.s3", _killing_send(steps, kill_at))
            for name in ("add_base", "register"):
                setattr(catalog, name, _killing_call(getattr(catalog, name), steps, kill_at))
        adapters = AdapterStore(store)
        publish(self.folder, self.base, Destination("a", adapters, catalog, version=self.version))
        if kill_at is not None:
            _step(steps, kill_at)
        catalog.close()


def _killing_send(steps: Iterator[int], kill_at: int) -> Callable[..., Any]:
    from botocore.httpsession import URLLib3Session

    session = URLLib3Session()

    def send(request: Any, **_: Any) -> Any:
        _step(steps, kill_at)
        return session.send(request)

    return send


def _killing_call(function: Callable[..., Any], steps: Iterator[int], kill_at: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        _step(steps, kill_at)
        return function(*args, **kwargs)

    return call


def _step(steps: Iterator[int], kill_at: int) -> None:
    """SIGKILL where this is the step. What others see is what was there after the step before."""
    if next(steps) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


def _race(publication: Publication, barrier: Any) -> None:
    barrier.wait(_TIMEOUT_S)
    try:
        publication.run()
    except ConflictError:
        os._exit(_CONFLICT)


def _ended(children: Sequence[BaseProcess]) -> list[int | None]:
    """Exit codes; None of one that hung. None is left running."""
    try:
        for child in children:
            child.join(_TIMEOUT_S)
        return [child.exitcode for child in children]
    finally:
        for child in children:
            child.kill()
            child.join()


def check_what_readers_see(publication: Publication, objects: S3Store) -> int | None:
    """The newest version of the name; every object in sight must be whole."""
    store = AdapterStore(objects)
    for key in objects.list("manifests/"):
        store.verify(Path(key).stem)
    for key in objects.list("blobs/"):
        assert hashlib.sha256(objects.get(key)).hexdigest() == Path(key).name
    catalog = publication.catalog
    try:
        ref = catalog.resolve("a")
    except AdapterNotFound:
        return None
    finally:
        catalog.close()
    store.verify(ref.digest)
    return ref.version


@pytest.mark.slow
@pytest.mark.parametrize("parts_from", [None, 1], ids=["whole", "in parts"])
def test_killed_at_every_step(
    processes: ForkServerContext,
    tiny_base: Callable[..., BaseModel],
    peft_folder: Callable[..., Path],
    s3_location: S3Location,
    empty_catalog: Path,
    tmp_path: Path,
    parts_from: int | None,
) -> None:
    base = tiny_base()
    folder = peft_folder(base)
    seen: list[int | None] = []
    for step in itertools.count():
        catalog_file = Path(shutil.copy(empty_catalog, tmp_path / f"{step}.db"))
        location = replace(s3_location, prefix=f"{s3_location.prefix}/{step}")
        publication = Publication(folder, base, location, catalog_file, parts_from)
        child = processes.Process(target=publication.run, args=(step,))
        child.start()
        (exitcode,) = _ended([child])
        assert exitcode in (0, -signal.SIGKILL)
        objects = S3Store(location)
        seen.append(check_what_readers_see(publication, objects))
        if exitcode == 0:
            break
        replace(publication, parts_from=None).run(store=objects)  # again, and not killed
        assert check_what_readers_see(publication, objects) == 1
        assert list(publication.catalog.adapter("a").entry.versions) == [1]
        assert len(list(objects.list("manifests/"))) == 1
    assert len(seen) > (16 if parts_from else 8)
    assert seen == [None] * (len(seen) - 2) + [1, 1]  # it appears in the last transaction, before the last step


def test_two_publishers_of_one_version(
    processes: ForkServerContext,
    tiny_base: Callable[..., BaseModel],
    peft_folder: Callable[..., Path],
    s3_location: S3Location,
    empty_catalog: Path,
    tmp_path: Path,
) -> None:
    base = tiny_base()
    catalog_file = Path(shutil.copy(empty_catalog, tmp_path / "catalog.db"))
    barrier = processes.Barrier(2)
    rivals = [
        Publication(peft_folder(base, "lora", seed), base, s3_location, catalog_file, version=7) for seed in (1, 2)
    ]
    children = [processes.Process(target=_race, args=(rival, barrier)) for rival in rivals]
    for child in children:
        child.start()
    exitcodes = _ended(children)
    assert sorted(exitcodes, key=str) == [0, _CONFLICT]
    objects = S3Store(s3_location)
    assert check_what_readers_see(rivals[0], objects) == 7
    loser = rivals[exitcodes.index(_CONFLICT)]
    with pytest.raises(ConflictError, match="7"):
        loser.run(store=objects)
    replace(loser, version=None).run(store=objects)  # as the next version it is welcome
    assert check_what_readers_see(loser, objects) == 8
