"""Pages of training sessions: whose they show, what of them, and how one is stopped."""

from __future__ import annotations

from dataclasses import replace

from loray.spec import Principal
from tests.fixtures.training_sessions import begin_session
from tests.serve_apps.console.site import ConsoleSite


def test_a_session_is_followed_and_stopped(console: ConsoleSite) -> None:
    assert "No training session was begun yet" in console.get("/sessions").text
    model = begin_session(console.catalog, "session-1", display_name="spoken numbers", metadata={"team": "sales"})
    listed = console.get("/sessions").text
    for shown in ("spoken numbers", "goes on", "1, 1 in the trainer", "60", "12,345"):
        assert shown in listed, shown
    page = console.get("/sessions/session-1").text
    saved = f"tinker://{model.id}/weights/weights-60"
    for shown in ("/sessions/session-1/live", "team: sales", "lora, rank 8", "7.2500", "12,345", saved, "2.0 KiB"):
        assert shown in page, shown
    assert console.post("/sessions/session-1/stop").status_code == 204
    assert console.catalog.tinker.follow("session-1").session.end == "stopped"
    part = console.get("/sessions/session-1/live").text
    assert "Stop</button>" not in part
    assert ("data-ended" in part, "give their places back" in part) == (False, True)
    console.catalog.tinker.end_model(model.id)
    assert "data-ended" in console.get("/sessions/session-1/live").text
    assert console.get("/sessions/nothing").status_code == 404


def test_sessions_are_of_a_tenant_and_administrators_see_all(console: ConsoleSite) -> None:
    begin_session(console.catalog.view(Principal(tenant="acme")), "session-a")
    begin_session(console.catalog, "session-b")
    console.log_in(console.key("train", tenant="acme"))
    page = console.get("/sessions").text
    assert ("session-a" in page, "session-b" in page, ">Tenant<" in page) == (True, False, False)
    assert console.get("/sessions/session-b").status_code == 404
    assert console.post("/sessions/session-b/stop").status_code == 404
    console.log_in(console.key("tenant_admin", tenant="acme"))
    assert "Stop</button>" not in console.get("/sessions/session-a").text
    assert console.post("/sessions/session-a/stop").status_code == 403
    console.log_in(console.key("admin"))
    page = console.get("/sessions").text
    assert ("session-a" in page, "session-b" in page, ">Tenant<" in page) == (True, True, True)
    assert console.post("/sessions/session-a/stop").status_code == 204
    console.log_in(console.key("infer"))
    assert console.get("/sessions").status_code == 403
    assert "Training sessions" not in console.get().text


def test_long_lists_have_pages(console: ConsoleSite) -> None:
    begin_session(console.catalog, "session-0")
    one = console.catalog.tinker.session("session-0")
    for number in range(1, 51):
        console.catalog.tinker.add_session(replace(one, id=f"session-{number}"))
    assert 'href="/api/v1/console/sessions?offset=50"' in console.get("/sessions").text
    rest = console.get("/sessions", offset=50).text
    assert (rest.count("goes on"), "Next page" in rest) == (1, False)
