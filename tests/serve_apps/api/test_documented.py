"""What README and docs/ ask the catalog's API with curl are routes that it has."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from starlette.routing import Match

from tests.cli.documented import blocks
from tests.conftest import REPOSITORY
from tests.fixtures.api import Api

_PATH = re.compile(r"/api/v1(/[^?\s]*)")


def test_every_route_that_is_asked_is_there(api: Api) -> None:
    found = set(asked())
    assert len(found) > 5
    assert not [request for request in found if not is_known(api, *request)]
    assert not is_known(api, "GET", "/adapters/tone/nothing")


def is_known(api: Api, method: str, path: str) -> bool:
    scope = {"type": "http", "method": method, "path": path}
    return any(route.matches(scope)[0] is Match.FULL for route in api.unmounted.routes)


def asked() -> Iterator[tuple[str, str]]:
    """Method and path of each request, without /api/v1."""
    for page in (REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")):
        for block in blocks(page.read_text(encoding="utf-8")):
            for line in block.text.replace("\\\n", " ").splitlines():
                _, curl, after = line.partition("curl ")
                path = _PATH.search(after)
                if curl and path and block.language != "text":
                    named = path[1].strip("\"'")
                    yield _method(after), f"{named}file" if named.endswith("/") else named  # curl adds the file's name


def _method(after: str) -> str:
    words = shlex.split(after.partition("  #")[0].rstrip(")"), posix=True)
    if "-X" in words:
        return words[words.index("-X") + 1]
    return "PUT" if "-T" in words else "POST" if {"-d", "--data", "--data-binary"} & set(words) else "GET"
