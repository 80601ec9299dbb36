"""A page in Chromium that is watched: errors in its console, and requests to other hosts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENS = os.environ.get("LORAY_TEST_SCREENSHOTS")  # a folder for pictures of all pages
WIDTHS = {"wide": (1440, 900), "phone": (390, 844)}

MARKS = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")]


@dataclass
class Seen:
    """`page` is playwright's. `problems`: errors of its console, and requests elsewhere."""

    page: Any
    url: str
    problems: list[str] = field(default_factory=list)

    def open(self, path: str) -> None:
        self.page.goto(self.url + path)
        self.page.wait_for_load_state("networkidle")

    def picture(self, name: str) -> None:
        if SCREENS is not None:
            for width, (x, y) in WIDTHS.items():
                self.page.set_viewport_size({"width": x, "height": y})
                self.page.screenshot(path=f"{SCREENS}/{name}-{width}.png", full_page=True)
            self.page.set_viewport_size({"width": 1440, "height": 900})


@contextmanager
def watched(server: str, path: str) -> Iterator[Seen]:
    """A page of the console, which is at `path` of `server`. Skips the test where there is no playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'loray[browser]'")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        seen = Seen(page, server + path)
        page.on("console", lambda message: seen.problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: seen.problems.append(str(error)))
        page.on("request", lambda r: seen.problems.append(r.url) if not r.url.startswith((server, "data:")) else None)
        page.on("dialog", lambda dialog: dialog.accept())
        yield seen
        browser.close()
