"""Ways in which one tenant might have got at another's adapters, names, runs and prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.runs.folders import open_runs
from jobs.submission.commands import Place, Submission, Work
from loray.bases.registry import BaseModel
from loray.errors import SpecError
from loray.recipes.load import Recipe, load_recipe
from loray.settings import Settings
from loray.spec import qualified_name
from tests.serve_apps.isolation.site import SECRET, Site, site
from tests.serve_apps.isolation.table import Thing

OWN = Thing("beta", "loot", "prod", SECRET.digest)


@pytest.fixture
def made(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> Iterator[Site]:
    with site(tiny_base(), tmp_path) as made:
        yield made


def test_a_digest_that_was_seen_somewhere_is_not_registered(made: Site, tmp_path: Path) -> None:
    stored = made.fakes.store(1, tmp_path)  # its bytes are in the store
    for digest in (SECRET.digest, stored, "e" * 64):
        answer = made.api.ask("POST /adapters/{name}/versions", OWN._replace(digest=digest), made.keys["beta"])
        assert answer.status_code == 404
        assert answer.json()["detail"] == f"the store has no adapter with digest {digest[:12]}"
    assert not [e for e in made.catalog.snapshot().models() if e.tenant == "beta"]
    answer = made.api.ask("POST /adapters/{name}/versions", OWN._replace(digest=stored), made.keys["admin"])
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == "/api/v1/adapters/loot/versions/1?tenant=beta"


def test_only_who_may_promote_sets_aliases_by_registering(made: Site, tmp_path: Path) -> None:
    stored = made.fakes.store(1, tmp_path)
    made.catalog.adapters.record_upload(stored)  # for the default tenant
    path, headers = "adapters/tone/versions", {"Authorization": f"Bearer {made.keys['publisher']}"}
    refused = made.api.client.post(path, json={"digest": stored, "aliases": ["prod"]}, headers=headers)
    assert (refused.status_code, "promote" in refused.text) == (403, True)
    assert tuple(made.catalog.snapshot().models())[-1].name == SECRET.model


def test_no_adapter_takes_the_name_of_a_base_of_this_machine(
    tiny_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = tiny_base()
    (tmp_path / "bases").symlink_to(base.path.parent)
    with site(base, tmp_path) as made:
        for key in ("beta", "admin"):
            answer = made.api.client.post(
                f"adapters/{base.name}/versions",
                json={"digest": "e" * 64},
                headers={"Authorization": f"Bearer {made.keys[key]}"},
            )
            assert answer.status_code in (404, 409), answer.text
        assert base.name in made.catalog.bases.fingerprints()


@pytest.mark.parametrize("spelled", ["acme/vault-9", "BASE:acme/vault-9", "acme/vault-9@hush", "default/acme/vault-9"])
def test_no_spelling_of_a_name_reaches_another_tenant(made: Site, spelled: str) -> None:
    (base,) = made.catalog.bases.fingerprints()
    body = {"model": spelled.replace("BASE", base), "prompt": "hi", "max_tokens": 1}
    for key, status in (("beta", 404), ("acme infer", 200 if "default" not in spelled else 404)):
        answer = made.gateway.client.post(
            "/v1/completions", json=body, headers={"Authorization": f"Bearer {made.keys[key]}"}
        )
        assert answer.status_code == status, (key, answer.text)


@pytest.mark.parametrize("params", [{"format": "merged"}, {"format": "gguf"}, {"presigned": "true"}])
def test_no_form_of_a_download_is_anothers(made: Site, params: dict[str, str]) -> None:
    headers = {"Authorization": f"Bearer {made.keys['beta']}"}
    told = []
    for name in (SECRET.name, "nope-7"):
        path = f"adapters/{name}/versions/1/download"
        answer = made.api.client.get(path, params=params | {"tenant": "acme"}, headers=headers)
        told.append((answer.status_code, answer.text.replace(name, "NAME")))
    assert told[0] == told[1]
    assert told[0][0] == 404


def test_a_shared_adapter_is_asked_and_not_changed(made: Site) -> None:
    publish, beta = made.keys["acme publish"], made.keys["beta"]
    shared = made.api.client.patch(
        f"adapters/{SECRET.name}",
        json={"visibility": "shared", "shared_with": ["beta"]},
        headers={"Authorization": f"Bearer {publish}"},
    )
    assert shared.json()["shared_with"] == ["beta"]
    made.gateway.client.portal.call(made.gateway.app.state.gateway.directory.follower.refresh)  # type: ignore[union-attr]
    assert made.gateway.ask("POST /v1/completions", SECRET, beta).status_code == 200
    seen = made.api.ask("GET /adapters/{name}", SECRET, beta).json()
    assert (seen["name"], seen["tenant"], seen["shared_with"]) == (SECRET.model, "acme", [])
    placed = made.api.ask("GET /adapters/{name}/placement", SECRET, beta).json()["items"]
    assert [(p["tier"], p["uses"], p["last_used_at"]) for p in placed] == [("pool", None, None)]
    for route in made.api.table:
        if "/adapters/" in route and not route.startswith("GET"):
            status = made.api.ask(route, SECRET, beta).status_code
            assert status == (404 if "restore" in route else 403), route
    assert made.gateway.ask("POST /v1/unload_lora_adapter", SECRET, beta).status_code == 403
    (mine, theirs) = (r.cache_salt for r in _asked_by(made, made.keys["acme infer"], beta))
    assert mine != theirs


def test_a_key_lists_the_models_that_it_is_for(made: Site) -> None:
    key = made.keys["narrow"]
    assert made.gateway.ask("GET /v1/models", SECRET, key).json()["data"] == []
    assert made.gateway.ask("POST /v1/completions", SECRET, key).status_code == 403


def test_a_run_is_continued_by_its_tenant_alone(tmp_path: Path) -> None:
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path)})
    runs, recipe = open_runs(settings), load_recipe("lora_smollm2").spec
    first = runs.new(qualified_name("acme", "tone"), "job-1")
    runs.new("tone", "job-2")
    assert runs.latest("acme/tone").path == first.path
    for name in ("beta/tone", "acme"):
        with pytest.raises(SpecError, match="there is no run"):
            runs.latest(name)
    data = recipe.data.model_copy(update={"train": "s3://bucket/data.jsonl", "eval": None})
    asked = Recipe(recipe.model_copy(update={"data": data}), None, tmp_path)
    work = Work.training(asked, resume=True, tenant="acme")
    submission = Submission.of(work, Place.of_server(settings, tmp_path))
    assert " - --resume --tenant acme " in submission.entrypoint


def _asked_by(made: Site, *keys: str) -> Iterator[object]:
    for key in keys:
        assert made.gateway.ask("POST /v1/completions", SECRET, key).status_code == 200
        yield made.engines.requests[-1]
