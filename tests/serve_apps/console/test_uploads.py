"""The upload of a folder that PEFT saved: files one by one, a name, and errors in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from loray.bases.registry import BaseModel
from tests.serve_apps.console.site import ROOT, URL, ConsoleSite


@pytest.fixture
def base(console: ConsoleSite, tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return console.add_base(tiny_base())


@pytest.fixture
def folder(base: BaseModel, peft_folder: Callable[..., Path]) -> Path:
    return peft_folder(base)


def begin(console: ConsoleSite, folder: Path) -> str:
    begun = console.post("/uploads")
    assert begun.status_code == 201
    id: str = begun.json()["id"]
    for path in folder.iterdir():
        sent = console.send("PUT", f"/uploads/{id}/files/{path.name}", path.read_bytes())
        assert sent.status_code == 204, sent.text
    return id


def published(console: ConsoleSite, id: str, **fields: object) -> httpx.Response:
    return console.post(f"/uploads/{id}/publish", fields)


def test_an_upload_becomes_a_version(console: ConsoleSite, base: BaseModel, folder: Path) -> None:
    page = console.get("/uploads").text
    for shown in (f'<option value="{base.name}">', "adapter_model.safetensors", 'name="aliases"', "webkitdirectory"):
        assert shown in page, shown
    id = begin(console, folder)
    answer = published(console, id, name="new", aliases="prod, canary", base=base.name, licence="MIT", description="")
    assert answer.headers["hx-redirect"] == f"{ROOT}/adapters/new?tenant=default&done=published"
    version = console.catalog.adapters.version("new", 1)
    assert (version.aliases, version.manifest.licence) == (("canary", "prod"), "MIT")
    assert "The upload is published" in console.get("/adapters/new", done="published").text


def test_what_is_wrong_is_said_in_words(console: ConsoleSite, base: BaseModel, folder: Path) -> None:
    id = begin(console, folder)
    for fields, said in (
        ({"name": ""}, "the name"),
        ({"name": "a b"}, "the name"),
        ({"name": "new", "aliases": "9"}, "aliases"),
        ({"name": base.name, "base": base.name}, "base"),
        ({"name": "new", "base": "nothing"}, "nothing"),
    ):
        answer = published(console, id, **fields)
        assert 400 <= answer.status_code < 500, fields
        assert said in answer.text, fields
        assert "<main" not in answer.text
    pickled = console.send("PUT", f"/uploads/{id}/files/adapter_model.bin", b"x")
    assert (pickled.status_code, "pickles are never read" in pickled.text) == (422, True)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 5}))
    console.send("PUT", f"/uploads/{id}/files/{config.name}", config.read_bytes())
    assert published(console, id, name="new", base=base.name).status_code == 422
    too_long = console.send("PUT", f"/uploads/{id}/files/LICENSE", b" " * (2 << 20))
    assert (too_long.status_code, "at most" in too_long.text, "<main" in too_long.text) == (413, True, False)
    assert console.send("DELETE", f"/uploads/{id}", b"").status_code == 204
    gone = published(console, id, name="new")
    assert (gone.status_code, "begin one" in gone.text) == (404, True)


def test_who_may_upload(console: ConsoleSite, base: BaseModel, folder: Path) -> None:
    key = console.key("infer", "publish", tenant="acme")
    console.log_in(key)
    assert 'name="aliases"' not in console.get("/uploads").text
    assert console.http.post(f"{URL}/uploads").status_code == 403  # without the page's token
    id = begin(console, folder)
    assert published(console, id, name="new", aliases="prod", base=base.name).status_code == 403
    answer = published(console, id, name="new", base=base.name)
    assert answer.status_code == 204, answer.text
    assert console.catalog.adapters.version("acme/new", 1).aliases == ()
    console.log_in(console.key("infer"))
    assert console.get("/uploads").status_code == 403
    assert "/uploads" not in console.get("/adapters").text
    console.log_in(console.key("publish"))
    assert published(console, id, name="mine").status_code == 404
