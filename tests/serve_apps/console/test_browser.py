"""The console in Chromium: what can be done there, how soon pages are seen, and that they follow the load."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from jobs.submission.server import RayJob
from loray.bases.registry import BaseModel
from loray.catalog.database import open_database, writing
from loray.catalog.schema import adapters, versions
from loray.publishing import Destination, publish
from loray.recipes.load import load_recipe
from tests.fixtures.api import listening
from tests.fixtures.asking import answer_of
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.cluster import Served
from tests.serve_apps.console.browser import MARKS, WIDTHS, Seen, watched
from tests.serve_apps.console.site import PAGES, ROOT, ConsoleSite, lines, steps

pytestmark = MARKS


@pytest.fixture
def server(console: ConsoleSite) -> Iterator[str]:
    with listening(console.app) as server:
        yield server


@pytest.fixture
def seen(server: str) -> Iterator[Seen]:
    with watched(server, ROOT) as seen:
        yield seen


def test_a_visit(console: ConsoleSite, seen: Seen) -> None:
    page, key = seen.page, console.key("admin")
    seen.open("/login")
    seen.picture("login")
    page.fill("#key", "sk-lr-" + "A" * 43)
    page.click("text=Log in >> nth=-1")
    page.wait_for_selector("text=the API key is not valid")
    seen.problems.clear()  # the browser names the 401
    page.fill("#key", key)
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Healthy")
    seen.picture("overview")
    page.click("nav >> text=Adapters")
    page.fill("#search", "ton")
    page.keyboard.press("Enter")
    page.wait_for_url("**search=ton**")
    seen.picture("adapters")
    page.click("td >> text=tone")
    page.wait_for_selector("#lineage")
    seen.picture("adapter")
    page.select_option("#version", "2")
    page.click("button:text-is('Promote')")
    page.wait_for_url("**done=promoted")
    assert console.catalog.aliases.get("tone", "prod").version == 2
    page.click("button:text-is('Roll back')")
    page.wait_for_url("**done=rolled-back")
    assert console.catalog.aliases.get("tone", "prod").version == 1
    page.click("button:text-is('Compare')")
    page.wait_for_selector("text=+rank: 16")
    seen.picture("difference")
    visit_keys(console, seen)
    ask_the_playground(console, seen)
    for name in ("serving", "serving/replicas/r1", "usage", "jobs"):
        seen.open(f"/{name}")
        seen.picture(name.replace("/", "-"))
    show_a_job(console, seen)
    compare_runs(console, seen)
    seen.open("")
    page.click("#theme")
    seen.open("")
    seen.picture("dark")
    page.click("button:text-is('Log out')")
    page.wait_for_url("**/login")
    assert seen.problems == []


def visit_keys(console: ConsoleSite, seen: Seen) -> None:
    page = seen.page
    seen.open("/keys")
    page.fill("#key_alias", "ci")
    page.click("button:text-is('Make the key')")
    page.wait_for_selector("#made input")
    assert page.input_value("#made input").startswith("sk-lr-")
    seen.picture("keys")
    seen.open("/keys")
    page.click("[aria-label='Revoke ci']")
    page.wait_for_selector("td:has-text('revoked')")
    assert [key.alias for key in console.catalog.keys.page().items if key.revoked_at is not None] == ["ci"]


def ask_the_playground(console: ConsoleSite, seen: Seen) -> None:
    page = seen.page
    seen.open("/playground?model=smollm2&model=tone")
    page.fill("#prompt", "What's a good greeting?")
    page.click("button:text-is('Ask all')")
    page.wait_for_selector(".answer:nth-child(1) .figures-line:has-text('tokens')")
    page.wait_for_selector(".answer:nth-child(2) .figures-line:has-text('tokens')")
    assert page.locator(".said").all_inner_texts() == ["Good day", "Good day"]
    assert page.get_attribute(".token >> nth=0", "title") == '"Good " 90.5 %\n"Bad" 8.21 %'
    assert "adapter in the store when asked" in page.inner_text(".answer:nth-child(2) .figures-line")
    page.click(".tokens summary >> nth=0")
    assert page.locator(".answer:nth-child(1) tbody tr").count() == 2
    assert not page.is_visible(".thought")
    assert '"logprobs": True' in page.inner_text("#python")
    assert sorted(body["model"] for _, body in console.engines.asked) == ["smollm2", "tone"]
    seen.picture("playground")


def test_thoughts_are_apart_and_opened_by_the_keyboard(console: ConsoleSite, seen: Seen) -> None:
    console.engines.thought = ("I greet ", "back.")
    page = seen.page
    seen.open("/playground?model=smollm2")
    page.focus("#prompt")
    page.keyboard.type("Hello")
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # on "Ask all"
    page.wait_for_selector(".figures-line:has-text('tokens')")
    assert page.inner_text(".said") == "Good day"
    assert page.text_content(".thought-text") == "I greet back."
    assert not page.is_visible(".thought-text")  # it was, until the answer began
    page.focus(".thought summary")
    page.keyboard.press("Enter")
    assert page.is_visible(".thought-text")
    assert page.locator(".thought-text .token").count() == 2
    assert page.locator(".tokens tbody tr").count() == 4
    seen.picture("thought")
    assert seen.problems == []


def compare_runs(console: ConsoleSite, seen: Seen) -> None:
    console.train_some()
    seen.open("/jobs")
    seen.page.check("[aria-label='Compare train_1']")
    seen.page.check("[aria-label='Compare train_2']")
    seen.page.click("button:text-is('Compare')")
    seen.page.wait_for_selector(".curve canvas")
    seen.picture("compare")
    seen.open("/jobs/sweep_1")
    seen.page.wait_for_selector(".curve canvas")
    seen.picture("sweep")


def show_a_job(console: ConsoleSite, seen: Seen) -> None:
    recipe = load_recipe("lora_smollm2").spec
    console.catalog.jobs.add("train_9", name="tone", recipe=recipe)
    console.jobs.jobs["train_9"] = RayJob("RUNNING", "")
    console.jobs.logs = lambda _: "\n".join(map(json.dumps, steps(60, 2.0)))  # type: ignore[method-assign]
    seen.open("/jobs/train_9")
    seen.page.wait_for_selector(".curve canvas")
    seen.picture("job")


def test_axe_finds_nothing(console: ConsoleSite, seen: Seen) -> None:
    """Each page is loaded once, and looked at in both widths and both themes; none is wider than its window."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe()
    page, key = seen.page, console.key("admin")
    console.train_some()
    found: dict[str, list[object]] = {}

    def look(path: str) -> None:
        for width, (x, y) in WIDTHS.items():
            page.set_viewport_size({"width": x, "height": y})
            page.evaluate("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
            if (wide := page.evaluate("document.documentElement.scrollWidth")) > x:
                found.setdefault(f"{path}, {width}", []).append(f"{wide} wide")
            for scheme, rules in (("light", None), ("dark", ["color-contrast"])):
                page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
                options = {"resultTypes": ["violations"]} | ({"runOnly": rules} if rules else {})
                for violation in axe.run(page, options=options).response["violations"]:
                    nodes = [node["html"][:200] for node in violation["nodes"]]
                    found.setdefault(f"{path}, {width}, {scheme}", []).append((violation["id"], nodes))

    seen.open("/login")
    look("/login")
    page.fill("#key", key)
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Healthy")
    for path in PAGES:
        seen.open(path)
        look(path)
    console.engines.thought = ("I greet ", "back.")
    seen.open("/playground?model=smollm2")
    page.fill("#prompt", "Hello")
    page.click("button:text-is('Ask all')")
    page.wait_for_selector(".figures-line:has-text('tokens')")
    page.click(".thought summary")
    look("a thought")
    assert not found


def test_an_upload_by_drag_and_drop_and_by_a_field(
    console: ConsoleSite, seen: Seen, tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path]
) -> None:
    base = console.add_base(tiny_base())
    folder, page = peft_folder(base), seen.page
    files = [str(path) for path in folder.iterdir()]
    seen.open("/uploads")
    page.set_input_files("#files", files)
    page.wait_for_selector("#chosen li:has-text('adapter_model.safetensors')")
    seen.picture("upload")
    page.fill("#name", "dropped")
    page.click("button:text-is('Publish')")  # the folder names a path, which is no base of the server
    page.wait_for_selector("#message .alert-danger, h1:text-is('dropped')")
    seen.problems.clear()  # the browser names the 4xx
    seen.open("/uploads")
    drop = """async (files) => {
        const data = new DataTransfer();
        for (const [name, text] of files) {
            const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            data.items.add(new File([bytes], name));
        }
        document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
    }"""
    page.evaluate(drop, [[path.name, b64encode(path.read_bytes()).decode()] for path in folder.iterdir()])
    page.wait_for_selector("#chosen li:has-text('adapter_config.json')")
    page.fill("#name", "second")
    page.fill("#base", base.name)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.method) if "/uploads" in request.url else None)

    def lose_the_answer(route: Any) -> None:
        route.fetch()
        route.abort()

    page.route("**/publish", lose_the_answer, times=1)
    page.click("button:text-is('Publish')")
    page.wait_for_selector("#progress:has-text('continues this upload')")
    assert (sent.count("DELETE"), sent.count("PUT")) == (0, len(files))
    seen.problems.clear()  # the browser names the lost answer
    page.click("button:text-is('Publish')")
    page.wait_for_url("**/adapters/second**done=published")
    assert (sent.count("POST"), sent.count("PUT")) == (3, len(files))  # begun once, asked for twice
    assert len(console.catalog.adapters.versions("second", limit=9).items) == 1
    assert console.catalog.adapters.version("second", 1).manifest.method == "lora"
    assert seen.problems == []


