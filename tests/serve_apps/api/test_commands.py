"""Commands of administrators and tenants at a server, with neither database nor store of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs.submission.command import jobs as jobs_command
from jobs.submission.tracker import id_of
from loray.bases.registry import BaseModel
from loray.cli import eval_tasks
from loray.client import CatalogClient
from loray.schemas.resources import RECIPE_EXAMPLE as RECIPE
from loray.settings import Settings
from loray.spec import Evaluation
from tests.cli.run import Loray
from tests.fixtures.api import Api
from tests.fixtures.figures import RESULTS, event
from tests.fixtures.versions import BASE, digest, manifest, publish


def test_an_administrators_day(loray: Loray, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    admin = loray("keys", "create", "root", "--scope", "admin").out.strip()
    assert "Authorization: Bearer" in loray("keys", "ls").err
    monkeypatch.setenv("LORAY_API_KEY", admin)
    assert loray("tenants", "create", "acme", "--jobs", 3).code == 0
    assert loray("tenants", "set", "acme", "--rpm", 60, "--jobs", "none").out == "acme: 60 requests/min\n"
    assert "60 requests/min" in loray("tenants", "ls").out
    key = json.loads(loray("keys", "create", "ci", "--tenant", "acme", "--tpm", 9, "--model", "tone", "--json").out)
    changed = loray(
        *("keys", "update", "ci", "--alias", "nightly", "--model", "all", "--expires", "1d", "--rpm", 5),
        *("--tpm", "none", "--metadata", "team=support", "--json"),
    )
    now = json.loads(changed.out)
    right = {"id": key["id"], "key_alias": "nightly", "models": None, "rpm_limit": 5, "tpm_limit": None}
    assert {name: now[name] for name in right} == right
    assert now["metadata"] == {"team": "support"}
    assert now["expires"] is not None
    assert loray("keys", "update", "nightly", "--expires", "never").out == f"{key['id']} (nightly) is changed\n"
    assert api.catalog.keys.get(key["id"]).expires_at is None
    assert loray("keys", "update", "nightly").code == 2
    assert loray("keys", "update", "nightly", "--rpm", "many").code == 2
    assert "KEY=VALUE" in loray("keys", "update", "nightly", "--metadata", "x").err
    assert loray("keys", "block", "nightly").out.endswith("is blocked\n")
    assert loray("keys", "block", "nightly", "--off").code == 0
    assert json.loads(loray("keys", "rotate", "nightly", "--grace", "1h", "--json").out)["id"] == f"{key['id']}_2"
    assert loray("keys", "revoke", key["id"], "--only-this").code == 0
    assert [k["key_alias"] for k in json.loads(loray("keys", "ls", "--tenant", "acme", "--json").out)] == ["nightly"]
    monkeypatch.setenv("LORAY_API_KEY", key["key"])
    refused = loray("tenants", "ls")
    assert (refused.code, refused.out) == (1, "")


def test_tags_and_owners(loray: Loray, api: Api) -> None:
    publish(api.catalog, "tone", 1)
    assert loray("adapters", "tag", "tone").out == "tone has no tags\n"
    assert loray("adapters", "tag", "tone", "team=support", "stage=").code == 0
    assert json.loads(loray("adapters", "tag", "tone", "--unset", "stage", "--json").out) == {"team": "support"}
    assert "team" in loray("adapters", "tag", "tone").out
    assert "as gold=VALUE" in loray("adapters", "tag", "tone", "gold").err
    assert "no tag 'gold'" in loray("adapters", "tag", "tone", "--unset", "gold").err
    assert [row["name"] for row in json.loads(loray("adapters", "search", "--tag", "team", "--json").out)] == ["tone"]
    assert loray("tenants", "create", "acme").code == 0
    assert loray("adapters", "share", "tone", "--with", "acme").out == "tone is seen by default acme\n"
    assert json.loads(loray("adapters", "share", "tone", "--public", "--json").out)["visibility"] == "public"
    assert loray("adapters", "transfer", "tone", "--to", "acme", "--yes").out == "tone is acme/tone now\n"
    back = loray("adapters", "transfer", "acme/tone", "--to", "default", "--name", "mood", "--yes", "--json")
    again = json.loads(back.out)
    assert (again["name"], again["tenant"], again["base"]) == ("mood", "default", BASE[:12])
    publish(api.catalog, "acme/mood", 2)
    assert "is an adapter already" in loray("adapters", "transfer", "mood", "--to", "acme", "--yes").err


def test_adapters_and_usage_are_shown_as_by_the_catalog_itself(
    loray: Loray, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now(UTC)
    api.catalog.tenants.create("acme")
    publish(api.catalog, "acme/tone", 1, 2, aliases=("prod",))
    loss = Evaluation(metric="loss", value=1.5, subject="adapter", dataset="later")
    api.catalog.evaluations.record(digest(1), [loss])
    api.catalog.quarantine.report_death(digest(1), "r1", now, lambda deaths: timedelta(hours=1))
    api.catalog.usage.record([event(1, created_at=now), event(2, created_at=now, tenant="other", model="acme/tone")])
    asked: list[tuple[object, ...]] = [
        ("adapters", "show", "acme/tone@1"),
        ("adapters", "show", "acme/tone"),
        ("adapters", "show", "acme/tone@prod"),
        ("usage",),
        ("usage", "--by", "model", "--by", "day", "--tenant", "other", "--model", "acme/tone"),
        ("usage", "--key", "nobody", "--days", 1),
    ]
    wrong = [loray("adapters", "show", model).err for model in ("acme/tone@9", "acme/tone@canary", "acme/tnoe")]
    remote = [(loray(*args).out, json.loads(loray(*args, "--json").out)) for args in asked]
    monkeypatch.delenv("LORAY_URL")
    monkeypatch.setenv("LORAY_CATALOG", api.settings.catalog)
    local = [(loray(*args).out, json.loads(loray(*args, "--json").out)) for args in asked]
    assert [[move["version"] for move in told.pop("alias_moves")] for _, told in local[:3]] == [[1, 2]] * 3
    for (shown, told), (here, stored) in zip(remote, local, strict=True):
        assert told == stored
        assert here.startswith(shown)  # what follows is how aliases moved
    assert (remote[0][1]["label"], len(remote[0][1]["evaluations"])) == ("acme/tone@1", 1)
    for error, part in zip(wrong, ("has no version 9; it has 1 to 2", "has no alias 'canary'", "tnoe"), strict=True):
        assert part in error


def test_jobs(api: Api, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "nothing-here"))
    monkeypatch.setenv("LORAY_URL", url)
    call = CliRunner()
    assert "loray train" in call.invoke(jobs_command, ["ls"]).output
    with CatalogClient(url) as client:
        nightly = client.submit(RECIPE, id="nightly")
        client.submit(RECIPE | {"name": "mood"})
    assert nightly.id == id_of("default", "nightly")
    listed = call.invoke(jobs_command, ["ls", "--limit", "1"]).output
    assert "mood" in listed
    assert "there are more" in listed
    (only,) = json.loads(call.invoke(jobs_command, ["ls", "--name", "tone", "--json"]).output)
    assert (only["id"], only["status"]) == (nightly.id, "pending")
    assert call.invoke(jobs_command, ["logs", "nightly"]).output == f"log of {nightly.id}\n"
    assert call.invoke(jobs_command, ["logs", "nightly", "--follow"]).output == "a\nb\nc\n"
    assert "is asked to stop" in call.invoke(jobs_command, ["stop", "nightly"]).output
    assert api.jobs.stopped == [nightly.id]
    api.jobs.say(nightly.id, "STOPPED")
    assert call.invoke(jobs_command, ["stop", nightly.id]).output == f"{nightly.id} is stopped\n"


def test_figures_of_tasks_are_reported_to_the_server(
    loray: Loray, api: Api, base: BaseModel, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = manifest(1).model_copy(update={"base": base.name, "base_fingerprint": base.fingerprint})
    api.catalog.adapters.register("tone", digest(1), described, ["prod"])
    asked: list[str] = []

    def run(settings: Settings, model: Mapping[str, Any], tasks: object, options: object, folder: Path) -> None:
        asked.extend((model["model"], model["base_url"]))
        (folder / "results_1.json").write_text(json.dumps(RESULTS))

    monkeypatch.setenv("LORAY_HOME", str(api.settings.home))  # with the base's tokenizer; the catalog is not there
    monkeypatch.setattr(eval_tasks, "find_spec", lambda name: True)
    monkeypatch.setattr(eval_tasks, "_run", run)
    told = loray("eval", "tasks", "tone@prod", "letters", "sums", "--json")
    assert told.code == 0, told.err
    assert json.loads(told.out)["digest"] == digest(1)
    assert asked == ["tone@1", f"{url}/v1/completions"]
    found = [(e.metric, e.value, e.measured_by) for e in api.catalog.adapters.version("tone", 1).evaluations]
    assert found == [("acc", 0.5, "key"), ("acc_norm", 0.25, "key"), ("exact_match/strict-match", 0.75, "key")]
    shown = loray("adapters", "show", "tone")
    assert "MEASURED BY" in shown.out


def test_a_data_scientists_day(
    loray: Loray, api: Api, tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = api.add_base(tiny_base())
    assert "no adapters yet" in loray("adapters", "ls").out
    for seed in (0, 1):
        pushed = loray("adapters", "push", peft_folder(base, seed=seed), "--name", "tone", "--base", base.name)
        assert pushed == (0, f"published tone@{seed + 1}\n", "")
    assert loray("adapters", "promote", "tone@1").out == "tone@prod is version 1 now\n"
    assert loray("adapters", "promote", "tone", "--expected", "2").code == 1
    assert loray("adapters", "promote", "tone", "--expected", "1").out == "tone@prod is version 2 now\n"
    assert loray("adapters", "rollback", "tone").out == "tone@prod is version 1 again\n"
    (row,) = json.loads(loray("adapters", "ls", "--json").out)
    assert (row["name"], row["version"], row["aliases"]) == ("tone", 1, {"prod": 1})
    assert "prod→1" in loray("adapters", "ls").out
    got = tmp_path / "got"
    assert loray("adapters", "pull", "tone@prod", got).out == f"downloaded tone@1 to {got}\n"
    assert (got / "adapter_model.safetensors").is_file()
    assert loray("adapters", "push", got, "--name", "copy", "--json").code == 0
    assert loray("adapters", "push", got, "--name", "copy").out == "published copy@1\n"
    assert loray("adapters", "rm", "tone@1", "--yes").code == 1
    assert loray("adapters", "rm", "tone@2", "--yes").code == 0
    assert loray("adapters", "restore", "tone@2").out == "restored tone@2\n"
    assert loray("adapters", "rm", "tone", "--yes").code == 0
    assert [row["name"] for row in json.loads(loray("adapters", "ls", "--json").out)] == ["copy"]


def test_without_a_server(loray: Loray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = loray("adapters", "push", tmp_path / "missing", "--name", "tone")
    assert (refused.code, "is not a folder" in refused.err) == (1, True)
    monkeypatch.setenv("LORAY_URL", "localhost:8000")
    assert "must begin with http://" in loray("adapters", "ls").err
    monkeypatch.delenv("LORAY_URL")
    assert "set LORAY_URL" in loray("adapters", "push", tmp_path, "--name", "tone").err
