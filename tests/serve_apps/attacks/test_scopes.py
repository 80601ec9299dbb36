"""What a key gets of an adapter, by its scope, its models, and whose the adapter is: from the API and the console."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from loray.bases.registry import BaseModel
from loray.spec import Visibility
from tests.fixtures.versions import BASE
from tests.serve_apps.isolation.site import SCOPES, SECRET, Site, site
from tests.serve_apps.isolation.table import API, MAKERS, OPEN, Thing

UNKNOWN = Thing()
ABOUT_AN_ADAPTER = sorted(name for name in API if "/adapters/{name}" in name)
ABOUT_A_VERSION = [n for n in ABOUT_AN_ADAPTER if n.startswith("GET") and ("/versions" in n or "diff" in n)]
HOW_IT_WAS_MADE = ("zq-data", SECRET.job)


@pytest.fixture(scope="module")
def made(tiny_base: Callable[..., BaseModel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tiny_base(), tmp_path_factory.mktemp("home")) as made:
        yield made


@pytest.mark.parametrize("scope", SCOPES)
def test_a_key_for_asking_downloads_no_weights(made: Site, scope: str) -> None:
    version = "/adapters/{name}/versions/{version}/download"
    for name in (f"GET {version}", f"GET /console{version}"):
        status = made.api.ask(name, SECRET, made.keys[f"acme {scope}"]).status_code
        assert (status == 403) == (scope not in MAKERS), (name, status)
    page = made.api.ask("GET /console/adapters/{name}/versions/{version}", SECRET, made.keys[f"acme {scope}"])
    assert ("/download" in page.text) == (scope in MAKERS)
    for form in ("merged", "gguf"):
        path = f"adapters/{SECRET.name}/versions/1/download"
        headers = {"Authorization": f"Bearer {made.keys['acme infer']}"}
        assert made.api.client.get(path, params={"format": form}, headers=headers).status_code == 403


@pytest.mark.parametrize("name", ABOUT_AN_ADAPTER)
def test_adapters_that_a_key_is_not_for_do_not_exist(made: Site, name: str) -> None:
    before = made.catalog.snapshot()
    secret, unknown = (made.api.ask(name, thing, made.keys["narrow"]) for thing in (SECRET, UNKNOWN))
    assert (secret.status_code == 403) == (unknown.status_code == 403)
    assert secret.status_code >= 400
    assert SECRET.hidden_in(secret.text) == UNKNOWN.hidden_in(unknown.text)
    assert made.catalog.snapshot() == before


def test_lists_have_only_the_adapters_that_a_key_is_for(made: Site) -> None:
    for name in ("GET /adapters", "GET /console/adapters"):
        assert SECRET.name in made.api.ask(name, SECRET, made.keys["acme publish"]).text
        assert SECRET.name not in made.api.ask(name, SECRET._replace(name="x"), made.keys["narrow"]).text


@pytest.mark.parametrize(("owner", "visibility"), [("acme", "private"), ("beta", "shared"), ("beta", "public")])
@pytest.mark.parametrize("scope", SCOPES)
def test_how_it_was_made_is_told_to_those_of_its_tenant_who_may_make_others(
    made: Site, owner: str, visibility: Visibility, scope: str
) -> None:
    made.catalog.adapters.share(SECRET.model, visibility, ["beta"] if visibility == "shared" else [])
    told = set()
    for name in ABOUT_A_VERSION:
        answer = made.api.ask(name, SECRET, made.keys[f"{owner} {scope}"])
        allowed = made.api.table[name].scopes
        assert allowed != OPEN
        assert (answer.status_code == 403) == (scope not in allowed), name
        told |= {word for word in HOW_IT_WAS_MADE if word in answer.text}
    assert bool(told) == (owner == "acme" and scope in MAKERS)


def test_a_key_registers_no_version_of_what_it_is_not_for(made: Site, tmp_path_factory: pytest.TempPathFactory) -> None:
    made.catalog.bases.add("smollm2", BASE)
    stored = made.fakes.store(7, tmp_path_factory.mktemp("store"))
    made.catalog.view(made.catalog.principal.model_copy(update={"tenant": "acme"})).adapters.record_upload(stored)
    for name, status in ((SECRET.name, 403), ("new", 403), ("other", 201)):
        answer = made.api.ask("POST /adapters/{name}/versions", Thing("acme", name, digest=stored), made.keys["narrow"])
        assert answer.status_code == status, answer.text
