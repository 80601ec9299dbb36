"""Advice: the recommender, the planner and the simulator as forms, and what they refuse."""

from __future__ import annotations

import re

import pytest

from serve_apps.console import simulation
from tests.serve_apps.console.markup import parse
from tests.serve_apps.console.site import ConsoleSite

QUESTIONS: dict[str, object] = {"context_length": "32768", "num_tasks": "1000"}
RECIPE: dict[str, object] = {"name": "plan", "data.train": "/rows.jsonl"}
RUN: dict[str, object] = {"replicas": "2", "adapters": "20", "minutes": "2", "policies": ["loray", "ray"]}


def test_the_forms_are_for_every_key(console: ConsoleSite) -> None:
    console.log_in(console.key("infer"))
    page = console.get("/advice").text
    for shown in ('name="context_length"', 'name="data.max_length"', 'name="utilization"', "h200-141gb", "oracle"):
        assert shown in page, shown
    assert 'aria-current="page">Advice' in page


def test_methods_are_recommended(console: ConsoleSite) -> None:
    part = console.post("/advice/recommend", QUESTIONS)
    assert part.status_code == 200
    for shown in ("LongLoRA", "VeRA", "32,768 tokens are more", "Adapters a GiB of pool", "a100-80gb", "<rect width="):
        assert shown in part.text, shown
    parse(part.text)  # its tags nest
    assert "h100-80gb" in console.post("/advice/recommend", QUESTIONS | {"device": "h100-80gb"}).text
    for wrong, said in (({"context_length": "1"}, "context_length"), ({"base": "nothing"}, "nothing")):
        refused = console.post("/advice/recommend", QUESTIONS | wrong)
        assert (refused.status_code in (404, 422), said in refused.text) == (True, True), wrong


def test_a_run_is_planned_on_the_chosen_device(console: ConsoleSite) -> None:
    part = console.post("/advice/plan", RECIPE | {"device": "h200-141gb", "adapter.method": "vera"})
    assert part.status_code == 200
    for shown in ("on h200-141gb;", "Memory of a worker", "In memory at the peak", "framework", "<rect width="):
        assert shown in part.text, shown
    assert "assumed" not in part.text
    assert "on this-machine" in console.post("/advice/plan", RECIPE | {"device": "this-machine"}).text
    assert console.post("/advice/plan", RECIPE | {"adapter.rank": "many"}).status_code == 422


def test_a_deployment_is_simulated(console: ConsoleSite) -> None:
    part = console.post("/advice/simulate", RUN)
    assert part.status_code == 200, part.text
    text = part.text.replace("&#34;", '"')
    assert text.count('["minute", "loray", "ray"]') == 2
    assert re.search(r'<th scope="row">ray</th><td>[\d.]+ s</td>', text)
    assert re.search(r"[1-9]\d* made-up requests", text)


def test_what_is_not_simulated(console: ConsoleSite, monkeypatch: pytest.MonkeyPatch) -> None:
    console.log_in(console.key("infer"))
    for wrong, said in (
        ({"minutes": "60", "replicas": "64", "utilization": "1"}, "loray simulate"),
        ({"policies": []}, "policies"),
        ({"replicas": "65"}, "replicas"),
        ({"policies": ["magic"]}, "choose policies of loray"),
    ):
        simulation._rests.clear()
        refused = console.post("/advice/simulate", RUN | wrong)
        assert (refused.status_code, said in refused.text) == (422, True), refused.text
    again = console.post("/advice/simulate", RUN)  # the last one was just now
    assert (again.status_code, "last simulation was just now" in again.text) == (429, True)
    with simulation._running:
        busy = console.post("/advice/simulate", RUN)
    assert (busy.status_code, "try again" in busy.text) == (429, True)