def test_files_and_batches_by_the_keyboard_alone(console: ConsoleSite, seen: Seen) -> None:
    page, keyboard = seen.page, seen.page.keyboard
    seen.open("/files")
    page.set_input_files("#file", {"name": "rows.jsonl", "mimeType": "application/json", "buffer": b"{}\n"})
    page.focus("#file")
    for _ in ("the purpose", "the button"):
        keyboard.press("Tab")
    keyboard.press("Enter")
    page.wait_for_selector("td:text-is('rows.jsonl')")
    (file,) = console.catalog.files.page(purposes=["fine-tune"], limit=2).files
    seen.picture("files")
    page.focus(f"[aria-label='Train with {file.id}']")
    keyboard.press("Enter")
    page.wait_for_url(f"**/jobs/new?file={file.id}")
    assert page.input_value("[name='data.train']") == f"files://{file.id}"
    seen.open("/files")
    page.focus(f"[aria-label='Train with {file.id}']")
    keyboard.press("Tab")
    keyboard.press("Enter")
    page.wait_for_selector("text=No file was sent yet")
    console.begin_batch()
    seen.open("/batches")
    page.focus("td a")
    keyboard.press("Enter")
    page.wait_for_selector("text=the budget is used up")
    seen.picture("batch")
    page.focus("button:text-is('Cancel')")
    keyboard.press("Enter")
    page.wait_for_selector("text=cancelling")
    assert console.catalog.batches.get("batch-1").state == "cancelling"
    assert seen.problems == []


