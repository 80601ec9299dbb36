"""The reference has every table of limits that the code has, and no limit is in two of them."""

from __future__ import annotations

from collections import Counter

from docs.site.reference import reference
from docs.site.reference.limits import limits_table
from serve_apps.limits import TABLES


def test_the_reference_has_every_table() -> None:
    made = reference()["limits"]
    assert all(f"\n{limits_table(limits)}" in made for limits in TABLES.values())


def test_each_limit_is_in_one_table() -> None:
    found = Counter(limit.what for limits in TABLES.values() for limit in limits)
    assert set(found.values()) == {1}
