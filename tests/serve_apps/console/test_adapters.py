"""Pages of adapters: lists of bounded length, versions and lineage, promotion, differences, downloads."""

from __future__ import annotations

import re

from loray.spec import Evaluation
from serve_apps.console.rendering import MOST_SUGGESTED
from tests.fixtures.versions import digest, manifest
from tests.serve_apps.console.site import ConsoleSite


def test_the_list_comes_in_pages(console: ConsoleSite) -> None:
    for number in range(60):
        console.catalog.adapters.register(f"many-{number:02}", digest(100 + number), manifest(100 + number))
    page, names = console.get("/adapters", search="many"), []
    while True:
        names += re.findall(r">(many-\d+)<", page.text)
        more = re.search(r'rel="next" href="([^"]+)"', page.text)
        if more is None:
            break
        page = console.http.get("http://test" + more.group(1).replace("&amp;", "&"))
    assert names == [f"many-{number:02}" for number in range(60)]
    assert "First page" in page.text


def test_filters(console: ConsoleSite) -> None:
    console.catalog.tags.set("legal", "stage", "gold")
    for query, shown in (
        ({"search": "ton"}, {"tone"}),
        ({"tag": "stage=gold"}, {"legal"}),
        ({"method": "lora", "base": "smollm2", "tenant": "acme"}, {"acme/vault"}),
        ({"method": "vera"}, set()),
        ({"base": "no-base"}, set()),
    ):
        page = console.get("/adapters", **query)
        assert set(re.findall(r'tenant=\w+">([^<]+)</a></td>', page.text)) == shown, query
    assert "No adapter is like this" in console.get("/adapters", search="zzz").text
    assert console.get("/adapters", method="magic").status_code in (200, 422)


def test_a_base_that_is_not_suggested_can_be_asked_for(console: ConsoleSite) -> None:
    for number in range(MOST_SUGGESTED):
        console.catalog.bases.add(f"base-{number:03}", f"{number:064x}")
    page = console.get("/adapters", base="smollm2").text
    assert page.count('<option value="base-') == MOST_SUGGESTED
    assert '<option value="smollm2">' not in page
    assert 'value="smollm2"' in page
    assert ">tone</a>" in page


def test_one_adapter(console: ConsoleSite) -> None:
    page = console.get("/adapters/tone").text
    for shown in ("da7adada7ada"[:4], "train_5f1b", "version 2", "prod", "Roll back", "Promote", "Compare"):
        assert shown in page, shown
    assert page.count("<title>Version: ") == 2
    version = console.get("/adapters/tone/versions/2").text
    assert "rank: 16" in version
    assert "was not trained here" in version
    assert re.search(r"<footer[^>]*>loray \d+\.\d+\.\d+</footer>", version)


def test_promote_and_roll_back(console: ConsoleSite) -> None:
    moved = console.post("/adapters/tone/aliases/prod?version=2")
    assert moved.headers["hx-redirect"] == "/api/v1/console/adapters/tone?done=promoted"
    assert console.catalog.aliases.get("tone", "prod").version == 2
    assert "points at the version now" in console.get("/adapters/tone", done="promoted").text
    assert console.post("/adapters/tone/aliases/prod/rollback").status_code == 204
    assert console.catalog.aliases.get("tone", "prod").version == 1
    again = console.post("/adapters/tone/aliases/prod/rollback")
    assert (again.status_code, "alert-danger" in again.text) == (409, True)
    assert console.post("/adapters/tone/aliases/prod?version=9").status_code == 404


def test_canaries(console: ConsoleSite) -> None:
    console.post("/adapters/tone/aliases/prod?version=1")
    started = console.post("/adapters/tone/aliases/prod/canary?version=2&percent=10")
    assert started.headers["hx-redirect"] == "/api/v1/console/adapters/tone?done=divided"
    assert console.post("/adapters/tone/aliases/prod/canary?version=2&percent=20").status_code == 204
    page = console.get("/adapters/tone", done="divided").text
    for shown in ("gets its share", "<td>1 (80 %), 2 (20 %)</td>", "<td>20 %</td>", ">End it</button>"):
        assert shown in page, shown
    button = re.search(r'hx-post="/api/v1/console([^"]+)"[^>]*aria-label="Roll back prod"', page)
    assert button is not None
    assert button.group(1).startswith("/adapters/tone/aliases/prod/canary/end?")  # 404 where it has ended meanwhile
    assert console.post("/adapters/tone/aliases/prod/canary?version=2&percent=100").status_code == 422
    assert console.post("/adapters/tone/aliases/prod/canary/end").status_code == 204
    assert console.catalog.aliases.get("tone", "prod").weights == {1: 100}
    assert "<td>ended</td>" in console.get("/adapters/tone").text
    assert console.post("/adapters/tone/aliases/prod/canary/end").status_code == 404


def test_a_rollback_is_of_the_state_that_was_shown(console: ConsoleSite) -> None:
    console.post("/adapters/tone/aliases/prod?version=2")
    page = console.get("/adapters/tone").text
    button = re.search(r'hx-post="/api/v1/console([^"]+)"[^>]*aria-label="Roll back prod"', page)
    assert button is not None
    path = button.group(1).replace("&amp;", "&")
    console.catalog.canaries.set("tone", "prod", 1, 10)
    console.catalog.canaries.end("tone")
    assert console.post(path).status_code == 412
    assert console.catalog.aliases.get("tone", "prod").version == 2


def test_differences(console: ConsoleSite) -> None:
    page = console.get("/adapters/tone/diff", old=1, new=2).text
    assert "-rank: 8" in page
    assert "+rank: 16" in page
    assert "are equal" in console.get("/adapters/tone/diff", old=1, new=1).text


def test_what_is_anothers_does_not_exist(console: ConsoleSite) -> None:
    console.log_in(console.key("infer", "promote", tenant="acme"))
    for path in ("/adapters/tone", "/adapters/tone/versions/1", "/adapters/tone/versions/1/download"):
        answers = [console.get(path.replace("tone", name), tenant="default") for name in ("tone", "nope")]
        assert [answer.status_code for answer in answers] == [404, 404]
        assert answers[0].text.replace("tone", "nope") == answers[1].text
    assert "vault" in console.get("/adapters").text
    assert "tone" not in console.get("/adapters").text
    assert console.post("/adapters/tone/aliases/prod?version=2&tenant=default").status_code == 404


def test_who_may_not_promote_sees_no_button(console: ConsoleSite) -> None:
    console.log_in(console.key("infer"))
    page = console.get("/adapters/tone").text
    assert 'aria-label="Roll back' not in page
    assert "data-promote" not in page
    assert console.post("/adapters/tone/aliases/prod?version=2").status_code == 403


def test_retrieval_is_a_table_with_depths(console: ConsoleSite) -> None:
    measured = [
        Evaluation(metric="passkey_exact_match", value=depth, dataset="passkey", context_length=length, depth=depth)
        for depth in (0.0, 1.0)
        for length in range(1024, 1024 + 60)
    ]
    console.catalog.evaluations.record(digest(2), measured)
    page = console.get("/adapters/tone/versions/2").text
    for depth, shown in (("0", "0 %"), ("1", "100 %")):
        cells = ("passkey_exact_match", depth, "adapter", "passkey", "1,024", shown)
        assert "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert "These are the first 100 of 120" in page