def test_a_recipe_is_planned_and_submitted(console: ConsoleSite, seen: Seen) -> None:
    page = seen.page
    seen.open("/jobs/new")
    page.wait_for_selector("text=name")
    page.fill("[name='name']", "new")
    page.fill("[name='data.train']", "s3://b/d.jsonl")
    page.wait_for_selector("dt:text-is('Memory of a worker')")
    seen.picture("new-job")
    page.click("button:text-is('Train')")
    page.wait_for_url("**/jobs/train_*")
    (job,) = console.catalog.jobs.page().items
    assert job.recipe.name == "new"
    losses = ({"event": "step", "step": n, "loss": 2.0 + 2.0 / (1 + n)} for n in range(1, 60))
    console.write("runs", job, {"events.jsonl": lines(losses)})
    page.wait_for_selector(".curve canvas", timeout=15000)  # without a reload
    seen.picture("job-live")
    console.catalog.jobs.end(job.id, "succeeded", version=3)
    page.wait_for_selector("text=published version 3", timeout=15000)
    assert page.locator("button:text-is('Stop')").count() == 0
    assert seen.problems == []


_NUM_ADAPTERS = 10_000
_FIRST_PAINT_S = 1.0
_SHIFT = 0.1  # cumulative layout shift: https://web.dev/articles/cls
_LIVE = ("", "/serving", "/serving/replicas/r1", "/jobs/train_1")
_OTHERS = ("/login", "/adapters", "/adapters/tone", "/jobs", "/playground", "/uploads", "/usage", "/keys")
_WATCH = """
    window.shifted = 0;
    new PerformanceObserver((list) => {
        for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifted += entry.value;
    }).observe({ type: "layout-shift", buffered: true });
"""
_PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[ConsoleSite]:
    site = ConsoleSite(tmp_path / "home", sqlite_catalog(tmp_path))
    site.catalog.adapters.register("first", "f1" * 32, site.catalog.adapters.version("tone", 1).manifest)
    engine = open_database(site.settings.catalog)
    with writing(engine) as c:
        adapter, version = (
            c.execute(sa.select(table).order_by(table.c.id.desc()).limit(1)).one()._mapping
            for table in (adapters, versions)
        )
        ids = range(adapter["id"] + 1, adapter["id"] + 1 + _NUM_ADAPTERS)
        c.execute(adapters.insert(), [dict(adapter) | {"id": n, "name": f"many-{n:06}"} for n in ids])
        c.execute(
            versions.insert(),
            [
                dict(version) | {"id": version["id"] + n - adapter["id"], "adapter_id": n, "digest": f"{n:064x}"}
                for n in ids
            ],
        )
    engine.dispose()
    site.train_some()
    yield site
    site.close()


