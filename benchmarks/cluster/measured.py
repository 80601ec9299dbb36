"""What came of the requests of a trace, as clients and replicas say it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.client import Endpoint, real_time
from benchmarks.cluster.trace import Asked, as_requests
from loray.client.metrics import Metrics
from loray.local.processes import LOOPBACK
from loray.spec import EngineFigures
from serve_apps.python_gc import freeze_garbage

_NAN = float("nan")
_LOADS = "loray_adapter_load_seconds"


@dataclass(slots=True)
class Seen:
    """One request. Times are seconds after the start of its part.

    at      when it was due; what it was sent later counts as latency
    routed  when a replica had accepted it
    loads   the requests on each replica when its own was chosen, itself included, as loray's router knew them; `load`:
            on its own
    """

    at: float
    adapter: int
    num_prompt: int
    num_output: int
    probe: bool = False
    first: float = _NAN
    last: float = _NAN
    routed: float = _NAN
    replica: str = ""
    loads: tuple[int, ...] = ()
    load: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.first - self.at


class Placement(NamedTuple):
    """`at`: seconds of time.perf_counter(), which all processes of a machine share."""

    at: float
    replica: str
    loads: dict[str, int]


def send(port: int, names: Sequence[str], asked: Sequence[Asked], part: str) -> tuple[float, list[Seen]]:
    """When it began, in seconds of time.perf_counter(), and what came of the requests, without their replicas. `names`
    are the adapters'.
    """
    requests = as_requests(asked, names, part, {"X-Request-Id": f"{part}.{{}}"})
    freeze_garbage()  # a collection would hold up the client
    with real_time():
        began, answers = Endpoint(port, options={"return_token_ids": True}).run(requests)
    found = [Seen(*one) for one in asked]
    for seen, answer in zip(found, answers, strict=True):
        seen.error = answer.error
        if not seen.error:
            seen.first, seen.last = answer.times[0], answer.times[-1]
    return began, found


def send_recorded(port: int, names: Sequence[str], asked: Sequence[Asked], part: str, record: Path) -> list[Seen]:
    """With their replicas. `record` is the file that the router writes."""
    began, found = send(port, names, asked, part)
    placements = read_placements(record, part)
    for index, seen in enumerate(found):
        place(seen, placements.get(index), began)
    return found


def place(seen: Seen, where: Placement | None, began: float) -> None:
    """Takes over what the router wrote down of the request. An answer of an unknown replica is an error."""
    if where is None:
        seen.error = seen.error or "the router wrote down no replica for it"
        return
    seen.routed, seen.replica = where.at - began, where.replica
    seen.loads, seen.load = tuple(where.loads.values()), where.loads.get(where.replica, 0)


def read_placements(record: Path, part: str) -> dict[int, Placement]:
    """By the request's number in its part. The last counts where one was tried again."""
    found = {}
    for line in record.read_text(encoding="utf-8").splitlines():
        name, at, replica, loads = json.loads(line)
        kind, _, number = name.partition(".")
        if kind == part:
            found[int(number)] = Placement(at, replica, loads)
    return found


class Figures(EngineFigures):
    """Of one replica, from GET /status."""

    replica: str
    adapters_in_pool: tuple[str, ...] = ()
    adapters_on_host: tuple[str, ...] = ()


def figures(port: int) -> list[Figures]:
    """Of all replicas that answer, by name."""
    response = httpx.get(f"http://{LOOPBACK}:{port}/status", timeout=30)
    found = [Figures(**replica) for replica in response.json()["replicas"]] if response.status_code == 200 else []
    return sorted(found, key=lambda figures: figures.replica)


def mean_load_s(port: int) -> float:
    """Of all loads of adapters since the start, by the replicas."""
    text = httpx.get(f"http://{LOOPBACK}:{port}/metrics", timeout=30).raise_for_status().text
    metrics = Metrics(text, (_LOADS, f"# TYPE {_LOADS}"))
    seconds, loads = (sum(metrics.sums(f"{_LOADS}_{what}", "replica").values()) for what in ("sum", "count"))
    return seconds / max(1.0, loads)


def adapter_config() -> Any:
    """PEFT's, of every adapter."""
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
