"""A base without requests has no replica on a real cluster; the next request starts one, and is answered."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from ray import serve

from serve_apps import app as application
from tests.fixtures.cluster import RayCluster, Served, deployed
from tests.serve_apps.asking import answer_of, eventually, status

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

AUTOSCALING = {
    "min_replicas": 0,
    "max_replicas": 1,
    "window_s": 1.0,
    "downscale_delay_s": 0.5,
    "downscale_to_zero_delay_s": 2.0,
}


def base_of(app: Served) -> dict[str, Any]:
    (base,) = status(app)["bases"]
    return dict(base)


def test_a_base_sleeps_and_a_stream_wakes_it(ray_cluster: RayCluster, served: Served) -> None:
    with deployed(ray_cluster, served, "sleepy", autoscaling=AUTOSCALING, sse_heartbeat_s=0.2) as app:
        before = answer_of(app, "tiny")
        assert eventually(lambda: base_of(app)["status"] == "asleep" and base_of(app)["num_replicas"] == 0, 60)
        assert httpx.get(f"{app.url}/health", timeout=30).json() == {"status": "ok"}
        assert "no request" in base_of(app)["autoscaling"]["reason"]
        body: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 3, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        with httpx.stream("POST", f"{app.url}/v1/completions", json=body, timeout=90) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert stream.status_code == 200
        assert lines[0] == ": waiting"  # while the replica starts
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 3
        causes = [d["reason"] for d in base_of(app)["autoscaling"]["decisions"]]
        assert causes[0].startswith("no request for ")
        assert eventually(lambda: "a request waited" in str(base_of(app)["autoscaling"]["decisions"]))
        assert answer_of(app, "tiny") == before


def test_a_base_that_sleeps_sleeps_on_over_an_update(
    ray_cluster: RayCluster, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(application, "APPLICATION", "updated")  # whose deployments an update looks for
    for name, value in ray_cluster.settings.to_env().items():
        monkeypatch.setenv(name, value)
    with deployed(ray_cluster, served, "updated", autoscaling=AUTOSCALING) as app:
        before = answer_of(app, "tiny")
        assert base_of(app)["num_replicas"] == 1  # it was started with one
        assert eventually(lambda: base_of(app)["status"] == "asleep" and base_of(app)["num_replicas"] == 0, 60)
        spec = app.spec.model_copy(update={"max_queued": 9})
        serve.run(application.build(spec.model_dump(mode="json")), name="updated", route_prefix="/updated")
        assert eventually(lambda: base_of(app)["spec"]["max_queued"] == 9, 60)
        state = base_of(app)
        assert (state["status"], state["num_replicas"]) == ("asleep", 0)
        assert state["autoscaling"]["decisions"] == []
        assert answer_of(app, "tiny") == before
