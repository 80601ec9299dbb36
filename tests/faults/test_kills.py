"""Eight processes push adapters over HTTP, while they, the API, PostgreSQL and the S3 server are killed at random times
and started again. Nothing that was acknowledged is lost, nothing is there twice or in part, and a backup that was
taken meanwhile is whole.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psycopg
import pytest
from click.testing import CliRunner

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.cli.main import cli
from loray.client import CatalogClient
from loray.files import file_sha256
from loray.publishing.gc import collect, find_garbage, verify_store
from loray.schemas.resources import VersionDetail
from loray.store import AdapterStore, LocalStore, open_store
from loray.store.s3 import create_bucket
from tests.faults.processes import NUM_NAMES, Acknowledged, ApiProcess, Options, Publisher, acknowledged_in
from tests.faults.world import POSTGRES, Bucket
from tests.fixtures.postgres import Postgres, start_postgres
from tests.fixtures.publisher import WEIGHTS, write_adapter
from tests.fixtures.s3 import started_s3

NUM_PUBLICATIONS = int(os.environ.get("TEST_PUBLICATIONS", "60"))
NUM_PUBLISHERS = 8
SEED = 0
KILLS = ["publisher"] * 5 + ["api"] * 3 + ["database"] * 2 + ["store"] * 2 + ["all"]
_EXPECTED = {200, 201, 499, 503}  # 499: the client was killed


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    with start_postgres(POSTGRES) as server:
        yield server


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    with started_s3() as server:
        location = server.location("adapters")
        create_bucket(location)
        yield Bucket(server, location.url)


@pytest.fixture
def template(tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path]) -> Path:
    return peft_folder(tiny_base())


@pytest.fixture
def database(postgres: Postgres) -> str:
    return postgres.new_database()


@pytest.fixture
def api(
    tiny_base: Callable[..., BaseModel], bucket: Bucket, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ApiProcess]:
    base = tiny_base()
    shutil.copytree(base.path, tmp_path / "home" / "bases" / base.name)
    env = {"LORAY_HOME": str(tmp_path / "home"), "LORAY_CATALOG": database, "LORAY_STORE": bucket.url}
    for name, value in env.items():  # of the commands that this test calls
        monkeypatch.setenv(name, value)
    api = ApiProcess(tmp_path, env)
    yield api
    api.kill()


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_everything_is_killed_and_nothing_lost(
    tiny_base: Callable[..., BaseModel],
    postgres: Postgres,
    bucket: Bucket,
    database: str,
    api: ApiProcess,
    template: Path,
    tmp_path: Path,
) -> None:
    base = tiny_base().name
    publishers = [
        Publisher(Options(number, NUM_PUBLISHERS, NUM_PUBLICATIONS, api.url, base, str(template), str(tmp_path)))
        for number in range(NUM_PUBLISHERS)
    ]
    chance = random.Random(SEED)
    killer = Killer({"api": api, "database": postgres, "store": bucket}, publishers, chance)
    kills = KILLS * max(1, NUM_PUBLICATIONS // 250)
    chance.shuffle(kills)
    num_kills, is_backed_up = len(kills), False
    before_backup: list[Acknowledged] = []
    try:
        while kills or any(p.runs for p in publishers):
            assert api.runs
            acknowledged = acknowledged_in(tmp_path)
            if kills and len(acknowledged) >= (num_kills - len(kills)) * NUM_PUBLICATIONS // (num_kills + 2):
                time.sleep(chance.uniform(0, 0.5))
                killer.strike(kills.pop())
            if not is_backed_up and len(acknowledged) >= NUM_PUBLICATIONS // 2:
                before_backup, is_backed_up = acknowledged, True
                loray("catalog", "backup", str(tmp_path / "backup"))
                copy_store(bucket, tmp_path / "copy")
            time.sleep(0.05)
    finally:
        for publisher in publishers:
            publisher.kill()

    acknowledged = acknowledged_in(tmp_path)
    assert sorted(each.number for each in acknowledged) == list(range(NUM_PUBLICATIONS))
    with CatalogClient(api.url) as client:
        check_names(client, acknowledged, template, tmp_path)
        check_statuses(api.access_log)
        loray("store", "verify")
        check_backup(postgres, bucket, before_backup, acknowledged, tmp_path)
        check_garbage(client, bucket, database)
        api.stop()
    assert list(api.scratch.iterdir()) == []
    wait_until_disconnected(postgres, database)


class Mortal(Protocol):
    def kill(self) -> None: ...

    def start(self) -> None: ...


class Killer:
    """Kills what it is told, and starts it again a moment later. `all`: everything at once."""

    def __init__(self, parts: Mapping[str, Mortal], publishers: Sequence[Publisher], chance: random.Random) -> None:
        self._parts, self._publishers, self._chance = parts, publishers, chance

    def strike(self, what: str) -> None:
        victims: list[Mortal] = list(self._parts.values()) if what == "all" else []
        if what in self._parts:
            victims = [self._parts[what]]
        running: list[Mortal] = [p for p in self._publishers if p.runs]
        if what == "all":
            victims += running
        elif what == "publisher" and running:
            victims = [self._chance.choice(running)]
        self._chance.shuffle(victims)
        for victim in victims:
            victim.kill()
        if what != "publisher":
            time.sleep(self._chance.uniform(0, 1.5))  # the others notice
        self._chance.shuffle(victims)
        for victim in victims:
            victim.start()


def loray(*args: str) -> str:
    ended = CliRunner().invoke(cli, args)
    assert ended.exit_code == 0, (ended.output, ended.exception)
    return ended.stdout


def copy_store(bucket: Bucket, folder: Path) -> None:
    """After the database was backed up: what its versions need is there, and stays."""
    store, copy = open_store(bucket.url), LocalStore(folder)
    for key in [key for kind in ("manifests/", "blobs/") for key in store.list(kind)]:
        copy.put_if_absent(key, store.get(key))


def check_names(client: CatalogClient, acknowledged: list[Acknowledged], template: Path, scratch: Path) -> None:
    """Each publication is one version, with the bytes that were sent; each alias points at one."""
    versions = all_versions(client)
    assert Counter((v.name, v.version, v.digest) for v in versions) == Counter(each[1:] for each in acknowledged)
    manifests = {v.digest: v.manifest for v in versions}
    for each in acknowledged:
        folder = scratch / f"sent-{each.number}"
        write_adapter(template, folder, each.number)
        assert manifests[each.digest].files[WEIGHTS] == file_sha256(folder / WEIGHTS)
        shutil.rmtree(folder)
    names = {each.name for each in acknowledged}
    assert names == {f"a{number % NUM_NAMES}" for number in range(NUM_PUBLICATIONS)}
    for adapter in client.adapters():
        (alias,) = client.aliases(adapter.name)
        assert (alias.alias, adapter.aliases) == ("prod", {"prod": alias.version})
        assert (adapter.name, alias.version, alias.digest) in {each[1:] for each in acknowledged}
        assert sorted(adapter.versions) == list(range(1, len(adapter.versions) + 1))


def all_versions(client: CatalogClient) -> list[VersionDetail]:
    names = [adapter.name for adapter in client.adapters()]
    return [client.version(name, found.version) for name in names for found in client.versions(name)]


def check_statuses(log: Path) -> None:
    """Nothing was refused, and nothing failed that was not said to be worth another try."""
    statuses: Counter[int] = Counter()
    for line in log.read_text().splitlines():
        try:
            statuses[json.loads(line)["status"]] += 1
        except ValueError:  # the server was killed while it wrote the line
            continue
    print(f"answers by status: {dict(statuses)}")
    assert statuses.keys() <= _EXPECTED


def check_backup(
    postgres: Postgres, bucket: Bucket, before: list[Acknowledged], after: list[Acknowledged], folder: Path
) -> None:
    """It has what was acknowledged before; store and copy have all that it has."""
    restored = Catalog(postgres.new_database())
    summary = restored.backup.read(folder / "backup")
    entries = tuple(restored.snapshot().models())
    versions = {(entry.name, ref.version, ref.digest) for entry in entries for ref in entry.versions.values()}
    assert summary.num_versions == len(versions)
    assert {each[1:] for each in before} <= versions <= {each[1:] for each in after}
    for objects in (open_store(bucket.url), LocalStore(folder / "copy")):
        assert verify_store(AdapterStore(objects), restored) == []
    restored.close()


def check_garbage(client: CatalogClient, bucket: Bucket, database: str) -> None:
    """Collected is what no version needs, as the bucket's listing and the API tell, and nothing else."""
    client.delete("a0")
    versions = all_versions(client)
    needed = {f"manifests/{v.digest[:2]}/{v.digest}.json" for v in versions}
    needed |= {f"blobs/{sha256[:2]}/{sha256}" for v in versions for sha256 in v.manifest.files.values()}
    before = bucket.keys()
    assert needed < before
    catalog, store = Catalog(database), AdapterStore(open_store(bucket.url))
    with psycopg.connect(database) as connection:
        connection.execute("DELETE FROM claims")  # of processes that were killed, which lapse in a day
    garbage = find_garbage(store, catalog, grace_s=-60, keep_deleted_s=-60)
    assert {entry.key for entry in garbage.objects} == before - needed
    assert {key.partition("/")[0] for key in before - needed} == {"blobs", "manifests", "uploads"}
    collect(store, catalog, garbage, keep_deleted_s=-60)
    assert bucket.keys() == needed
    catalog.close()
    assert loray("store", "verify") == "the store is whole\n"


def wait_until_disconnected(postgres: Postgres, url: str) -> None:
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"
    deadline = time.monotonic() + 30
    with psycopg.connect(url, autocommit=True) as connection:
        while connection.execute(others, [url.rpartition("/")[2]]).fetchone() != (0,):
            assert time.monotonic() < deadline, "connections are left"
            time.sleep(0.05)
