"""Files of tenants: which exist for whom, in which order, what they count, and when they end."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from loray.catalog import Catalog
from loray.catalog.database import writing
from loray.catalog.files import OutputFile, UserFile
from loray.catalog.schema import batches, files
from loray.errors import LimitExceeded, RequestError, UserFileNotFound
from loray.spec import Limits, Principal


def view(catalog: Catalog, tenant: str = "acme", *scopes: Any, **fields: Any) -> Catalog:
    given = frozenset(scopes or ("infer", "train"))
    return catalog.view(Principal(tenant=tenant, scopes=given, key_id="key-1", actor="ann", **fields))


@pytest.fixture(autouse=True)
def tenants(catalog: Catalog) -> None:
    for tenant in ("acme", "beta"):
        catalog.tenants.create(tenant)


def add(catalog: Catalog, purpose: Any = "batch", num_bytes: int = 10, **fields: Any) -> UserFile:
    file_id = catalog.files.begin()
    catalog.files.grow(file_id, num_bytes)
    return catalog.files.finish(OutputFile(file_id, "a.jsonl", purpose, "0" * 64, **fields))


def end_all(catalog: Catalog, **values: Any) -> None:
    with writing(catalog._db.engine) as c:
        c.execute(files.update().values(**values))


def test_a_file_exists_for_its_tenant_once_it_is_whole(catalog: Catalog) -> None:
    acme = view(catalog)
    begun = acme.files.begin()
    with pytest.raises(UserFileNotFound):
        acme.files.get(begun)
    file = add(acme)
    assert (file.tenant, file.account, file.bytes, file.purpose) == ("acme", "key-1", 10, "batch")
    assert file.expires_at is not None
    assert file.expires_at - file.created_at == timedelta(days=30)
    assert acme.files.get(file.id) == file
    for other in (view(catalog, "beta"), catalog):  # an administrator of another tenant neither
        with pytest.raises(UserFileNotFound):
            other.files.get(file.id)
        with pytest.raises(UserFileNotFound):
            other.files.delete(file.id)
    assert [e.action for e in catalog.audit.page(tenant="acme").items][:1] == ["add_file"]


def test_a_key_sees_files_of_its_scopes(catalog: Catalog) -> None:
    acme = view(catalog)
    asked, learned = add(acme, "batch"), add(acme, "fine-tune")
    assert view(catalog, "acme", "infer").files.get(asked.id) == asked
    with pytest.raises(UserFileNotFound):
        view(catalog, "acme", "infer").files.get(learned.id)
    with pytest.raises(UserFileNotFound):
        view(catalog, "acme", "train").files.delete(asked.id)


def test_pages(catalog: Catalog) -> None:
    acme = view(catalog)
    made = [add(acme, purpose).id for purpose in ("batch", "fine-tune", "batch", "batch")]

    def page(**fields: Any) -> tuple[list[str], bool]:
        given: dict[str, Any] = {"purposes": ("batch", "fine-tune"), "limit": 10}
        found = acme.files.page(**given | fields)
        return [file.id for file in found.files], found.has_more

    assert page() == (made[::-1], False)
    assert page(is_ascending=True, limit=2) == (made[:2], True)
    assert page(is_ascending=True, limit=2, after=made[1]) == (made[2:], False)
    assert page(limit=3, after=made[3]) == (made[2::-1], False)
    assert page(purposes=("batch",), limit=2) == ([made[3], made[2]], True)
    with pytest.raises(RequestError, match="last_id"):
        page(after="file-x")


def test_limits(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    acme = view(catalog, limits=Limits(max_stored_bytes=25))
    add(acme, num_bytes=20)
    begun = acme.files.begin()
    with pytest.raises(LimitExceeded, match="max_stored_bytes"):
        acme.files.grow(begun, 6)
    acme.files.grow(begun, 5)
    acme.files.grow(begun, 50, is_limited=False)  # an output
    monkeypatch.setattr("loray.catalog.files.MAX_FILES", 2)
    with pytest.raises(LimitExceeded, match="delete some"):
        acme.files.begin()
    view(catalog, "beta").files.begin()


def test_what_nobody_can_read_is_removed_unless_a_batch_needs_it(catalog: Catalog) -> None:
    acme, past = view(catalog), datetime.now(UTC) - timedelta(days=1)
    read, other = add(acme), add(acme)
    row = {"id": "batch_1", "tenant": "acme", "endpoint": "/v1/completions", "metadata": "{}", "errors": "[]"}
    with writing(catalog._db.engine) as c:
        values = row | {"input_file_id": read.id, "created_at": past, "expires_at": past, "state": "in_progress"}
        c.execute(batches.insert().values(values))
    assert not catalog.files.unneeded()
    for file in (read, other):
        acme.files.delete(file.id)
    assert [file.id for file in catalog.files.unneeded()] == [other.id]
    catalog.files.forget(other.id)
    with writing(catalog._db.engine) as c:
        c.execute(batches.update().values(state="completed"))
    assert [file.id for file in catalog.files.unneeded()] == [read.id]
    catalog.files.forget(read.id)
    add(acme)
    acme.files.begin()
    assert not catalog.files.unneeded()
    end_all(catalog, created_at=past)
    assert len(catalog.files.unneeded()) == 1
    end_all(catalog, expires_at=past)
    assert len(catalog.files.unneeded()) == 2
    assert not acme.files.page(purposes=("batch",), limit=10).files
