"""Usage in the catalog, on both databases: counted once, summed up, forgotten."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from itertools import product

from loray.catalog import Catalog
from loray.errors import SpecError
from loray.spec import UsageEvent
from tests.fixtures.calls import refused
from tests.fixtures.figures import MORNING, event


def test_sums_by_tenant_key_model_and_day(catalog: Catalog) -> None:
    evening = datetime(2026, 3, 2, 1, tzinfo=UTC) - timedelta(hours=2)
    zone = MORNING.astimezone(UTC) + timedelta(days=1)
    catalog.usage.record(
        [
            event(1),
            event(2, created_at=evening),
            event(3, created_at=zone, model="base", digest=None),
            event(4, tenant="other", key_id=None),
        ]
    )
    by_day = catalog.usage.sums(["day"])
    assert [(row.day, row.num_requests) for row in by_day] == [(date(2026, 3, 1), 3), (date(2026, 3, 2), 1)]
    by_all = catalog.usage.sums(["day", "model", "key", "tenant"], tenant="acme")
    assert [(row.tenant, row.key_id, row.model, row.num_requests) for row in by_all] == [
        ("acme", "k1", "acme/tone", 2),
        ("acme", "k1", "base", 1),
    ]
    assert catalog.usage.sums([], since=zone)[0].num_requests == 1
    assert catalog.usage.sums([], until=zone, key_id="k1", model="acme/tone")[0].num_prompt_tokens == 20
    assert catalog.usage.sums(["model"], limit=1, offset=1)[0].model == "base"
    (nothing,) = catalog.usage.sums([], tenant="nobody")
    assert not any(value for _, value in nothing)
    refused(SpecError, "not grouped by 'hour'", catalog.usage.sums, ["hour"])  # type: ignore[list-item]


def test_sums_of_days_are_those_of_their_events(catalog: Catalog) -> None:
    """Whatever time is asked for: whole days come from sums, the others from events."""
    hours = [0, 1, 7, 23, 24, 25, 47, 48, 70, 96]
    midnight = datetime(2026, 3, 1, tzinfo=UTC)
    made = [event(n, created_at=midnight + timedelta(hours=h), num_output_tokens=2**n) for n, h in enumerate(hours)]
    before = catalog.change_counter()
    assert [catalog.usage.record([one]) for one in made] == [1] * len(made)  # each by itself, and again
    assert (catalog.usage.record(made), catalog.usage.record([])) == (0, 0)
    assert catalog.change_counter() == before  # serving does not depend on it
    edges = [None, *(midnight + timedelta(hours=h) for h in (-3, 0, 12, 24, 30, 96, 200))]
    for since, until in product(edges, edges):
        within = [
            e for e in made if (since is None or e.created_at >= since) and (until is None or e.created_at < until)
        ]
        (found,) = catalog.usage.sums([], since=since, until=until)
        assert (found.num_requests, found.num_output_tokens) == (
            len(within),
            sum(e.num_output_tokens for e in within),
        ), (since, until)


def test_what_a_budget_has_left(catalog: Catalog) -> None:
    catalog.usage.record([event(1), event(2, key_id="k2"), event(3, created_at=MORNING - timedelta(days=2))])
    since = MORNING - timedelta(days=1)
    assert catalog.usage.tokens(key_id="k1", since=since) == 13
    assert catalog.usage.tokens(tenant="acme", since=since) == 26
    assert catalog.usage.tokens(tenant="other", since=since) == 0


def test_tokens_of_batches_count_in_part(catalog: Catalog) -> None:
    """In sums of days and in single events."""
    midnight = datetime(2026, 3, 1, tzinfo=UTC)
    tiers = ("batch", "default", "batch")
    made = [event(n, tier=tier, created_at=midnight + timedelta(hours=6 * n)) for n, tier in enumerate(tiers)]
    catalog.usage.record(made)
    each = made[0].num_prompt_tokens + made[0].num_output_tokens
    for since, num_batch, num_others in ((midnight, 2, 1), (midnight + timedelta(hours=3), 1, 1)):
        (found,) = catalog.usage.sums([], since=since)
        assert found.num_batch_tokens == num_batch * each
        counted = catalog.usage.tokens(tenant="acme", since=since, batch_factor=0.25)
        assert counted == (0.25 * num_batch + num_others) * each


def test_old_events_are_forgotten(catalog: Catalog) -> None:
    catalog.usage.record([event(1), event(2, created_at=MORNING + timedelta(days=1))])
    assert catalog.usage.forget(MORNING + timedelta(hours=1)) == 0  # whole days are
    assert catalog.usage.forget(MORNING + timedelta(days=1)) == 1
    assert [row.day for row in catalog.usage.sums(["day"])] == [date(2026, 3, 2)]
    assert catalog.usage.tokens(tenant="acme", since=MORNING - timedelta(days=9)) == 13


def test_events_as_text() -> None:
    assert UsageEvent.from_json(event(1).to_json()) == event(1)
    for line in ("{", "[]", "{}", '{"created_at": 3}', '{"created_at": "2026-03-01T08:00:00+00:00"}'):
        refused(ValueError, "", UsageEvent.from_json, line)
