"""The memory of the API's container: small files that ask for much of it, and conversions of large bases."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loray.bases.registry import BaseModel
from loray.publishing import Destination, import_folder
from loray.scratch import Budget
from serve_apps.api.conversions import Conversions
from tests.catalogs import sqlite_catalog
from tests.serve_apps.api.conftest import base as base
from tests.serve_apps.api.fakes import Api

LITTLE = Budget((1 << 30) - 1, "in this server's memory")


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = Api(tmp_path / "home", sqlite_catalog(tmp_path))
    yield api
    api.close()


def test_a_vera_folder_of_a_high_rank_is_refused_before_its_pair_is_drawn(
    api: Api, base: BaseModel, peft_folder: Callable[..., Path]
) -> None:
    folder = peft_folder(base, "vera")
    upload = send(api, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    api.services.memory = Budget(1 << 20, "in this server's memory")
    refused = api.http.post("/adapters/tone/versions", json={"upload": upload, "base": base.name})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
    assert "do not fit in this server's memory" in refused.json()["detail"]
    assert api.http.get("/adapters").status_code == 200
    api.services.memory = Budget(8 << 30, "in this server's memory")
    assert api.http.post("/adapters/tone/versions", json={"upload": upload, "base": base.name}).status_code == 201
    assert (api.services.memory.held(), config["r"]) == (0, 16)


def test_a_folder_that_is_read_in_parts_needs_none(api: Api, base: BaseModel, peft_folder: Callable[..., Path]) -> None:
    upload = send(api, peft_folder(base))
    api.services.memory = Budget(0, "in this server's memory")
    assert api.http.post("/adapters/tone/versions", json={"upload": upload, "base": base.name}).status_code == 201


@pytest.mark.parametrize("form", ["merged", "gguf"])
def test_where_less_than_a_gibibyte_is_left_nothing_is_converted(
    api: Api, base: BaseModel, peft_folder: Callable[..., Path], form: str
) -> None:
    import_folder(peft_folder(base), base, Destination("tone", api.services.store, api.catalog))
    api.services.conversions = Conversions(api.settings, LITTLE)
    refused = api.http.get("/adapters/tone/versions/1/download", params={"format": form})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
    assert "1,073,741,824 bytes do not fit in this server's memory" in refused.json()["detail"]


def test_a_conversion_takes_no_more_than_its_part(
    api: Api, base: BaseModel, peft_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three GiB two conversions get a half each, so that both end and the server does not."""
    asked: list[int] = []
    monkeypatch.setattr(
        "serve_apps.api.conversions.command_of",
        lambda form, ref, target, max_bytes: asked.append(max_bytes) or ["false"],  # type: ignore[func-returns-value]
    )
    import_folder(peft_folder(base), base, Destination("tone", api.services.store, api.catalog))
    for max_bytes in (3 << 30, 64 << 30):
        api.services.conversions = Conversions(api.settings, Budget(max_bytes, "in this server's memory"))
        api.http.get("/adapters/tone/versions/1/download", params={"format": "gguf"})
    assert asked == [3 << 29, 8 << 30]


def send(api: Api, folder: Path) -> str:
    upload: str = api.http.post("/uploads").json()["id"]
    for file in folder.iterdir():
        assert api.http.put(f"/uploads/{upload}/files/{file.name}", content=file.read_bytes()).status_code == 200
    return upload
