"""Pages of other sites ask the gateway where the deployment allows their origin, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.errors import SettingsError
from loray.settings import Settings
from loray.spec import FleetSpec, Limits, ServeSpec
from serve_apps.auth import ANY
from serve_apps.gateway import app as gateway
from tests.fixtures.access import bearer
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.gateway import HELLO, ScriptedEngines
from tests.fixtures.keys import access_of

CHAT, OTHER = "https://chat.example", "https://evil.example"
ASKED = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,X-Stainless-OS,a b"}


@pytest.fixture
def home(tmp_path: Path, tiny_base: Callable[..., BaseModel]) -> Path:
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "tiny").symlink_to(tiny_base().path)
    return tmp_path


@contextmanager
def served(home: Path, origins: str = "", host: str = "0.0.0.0") -> Iterator[TestClient]:
    url = sqlite_catalog(home)
    settings = Settings.from_env({"LORAY_HOME": str(home), "LORAY_CATALOG": url, "LORAY_CORS_ORIGINS": origins})
    fleet = FleetSpec.of(ServeSpec(base="tiny"))
    engines = ScriptedEngines(HELLO)
    app = gateway.open_gateway(fleet, settings, lambda _: engines, access=access_of(url, host=host))
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def told(answer: object) -> dict[str, str]:
    """What an answer says to browsers."""
    return {k: v for k, v in answer.headers.items() if k.startswith("access-control")}  # type: ignore[attr-defined]


def test_none_are_allowed_by_default(home: Path) -> None:
    with served(home) as client:
        for path in ("/v1/chat/completions", "/tokenize", "/status"):
            answer = client.options(path, headers={"Origin": CHAT} | ASKED)
            assert (answer.status_code, told(answer)) == (204, {})
            assert "allow" in answer.headers
        assert told(client.get("/v1/models", headers={"Origin": CHAT})) == {}


def test_a_page_of_an_allowed_origin_asks(home: Path) -> None:
    with served(home, f"{CHAT}, http://localhost:3000") as client:
        asked = client.options("/v1/chat/completions", headers={"Origin": CHAT} | ASKED)
        assert (asked.status_code, asked.content) == (204, b"")
        assert told(asked) == {
            "access-control-allow-origin": CHAT,
            "access-control-allow-methods": "GET, POST, DELETE",
            "access-control-allow-headers": "authorization, x-stainless-os",
            "access-control-max-age": "600",
        }
        refused = client.get("/v1/models", headers={"Origin": CHAT})  # which the page may read
        assert (refused.status_code, told(refused)["access-control-allow-origin"]) == (401, CHAT)
        key = Catalog(sqlite_catalog(home)).keys.create("page", scopes=("infer",), limits=Limits(rpm_limit=10)).secret
        client.portal.call(client.app.state.gateway.directory.follower.refresh)  # type: ignore[union-attr, attr-defined]
        body = {"model": "tiny", "prompt": "a"}
        answer = client.post("/v1/completions", json=body, headers=bearer(key) | {"Origin": CHAT})
        assert answer.status_code == 200, answer.text
        shown = told(answer)
        exposed = shown.pop("access-control-expose-headers").split(", ")
        assert shown == {"access-control-allow-origin": CHAT}
        assert {"x-request-id", "x-ratelimit-remaining-requests"} <= set(exposed)
        assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/status", "/console/login", "/openapi.json"])
def test_other_origins_and_other_paths(home: Path, path: str) -> None:
    with served(home, CHAT) as client:
        origin = OTHER if path.startswith("/v1/") else CHAT
        assert told(client.options(path, headers={"Origin": origin} | ASKED)) == {}
        assert told(client.get(path, headers={"Origin": origin})) == {}


def test_all_origins_and_never_cookies(home: Path) -> None:
    with served(home, ANY) as client:
        answer = client.get("/v1/models", headers={"Origin": OTHER})
        assert told(answer)["access-control-allow-origin"] == "*"
        headers = {"Origin": OTHER} | ASKED | {"Access-Control-Request-Headers": ",".join(f"x-{i}" for i in range(99))}
        asked = told(client.options("/tokenize", headers=headers))
        assert len(asked["access-control-allow-headers"].split(", ")) == 32
        assert "access-control-allow-credentials" not in told(answer) | asked


def test_nothing_is_allowed_where_no_key_is_needed(home: Path) -> None:
    with served(home, ANY, host="127.0.0.1") as client:
        answer = client.get("/v1/models", headers={"Origin": OTHER})
        assert (answer.status_code, told(answer)) == (200, {})
        assert told(client.options("/v1/models", headers={"Origin": OTHER} | ASKED)) == {}


@pytest.mark.parametrize(
    "wrong", ["chat.example", "https://chat.example/", "https://Chat.example", "https://*.example"]
)
def test_what_is_no_origin(wrong: str) -> None:
    with pytest.raises(SettingsError, match="LORAY_CORS_ORIGINS has"):
        Settings.from_env({"LORAY_CORS_ORIGINS": wrong})
    assert "LORAY_CORS_ORIGINS" not in Settings.from_env({}).to_serving_env()
    given = Settings.from_env({"LORAY_CORS_ORIGINS": f"{CHAT},*"})
    assert Settings.from_env(given.to_serving_env()).origins == (CHAT, "*")
