"""Tables of limits in guide and reference are those of the code, and no limit is in two of them."""

from __future__ import annotations

from collections import Counter

import pytest

from docs.site.limits import GUIDE, limits_table, names, with_limits
from docs.site.reference import reference
from serve_apps.limits import TABLES

PAGES = {path.name: path.read_text(encoding="utf-8") for path in GUIDE.glob("*.md")}


@pytest.mark.parametrize("name", sorted(name for name, page in PAGES.items() if names(page)))
def test_the_guide_has_the_limits_of_the_code(name: str) -> None:
    assert PAGES[name] == with_limits(PAGES[name]), "run python -m docs.site.limits"


def test_the_reference_has_every_table_and_the_guide_none_twice() -> None:
    made = reference()["limits"]
    assert all(f"\n{limits_table(limits)}" in made for limits in TABLES.values())
    shown = Counter(name for page in PAGES.values() for name in names(page))
    assert shown.keys() <= TABLES.keys()
    assert set(shown.values()) <= {1}


def test_each_limit_is_in_one_table() -> None:
    found = Counter(limit.what for limits in TABLES.values() for limit in limits)
    assert set(found.values()) == {1}


def test_an_old_table_is_replaced_and_the_text_around_it_stays() -> None:
    page = "before\n\n<!-- limits: constraints -->\n| an old | table |\n|---|---|\n\nafter\n| another | table |\n"
    written = with_limits(page)
    assert written.startswith("before\n\n<!-- limits: constraints -->\n| what | limit | set by | beyond it |\n")
    assert written.endswith(" |\n\nafter\n| another | table |\n")
    assert "an old" not in written
    assert with_limits(written) == written
