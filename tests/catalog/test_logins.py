"""Logins of the console in the database: when they end, and what is read of them."""

from __future__ import annotations

from datetime import timedelta

import pytest
import sqlalchemy as sa

from loray.catalog import Catalog, identity
from loray.catalog.queries import now


def test_a_login_ends_by_time_at_logout_and_by_number(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    began = now()

    def at(moment: timedelta) -> None:
        monkeypatch.setattr(identity, "now", lambda: began + moment)

    at(timedelta())
    catalog.begin_login("a", "sealed a")
    catalog.begin_login("b", "sealed b")
    at(timedelta(hours=11))
    assert catalog.find_login("a") == "sealed a"
    at(timedelta(hours=13))
    assert (catalog.find_login("a"), catalog.find_login("b")) == ("sealed a", None)
    at(timedelta(hours=23))
    assert catalog.find_login("a") == "sealed a"
    at(timedelta(hours=24, seconds=1))  # however often it was used
    assert catalog.find_login("a") is None
    monkeypatch.setattr(identity, "MOST", 2)
    for name in "cde":
        at(timedelta(days=2, minutes=ord(name)))
        catalog.begin_login(name, name)
    assert [catalog.find_login(name) for name in "abcde"] == [None, None, None, "d", "e"]
    with catalog._engine.connect() as c:
        assert c.execute(sa.text("SELECT count(*) FROM logins")).scalar_one() == 2
    catalog.end_login("d")
    catalog.end_login("d")
    assert catalog.find_login("d") is None
    actions = [entry.action for entry in catalog.audit().entries]
    assert (actions.count("login"), actions.count("logout")) == (5, 1)
