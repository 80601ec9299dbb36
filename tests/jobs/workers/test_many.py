"""The sink of a job of several adapters: where events go, and who is to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.workers.many import EventSink


def line(event: str, **fields: Any) -> str:
    return json.dumps({"event": event} | fields)


def steps(number: int, num_steps: int = 9) -> str:
    return line("step", step=number, num_steps=num_steps)


class Everybody:
    """Ends who was measured."""

    def ended_by(self, events: Any) -> set[str]:
        return {name for name, event in events if event["event"] == "eval"}


def test_each_adapter_has_its_events_and_the_job_those_that_can_be_followed(tmp_path: Path) -> None:
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("acme", "globex")}
    sink = EventSink(str(tmp_path / "job.jsonl"), files, Everybody())
    told = [("acme", steps(1)), ("acme", steps(2)), ("globex", steps(1)), (None, line("round", round=1))]
    assert sink.take(told) == frozenset()
    assert sink.take([("acme", steps(9)), ("acme", line("eval")), ("globex", line("end"))]) == {"acme"}
    sink.end(["globex"])
    assert sink.take([]) == {"acme", "globex"}
    assert sink.ended() == {"globex"}
    of = {name: [json.loads(each) for each in Path(path).read_text().splitlines()] for name, path in files.items()}
    assert [event.get("step") for event in of["acme"]] == [1, 2, 9, None]
    assert not any("adapter" in event for event in of["acme"])
    job = [json.loads(each) for each in (tmp_path / "job.jsonl").read_text().splitlines()]
    shown = [(event.get("adapter"), event["event"], event.get("step")) for event in job]
    assert shown == [
        ("acme", "step", 1),
        ("globex", "step", 1),
        (None, "round", None),
        ("acme", "step", 9),  # of its steps few, and the last one
        ("acme", "eval", None),
        ("globex", "end", None),
    ]
