"""Eight processes publish to one bucket and one database, and are killed at random, while garbage is collected."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.publishing.gc import collect, find_garbage, verify_store
from loray.store import AdapterStore, open_store
from loray.store.adapters import object_name
from loray.store.s3 import S3Store
from tests.fixtures.postgres import Postgres

NUM_PROCESSES = 8
NUM_KILLS = 12
NUM_COLLECTIONS = 20
NUM_PUBLICATIONS = int(os.environ.get("NUM_PUBLICATIONS", "200"))  # 1000 for an hour with more time


class Publisher:
    """Publishes its share, again from the beginning after it was killed."""

    def __init__(self, options: dict[str, object]) -> None:
        self._options = options
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.store.publisher", json.dumps(self._options)]
        self.process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})

    @property
    def runs(self) -> bool:
        return self.process.poll() is None


@pytest.mark.slow
def test_no_version_is_half_there_and_only_orphans_are_collected(
    tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path], postgres: Postgres, s3_objects: S3Store
) -> None:
    base, url = tiny_base(), postgres.new_database()
    catalog, store = Catalog(url), AdapterStore(open_store(s3_objects.location.url))
    options: dict[str, object] = {
        "catalog": url,
        "store": s3_objects.location.url,
        "home": str(base.path.parent.parent),
        "base": base.name,
        "template": str(peft_folder(base)),
        "count": NUM_PUBLICATIONS,
        "step": NUM_PROCESSES,
    }
    chance = random.Random(0)
    publishers = [Publisher(options | {"first": i}) for i in range(NUM_PROCESSES)]
    kills = collections = num_deleted = 0
    while any(p.runs for p in publishers):
        running = [p for p in publishers if p.runs]
        num_published = len(catalog.references(keep_deleted_s=0).files)
        if kills < NUM_KILLS and running and num_published >= kills * NUM_PUBLICATIONS // (2 * NUM_KILLS):
            victim = chance.choice(running)
            victim.process.kill()
            victim.process.wait()
            victim.start()
            kills += 1
        if num_published >= collections * NUM_PUBLICATIONS // NUM_COLLECTIONS:  # not always, or nobody gets through
            garbage = find_garbage(store, catalog, grace_s=-60)  # however young: publishers must notice
            num_deleted += len(collect(store, catalog, garbage, keep_deleted_s=0))
            collections += 1
        time.sleep(0.05)
    assert [p.process.returncode for p in publishers] == [0] * NUM_PROCESSES
    assert kills == NUM_KILLS

    entries = catalog.adapters()
    digests = {ref.digest for entry in entries for ref in entry.versions.values()}
    assert (len(digests), sum(len(entry.versions) for entry in entries)) == (NUM_PUBLICATIONS,) * 2
    assert verify_store(store, catalog) == []
    for digest in sorted(digests)[:20]:
        store.verify(digest)
    garbage = find_garbage(store, catalog, grace_s=-60)
    collect(store, catalog, garbage, keep_deleted_s=0)
    files = catalog.references(keep_deleted_s=0).files
    needed = digests.union(*files.values())
    assert {object_name(key) for key in store.objects.list()} == needed
    print(f"{collections} collections deleted {num_deleted} objects under the publishers")
    catalog.close()
