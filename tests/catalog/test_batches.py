"""Batches in the catalog: who creates and sees them, their states, and who alone changes them."""

from __future__ import annotations

from typing import Any

import pytest

from loray.catalog import Catalog
from loray.catalog import batches as module
from loray.catalog.batches import Batch, BatchError
from loray.catalog.files import OutputFile, UserFile
from loray.catalog.leases import Lease
from loray.errors import BatchNotFound, ConflictError, RateLimited, RequestError, UserFileNotFound
from loray.spec import Principal

LEASE = Lease("batches", "me")


@pytest.fixture
def acme(catalog: Catalog) -> Catalog:
    for tenant in ("acme", "beta"):
        catalog.tenants.create(tenant)
    assert catalog.leases.hold(LEASE)
    scopes: Any = frozenset({"infer", "train"})
    return catalog.view(Principal(tenant="acme", scopes=scopes, key_id="key-1", actor="ann"))


def add_file(catalog: Catalog, purpose: Any = "batch") -> UserFile:
    return catalog.files.finish(OutputFile(catalog.files.begin(), "a", purpose, "0" * 64))


def create(acme: Catalog, **fields: Any) -> Batch:
    return acme.batches.create(add_file(acme).id, "/v1/completions", **fields)


def test_a_batch_is_of_a_file_of_its_tenant(catalog: Catalog, acme: Catalog) -> None:
    batch = create(acme, metadata={"a": "b"}, output_expires_after=3600)
    assert (batch.state, batch.metadata, batch.key_id, batch.total) == ("validating", {"a": "b"}, "key-1", 0)
    assert batch.expires_at - batch.created_at == module.WINDOW
    assert acme.batches.get(batch.id) == batch
    for call in (catalog.batches.get, catalog.batches.cancel):
        with pytest.raises(BatchNotFound):
            call(batch.id)
    with pytest.raises(UserFileNotFound):
        catalog.batches.create(batch.input_file_id, "/v1/completions")
    with pytest.raises(RequestError, match="purpose"):
        acme.batches.create(add_file(acme, "fine-tune").id, "/v1/completions")


def test_pages_and_limits(acme: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UNFINISHED", 3)
    made = [create(acme).id for _ in range(3)]
    with pytest.raises(RateLimited, match="not finished"):
        create(acme)
    page = acme.batches.page(limit=2)
    assert [batch.id for batch in page.batches] == made[:0:-1]
    assert page.has_more
    assert [batch.id for batch in acme.batches.page(limit=2, after=made[1]).batches] == made[:1]
    with pytest.raises(RequestError, match="last_id"):
        acme.batches.page(limit=2, after="x")
    monkeypatch.setattr(module, "MAX_LINES", 10)
    acme.batches.begin(LEASE, made[0], 6)
    with pytest.raises(RequestError, match="lines"):
        acme.batches.begin(LEASE, made[1], 5)
    acme.batches.begin(LEASE, made[1], 4)
    acme.batches.fail(LEASE, made[2], [BatchError("empty_file", "x")])
    create(acme)


def test_a_batch_that_is_completed(catalog: Catalog, acme: Catalog) -> None:
    batch = create(acme)
    assert [b.id for b in catalog.batches.unfinished()] == [batch.id]
    catalog.batches.begin(LEASE, batch.id, 3)
    reason = BatchError("budget_used_up", "wait", None, None)
    catalog.batches.progress(LEASE, batch.id, 1, 1, [reason])
    now = acme.batches.get(batch.id)
    assert (now.state, now.completed, now.failed, now.errors) == ("in_progress", 1, 1, (reason,))
    catalog.batches.finalize(LEASE, batch.id)
    with pytest.raises(ConflictError, match="finalizing"):
        acme.batches.cancel(batch.id)
    output = OutputFile(acme.files.begin(), "out", "batch_output", "0" * 64, 3600)
    catalog.batches.end(LEASE, batch.id, "completed", 2, 1, output=output, errors=None)
    ended = acme.batches.get(batch.id)
    assert (ended.state, ended.output_file_id, ended.error_file_id) == ("completed", output.id, None)
    assert acme.files.get(output.id).purpose == "batch_output"
    assert ended.in_progress_at
    assert ended.finalizing_at
    assert ended.completed_at
    assert not catalog.batches.unfinished()


def test_a_batch_that_is_cancelled(catalog: Catalog, acme: Catalog) -> None:
    batch = create(acme)
    assert acme.batches.cancel(batch.id).state == "cancelling"
    assert acme.batches.cancel(batch.id).state == "cancelling"
    with pytest.raises(ConflictError):
        catalog.batches.begin(LEASE, batch.id, 3)
    catalog.batches.end(LEASE, batch.id, "cancelled", 0, 0, output=None, errors=None)
    assert acme.batches.cancel(batch.id).state == "cancelled"
    other = create(acme)
    catalog.batches.revoke(LEASE, other.id, BatchError("key_revoked", "x"))
    assert acme.batches.get(other.id).state == "cancelling"


def test_who_does_not_hold_the_lease_changes_nothing(catalog: Catalog, acme: Catalog) -> None:
    batch, other = create(acme), Lease("batches", "another")
    with pytest.raises(ConflictError, match="lease"):
        catalog.batches.begin(other, batch.id, 3)
    catalog.batches.begin(LEASE, batch.id, 3)
    catalog.batches.finalize(LEASE, batch.id)
    output = OutputFile(acme.files.begin(), "out", "batch_output", "0" * 64)
    with pytest.raises(ConflictError, match="lease"):
        catalog.batches.end(other, batch.id, "completed", 3, 0, output=output, errors=None)
    with pytest.raises(UserFileNotFound):
        acme.files.get(output.id)
