"""The catalog's API does what its model does, whatever keys ask in whatever order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from loray.policy.auth import KeyRing
from loray.spec import Principal, RopeParameters
from tests.fixtures.api import Api
from tests.fixtures.catalogs import new_postgresql, sqlite_catalog
from tests.fixtures.keys import access_of
from tests.fixtures.openapi import examples
from tests.fixtures.postgres import Postgres
from tests.fixtures.versions import BASE as FINGERPRINT
from tests.serve_apps.api.machine.asking import ROOT
from tests.serve_apps.api.machine.machine import CatalogMachine
from tests.serve_apps.api.machine.model import BASE, Bytes, Model

METHODS = ("lora", "lora", "lora", "longlora")  # the gate refuses aliases to the last one


def api_at(home: Path, url: str) -> Api:
    ring = KeyRing(static={hashlib.sha256(ROOT.encode()).digest(): Principal(key_id="deployment")})
    return Api(home, url, access_of(url, host="0.0.0.0", ring=ring))


def check(folder: Path, new_url: Callable[[], str], *, num_runs: int, num_steps: int) -> None:
    """`new_url`: of a catalog without adapters."""
    first = api_at(folder / "home", new_url())
    rope = RopeParameters(rope_type="linear", rope_theta=1e5, factor=2)
    stored = {
        first.store(number, folder, method=method, rope_parameters=rope if method == "longlora" else None): Bytes(
            method, is_gated=method == "longlora"
        )
        for number, method in enumerate(METHODS)
    }
    first.close()

    def machine() -> CatalogMachine:
        api = api_at(folder / "home", new_url())
        api.catalog.bases.add(BASE, FINGERPRINT)
        return CatalogMachine(api, Model(stored))

    run_state_machine_as_test(machine, settings=settings(examples(num_runs), stateful_step_count=num_steps))


def test_random_requests(tmp_path: Path) -> None:
    numbers = count()
    check(tmp_path, lambda: sqlite_catalog(tmp_path / str(next(numbers))), num_runs=4, num_steps=100)


@pytest.mark.slow
def test_random_requests_on_postgresql(tmp_path: Path, postgres: Postgres) -> None:
    check(tmp_path, lambda: new_postgresql(postgres), num_runs=12, num_steps=100)
