"""Deaths of replicas in the catalog: counted over gateways, forgotten in time, released by administrators."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from loray.catalog import Catalog
from loray.catalog.quarantine import KEPT
from loray.errors import AdapterNotFound, NotFoundError, PermissionDenied
from loray.spec import Principal
from tests.fixtures.calls import refused
from tests.fixtures.versions import digest, publish

AT = datetime(2026, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def minutes(deaths: int) -> timedelta:
    return MINUTE * deaths


def test_a_death_counts_once_whoever_reports_it(catalog: Catalog, url: str) -> None:
    first = catalog.quarantine.report_death(digest(1), "r1", AT, minutes)
    assert (first.deaths, first.died_at, first.refused_until) == (1, AT, AT + MINUTE)
    other = Catalog(url)
    assert other.quarantine.report_death(digest(1), "r1", AT + MINUTE, minutes) == first
    second = other.quarantine.report_death(digest(1), "r2", AT + MINUTE, minutes)
    assert (second.deaths, second.refused_until) == (2, AT + 3 * MINUTE)
    suspected = other.quarantine.report_death(digest(2), "r2", AT, lambda deaths: None)
    assert catalog.quarantine.all() == {digest(1): second, digest(2): suspected}
    assert suspected.refused_until is None
    other.close()


def test_one_of_all_tries_it_again(catalog: Catalog) -> None:
    catalog.quarantine.report_death(digest(1), "r1", AT, minutes)
    for at, expected in ((AT, False), (AT + MINUTE, True), (AT + MINUTE, False), (AT + 2 * MINUTE, True)):
        assert catalog.quarantine.try_again(digest(1), at, at + MINUTE) is expected
    catalog.quarantine.clear(digest(1))
    assert not catalog.quarantine.try_again(digest(1), AT + KEPT, AT + KEPT)
    assert catalog.quarantine.all() == {}


def test_who_had_tokens_acquits_it_of_one_death(catalog: Catalog) -> None:
    for replica, until in (("r1", None), ("r2", AT + 2 * MINUTE)):
        catalog.quarantine.report_death(digest(1), replica, AT, minutes)
        catalog.quarantine.acquit(digest(1))
        assert catalog.quarantine.all()[digest(1)].refused_until == until


def test_deaths_are_forgotten(catalog: Catalog) -> None:
    catalog.quarantine.report_death(digest(1), "r1", AT, minutes)
    catalog.quarantine.report_death(digest(2), "r2", AT + KEPT, minutes)
    assert catalog.quarantine.all().keys() == {digest(2)}


def test_a_version_says_so_until_an_administrator_releases_it(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2)
    counter = catalog.change_counter()
    known = catalog.quarantine.report_death(digest(2), "r1", AT, minutes)
    assert [catalog.adapters.version("tone", n).quarantine for n in (2, 1)] == [known, None]
    assert catalog.change_counter() == counter  # servers do not read their names again
    tenant = catalog.view(Principal(scopes=frozenset({"publish", "promote"})))
    refused(PermissionDenied, "", tenant.quarantine.release, "tone", 2)
    for name, version, error in (("tone", 1, NotFoundError), ("tone", 3, AdapterNotFound), ("x", 1, AdapterNotFound)):
        refused(error, "", catalog.quarantine.release, name, version)
    catalog.quarantine.release("tone", 2)
    assert catalog.adapters.version("tone", 2).quarantine is None
    assert [(e.action, e.subject) for e in catalog.audit.page(limit=2).items] == [
        ("release", "tone@2"),
        ("quarantine", digest(2)),
    ]
