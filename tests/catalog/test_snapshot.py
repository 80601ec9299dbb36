"""A snapshot that follows the changes is the one that reads all, on both databases; it shares what stayed."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
import sqlalchemy as sa

from loray.catalog import Catalog, CatalogSnapshot
from loray.catalog.database import writing
from loray.catalog.schema import adapters, changes, versions
from loray.errors import AdapterNotFound, ConflictError, SpecError
from loray.spec import AdapterManifest, Visibility
from loray.spec.adapters import text_sha256
from tests.fixtures.versions import BASE, digest, manifest, publish

OPEN: tuple[Visibility, ...] = ("private", "public")
NAMES = [f"{tenant}{first}{i}" for tenant in ("", "t0/") for first in "abz" for i in range(2)]


def register(catalog: Catalog, name: str, draw: random.Random) -> None:
    number, template = draw.randrange(50), draw.choice([None, None, "{{ messages }}", "{{ messages[0] }}"])
    of_template = {} if template is None else {AdapterManifest.TEMPLATE_FILE: text_sha256(template)}
    content = manifest(number).model_copy(
        update={
            "method": draw.choice(["lora", "dora"]),
            "base_fingerprint": f"{draw.randrange(2):064x}",
            "context_length": draw.choice([512, 4096]),
            "chat_template": template,
            "files": manifest(number).files | of_template,
        }
    )
    catalog.adapters.register(name, digest(number), content, draw.choice([(), ("prod",), ("canary",)]))


WRITES: tuple[Callable[[Catalog, str, random.Random], object], ...] = (
    *(register, register, register, register, register),
    lambda c, name, draw: c.aliases.move(name, draw.choice(["prod", "beta"]), draw.randrange(1, 4)),
    lambda c, name, draw: c.aliases.rollback(name, "prod"),
    lambda c, name, draw: c.aliases.delete(name, draw.choice(["prod", "canary", "beta"])),
    lambda c, name, draw: c.canaries.set(name, "prod", draw.randrange(1, 4), 10),
    lambda c, name, draw: c.adapters.share(name, draw.choice(OPEN)),
    lambda c, name, draw: c.adapters.share(name, "shared", [f"t{draw.randrange(3)}"]),
    lambda c, name, draw: c.removal.delete_version(name, draw.randrange(1, 4)),
    lambda c, name, draw: c.removal.delete_adapter(name),
    lambda c, name, draw: c.removal.restore(name, draw.choice([None, None, 1, 2])),
    lambda c, name, draw: c.adapters.transfer(name, *draw.choice([("t0", "a0"), ("t0", "z1"), ("default", "b0")])),
)


def test_changes_lead_to_the_snapshot_of_all(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loray.catalog.snapshot._PAGE", 3)
    draw = random.Random(0)
    for number in range(2):
        catalog.bases.add(f"base-{number}", f"{number:064x}")
    catalog.tenants.create("t0")
    follower = CatalogSnapshot()
    for _ in range(25):
        for _ in range(draw.randrange(1, 5)):
            try:
                draw.choice(WRITES)(catalog, draw.choice(NAMES), draw)
            except (AdapterNotFound, ConflictError, SpecError):
                continue
        follower, fresh = catalog.snapshot(follower), catalog.snapshot()
        assert follower == fresh
        assert [e.name for e in follower.models()] == sorted(follower.adapters)
        listed = {e.name for e in catalog.adapters.page(limit=100)}
        assert listed == set(fresh.adapters)
        for method in ("lora", "dora"):
            assert [e.name for e in catalog.adapters.page(limit=100, method=method)] == [
                e.name for e in fresh.models() if e.default.method == method
            ]
        for number in range(2):
            assert [e.name for e in catalog.adapters.page(limit=100, base=f"base-{number}")] == [
                e.name for e in fresh.models() if int(e.default.base_fingerprint, 16) == number
            ]
        of_bases = [ref.base_fingerprint for e in fresh.models() for ref in [e.default]]
        assert {base: t.num_adapters for base, t in fresh.totals.items() if t.num_adapters} == {
            base: of_bases.count(base) for base in of_bases
        }


def test_a_change_is_read_alone_and_the_rest_is_shared(catalog: Catalog) -> None:
    publish(catalog, "tone", 1)
    publish(catalog, "dates", 1)
    before = catalog.snapshot()
    catalog.aliases.move("tone", "prod", 1)
    after = catalog.snapshot(before)
    assert after.adapters["dates"] is before.adapters["dates"]
    assert after.adapters["tone"] != before.adapters["tone"]
    assert after.templates is before.templates
    assert after.ids is before.ids
    assert after.names is before.names


def test_what_changes_nothing_does_not_count(catalog: Catalog) -> None:
    first = catalog.adapters.register("tone", digest(1), manifest(1), ["prod"])
    revision, counter = catalog.aliases.get("tone", "prod").revision, catalog.change_counter()
    for _ in range(2):
        assert catalog.adapters.register("tone", digest(1), manifest(1)) == first
        assert catalog.adapters.register("tone", digest(1), manifest(1), ["prod"]) == first
        assert catalog.aliases.move("tone", "prod", 1).revision == revision
        catalog.bases.add("smollm2", BASE)
        counter = counter if catalog.change_counter() == counter else counter + 1  # the base, the first time
        assert catalog.change_counter() == counter
    assert revision < counter


def test_a_restored_catalog_is_read_again(catalog: Catalog) -> None:
    for name in ("tone", "dates", "gone"):
        publish(catalog, name, 1)
    before = catalog.snapshot()
    with writing(catalog._db.engine) as c:  # as if another copy took its place: its counter is no longer this one's
        gone = adapters.c.name == "gone"
        c.execute(versions.delete().where(versions.c.adapter_id.in_(sa.select(adapters.c.id).where(gone))))
        c.execute(adapters.delete().where(gone))
        c.execute(adapters.update().where(adapters.c.name == "tone").values(visibility="public"))
    assert catalog.snapshot(before) == before
    after = catalog.snapshot(before, whole=True)
    assert after == catalog.snapshot() != before
    assert after.adapters["dates"] is before.adapters["dates"]
    with writing(catalog._db.engine) as c:
        c.execute(changes.update().values(counter=1))
    assert catalog.snapshot(before) == catalog.snapshot()


def test_readers_see_complete_states(catalog: Catalog, url: str) -> None:
    """Each register moves two aliases together: no snapshot has one of them alone."""
    publish(catalog, "tone", 0, aliases=("prod", "canary"))
    done = threading.Event()

    def write() -> None:
        other = Catalog(url)
        for number in range(1, 15):
            publish(other, "tone", number, aliases=("prod", "canary"))
        other.close()
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    snapshot = CatalogSnapshot()
    ended = False
    while not ended:
        ended = done.is_set()  # before the read: the last one sees all
        snapshot = catalog.snapshot(snapshot)
        entry = snapshot.adapters["tone"]
        assert entry.aliases["prod"] == entry.aliases["canary"] == max(entry.versions)
    writer.join()
    assert snapshot.resolve("tone").version == 15
