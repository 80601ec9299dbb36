"""The pages /docs run scripts that came with loray, and none of another host's."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

from tests.conftest import REPOSITORY
from tests.fixtures.access import Site

FOLDER = REPOSITORY / "serve_apps" / "access" / "swagger"


def test_pages_load_nothing_from_another_host(site_of: Callable[..., Site]) -> None:
    site = site_of()
    for client, prefix in ((site.gateway, ""), (site.api, "/api/v1")):
        page = client.get(f"http://testserver{prefix}/docs")
        assert page.headers["content-security-policy"].startswith("default-src 'self'; ")
        assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son[a-z]+=", page.text)
        loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert len(loaded) == 3
        for address in loaded:
            assert re.fullmatch(r"docs/static/[a-z.-]+", address)
            assert client.get(f"http://testserver{prefix}/{address}").status_code == 200
        assert client.get(f"http://testserver{prefix}/redoc").status_code == 404
        assert client.get(f"http://testserver{prefix}/docs/static/..%2freference.py").status_code == 404


def test_the_files_are_those_of_the_list() -> None:
    lines = re.findall(r"^    (\S+)  (\S+)$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert {name: sha256 for sha256, name in lines} == {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in FOLDER.glob("swagger-ui*")
    }