def test_pages_are_seen_soon_and_stay_where_they_are(filled: ConsoleSite) -> None:
    key, slow, moved = filled.key("admin"), {}, {}
    with listening(filled.app) as server, watched(server, ROOT) as seen:
        page = seen.page
        page.add_init_script(_WATCH)
        seen.open("/login")
        page.fill("#key", key)
        page.keyboard.press("Enter")
        page.wait_for_selector("text=Healthy")
        assert len(filled.catalog.adapters.page(limit=_NUM_ADAPTERS)) == _NUM_ADAPTERS
        for path in (*_LIVE, *_OTHERS):
            seen.open(path)
            if path in _LIVE:
                with page.expect_response(lambda answer: answer.url.endswith("/live"), timeout=10_000):
                    pass
                page.wait_for_timeout(200)  # until what came is drawn
            painted = page.evaluate(_PAINTED)
            slow |= {path: painted} if painted is None or painted > 1000 * _FIRST_PAINT_S else {}
            shifted = page.evaluate("window.shifted")
            moved |= {path: shifted} if shifted > _SHIFT else {}
        assert not slow
        assert not moved
        assert seen.problems == []


_HELD = "tr:has(th:text-is('{}@1')) td.pool"


def test_the_table_of_adapters_follows_the_requests(served_alone: Served, peft_folder: Callable[..., Path]) -> None:
    base = served_alone.base
    for seed, name in enumerate(("asked-first", "asked-second")):
        publish(peft_folder(base, seed=seed), base, Destination(name, served_alone.store, served_alone.catalog))
    with watched(served_alone.url, ROOT) as seen:
        page = seen.page
        seen.open("/serving")
        page.evaluate("window.loadedOnce = true")
        assert page.locator("text=asked-first").count() == page.locator("text=asked-second").count() == 0
        assert answer_of(served_alone, "asked-first")
        page.wait_for_selector(_HELD.format("asked-first"))
        assert page.locator("text=asked-second").count() == 0
        assert answer_of(served_alone, "asked-second")
        page.wait_for_selector(_HELD.format("asked-second"))
        assert page.locator(_HELD.format("asked-first")).count() == 1
        assert page.evaluate("window.loadedOnce") is True
        assert seen.problems == []
