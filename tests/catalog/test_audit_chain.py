"""The audit log's chain: an entry that was changed or removed is found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from loray.catalog import Catalog
from loray.catalog.audit_chain import Origin, coming_from
from loray.catalog.database import writing
from loray.catalog.identity import Refusals, Refused
from loray.catalog.schema import audit_log
from loray.errors import IntegrityError
from loray.files import canonical_json
from tests.fixtures.calls import refused
from tests.fixtures.versions import digest, manifest


@pytest.fixture
def written(catalog: Catalog) -> Catalog:
    catalog.adapters.register("tone", digest(1), manifest(1), ["prod"])
    with coming_from(Origin("10.0.0.1", "req-1")):
        catalog.audit.record("download", "tone@1", tenant="default", form="peft")
    catalog.audit.record_refused({Refused("unknown", "", "10.0.0.1", "infer"): Refusals(10, "req-2")})
    return catalog


def test_what_was_written_is_verified(written: Catalog) -> None:
    state = written.audit.verify()
    assert state.num_entries == len(written.audit.page().items)
    written.tags.set("tone", "team", "support")
    assert written.audit.verify((state.last_id, state.last_hash)).num_entries == state.num_entries + 1
    download, refusal = (written.audit.page(action=action).items[0] for action in ("download", "refuse"))
    assert (download.subject, download.detail) == ("tone@1", {"form": "peft"})
    assert (download.address, download.request_id) == ("10.0.0.1", "req-1")
    assert (refusal.actor, refusal.subject, refusal.detail) == ("unknown", "infer", {"count": 10})
    assert (refusal.address, refusal.request_id) == ("10.0.0.1", "req-2")
    assert {(e.address, e.request_id) for e in written.audit.page().items} >= {(None, None)}


@pytest.mark.parametrize(
    "change",
    [
        lambda last: audit_log.update().where(audit_log.c.id == last).values(actor="nobody"),
        lambda last: audit_log.update().where(audit_log.c.action == "refuse").values(address=None),
        lambda last: audit_log.update().where(audit_log.c.action == "download").values(request_id="req-3"),
        lambda last: audit_log.update().where(audit_log.c.action == "download").values(request_id=None),
        lambda last: audit_log.update().where(audit_log.c.id == 1).values(detail="{}"),
        lambda last: audit_log.update().where(audit_log.c.id == 1).values(created_at=sa.func.now()),
        lambda last: audit_log.update().where(audit_log.c.id == last).values(hash=None, previous_hash=None),
        lambda last: audit_log.delete().where(audit_log.c.id == last - 1),
        lambda last: audit_log.delete().where(audit_log.c.id == 1),
    ],
)
def test_a_changed_or_removed_entry_is_found(written: Catalog, change: Callable[[int], Any]) -> None:
    written.tenants.create("acme")
    with writing(written._db.engine) as c:
        assert c.execute(change(written.audit.page(limit=1).items[0].id)).rowcount == 1
    refused(IntegrityError, "the audit log was changed", written.audit.verify)


def test_an_end_that_was_cut_off_is_found_by_who_has_kept_it(written: Catalog) -> None:
    state = written.audit.verify()
    with writing(written._db.engine) as c:
        c.execute(audit_log.delete().where(audit_log.c.id == state.last_id))
    assert written.audit.verify().num_entries == state.num_entries - 1
    with pytest.raises(IntegrityError, match="does not have the entry with the known hash"):
        written.audit.verify((state.last_id, state.last_hash))


def test_entries_without_a_request_have_no_such_field_in_their_hash(written: Catalog) -> None:
    entry = written.audit.page(action="register").items[0]
    with written._db.engine.connect() as c:
        row = c.execute(sa.select(audit_log).where(audit_log.c.id == entry.id)).one()
    said = {name: getattr(row, name) for name in ("actor", "action", "subject", "tenant", "detail", "address")}
    said["created_at"] = entry.created_at.isoformat()
    expected = hashlib.sha256(f"{row.previous_hash}\n{canonical_json(said)}".encode()).hexdigest()
    assert row.hash == expected
