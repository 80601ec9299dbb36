"""`loray chat` and `loray top` with a server that answers in this process."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest

from loray.cli.chat import ChatAnswer, Talk, side_by_side
from loray.cli.top import since
from loray.client import LorayClient
from loray.client.metrics import percentile
from loray.schemas.openai import ChatFormat, Error, ErrorBody, Usage
from loray.schemas.status import BaseStatus, CatalogStatus, EngineStatus, ReplicaStatus, Status
from loray.spec import ServeSpec, printable
from tests.cli.run import Loray
from tests.fixtures.answers import delta, fmt

MODELS = ("tiny", "tone", "dates")


class Server:
    """`asked`: the bodies of chats. Each look at /status is 100 output tokens later."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.looks = 0
        self.refuses_metrics = False
        self.thought = ""  # before each answer

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
            if name not in MODELS:
                body = ErrorBody(error=Error(message=f"no model {name!r}", type="t", code="model_not_found"))
                return httpx.Response(404, text=body.to_json())
            model = {"id": name, "object": "model", "created": 0, "owned_by": "loray", "root": name}
            return httpx.Response(200, json=model | {"max_model_len": 64})
        if path == "/v1/chat/completions":
            return self._chat(json.loads(request.content))
        if path == "/status":
            self.looks += 1
            return httpx.Response(200, text=self._status().model_dump_json())
        if path == "/metrics" and not self.refuses_metrics:
            return httpx.Response(200, text=self._metrics())
        return httpx.Response(403, text=ErrorBody(error=Error(message="not this key", type="t")).to_json())

    def _chat(self, body: dict[str, Any]) -> httpx.Response:
        self.asked.append(body)
        made = fmt(ChatFormat)
        said = f"{body['model']} hears {body['messages'][-1]['content']}"
        if said.endswith("fail"):
            error = ErrorBody(error=Error(message="it broke", type="server_error")).to_json()
            return httpx.Response(500, text=error)
        thought = [delta()._replace(reasoning=self.thought)] if self.thought else []
        chunks = [made.opening(0), *(made.chunk(0, d) for d in (*thought, *(delta(w, None) for w in said.split(" "))))]
        chunks += [made.chunk(0, delta("", None, "stop")), made.usage_chunk(Usage.of(3, 5))]
        events = [chunk.to_json() for chunk in chunks]
        text = "".join(f"data: {data}\n\n" for data in (*events, "[DONE]"))
        return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})

    def _status(self) -> Status:
        replicas = tuple(
            ReplicaStatus(
                replica=name,
                node="n",
                pid=1,
                uptime_s=9.0,
                num_running=2,
                num_waiting=3,
                num_output_tokens=100 * self.looks,
                blocks={"free": 1, "kv": 3},
                adapters_in_pool=in_pool,
                adapters_on_host=("tone@1", "dates@2"),
            )
            for name, in_pool in (("r1", ("tone@1",)), ("r2", ("tone@1", "dates@2")))
        )
        catalog = CatalogStatus(num_adapters=2)
        tiny = BaseStatus(
            base="tiny", status="ok", num_replicas=2, target=2, num_adapters=2, spec=ServeSpec(base="tiny")
        )
        return Status(status="ok", bases=(tiny,), catalog=catalog, replicas=replicas, totals=EngineStatus())

    def _metrics(self) -> str:
        name = "loray_time_to_first_token_seconds"
        lines = [f"# TYPE {name} histogram"]
        for bound, count in (("0.1", 5), ("1.0", 10), ("+Inf", 10)):
            lines.append(f'{name}_bucket{{replica="r1",method="lora",le="{bound}"}} {count * self.looks}')
        lines += ["# TYPE loray_http_requests_total counter"]
        lines += [f'loray_http_requests_total{{gateway="g1",route="/v1",code="200"}} {10 * self.looks}']
        lines += ["# TYPE loray_http_requests_in_flight gauge", 'loray_http_requests_in_flight{gateway="g1"} 4']
        return "\n".join(lines) + "\n"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """Its URL is LORAY_URL."""
    made = Server()
    monkeypatch.setenv("LORAY_URL", "http://test")
    client: Callable[..., LorayClient] = partial(LorayClient, transport=httpx.MockTransport(made))
    for module in ("chat", "top"):
        monkeypatch.setattr(f"loray.cli.{module}.LorayClient", client)
    return made


Say = Callable[..., None]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """`say("one", "two")`: what stdin holds."""

    def put(*lines: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))

    return put


@pytest.mark.parametrize("is_terminal", [False, True])
def test_thoughts_are_seen_on_a_terminal_alone(
    server: Server, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    server.thought = "hm"
    stdout = io.StringIO()
    stdout.isatty = lambda: is_terminal  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdout", stdout)
    talk = Talk(LorayClient("http://test", transport=httpx.MockTransport(server)), ["tone"], None, {})
    answer, shown = ChatAnswer("tone"), list[str]()
    talk.answer("one", answer, shown.append)
    dimmed = ["\x1b[2mhm\x1b[0m", "\n\ntone"] if is_terminal else ["tone"]
    assert shown == [*dimmed, "hears", "one"]
    assert answer.text == "tonehearsone"
    assert talk.messages["tone"][-1] == {"role": "assistant", "content": "tonehearsone"}


def test_turns_reset_and_system(loray: Loray, server: Server, say: Say) -> None:
    say("one", "two", "/reset", "three", "/system be terse", "four", "/what", "/quit", "five")
    done = loray("chat", "tone", "--system", "be kind", "--temperature", 0, "--max-tokens", 9)
    assert done.code == 0
    assert done.out.split() == [w for n in ("one", "two", "three", "four") for w in ("tonehears" + n,)]
    sent = [[m["content"] for m in body["messages"]] for body in server.asked]
    assert sent == [
        ["be kind", "one"],
        ["be kind", "one", "tonehearsone", "two"],
        ["be kind", "three"],
        ["be terse", "four"],
    ]
    assert (server.asked[0]["max_tokens"], server.asked[0]["temperature"]) == (9, 0.0)
    assert done.err.count("5 tokens, ") == 4
    assert "first after" in done.err
    assert "/reset forgets" in done.err  # of /what


def test_quiet_shows_answers_alone(loray: Loray, server: Server, say: Say) -> None:
    say("one")
    assert loray("chat", "tone", "--quiet") == (0, "tonehearsone\n", "")


def test_answers_as_json(loray: Loray, server: Server, say: Say) -> None:
    say("one", "two")
    done = loray("chat", "tone", "--compare", "dates", "--json")
    assert [(a["model"], a["text"], a["error"]) for a in map(json.loads, done.out.splitlines())] == [
        (model, f"{model}hears{line}", None) for line in ("one", "two") for model in ("tone", "dates")
    ]
    assert json.loads(done.out.splitlines()[0])["num_tokens"] == 5


def test_models_are_compared_under_headings(loray: Loray, server: Server, say: Say) -> None:
    say("one", "two")
    done = loray("chat", "tone", "--compare", "dates", "--compare", "tone", "-q")
    assert done.out.splitlines()[:4] == ["── tone ──", "tonehearsone", "── dates ──", "dateshearsone"]
    assert [m["content"] for m in server.asked[-1]["messages"]] == ["one", "dateshearsone", "two"]


def test_columns_of_a_terminal(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with LorayClient("http://test", transport=httpx.MockTransport(server)) as client:
        talk = Talk(client, ["tone", "dates"], None, {})
        answers = [ChatAnswer("tone"), ChatAnswer("dates")]
        side_by_side(talk, "one", answers, quiet=False)
    shown = capsys.readouterr().out
    assert "tonehearsone" in shown
    assert "dateshearsone" in shown
    assert [a.num_tokens for a in answers] == [5, 5]
    assert [m["content"] for m in talk.messages["dates"]] == ["one", "dateshearsone"]


def test_what_is_not_served(loray: Loray, server: Server, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    say("one")
    assert loray("chat", "other").err == "error: no model 'other'\n"
    say("fail")
    assert "it broke" in loray("chat", "tone").failed
    say("fail", "two")
    mixed = loray("chat", "tone", "--compare", "dates", "-q")
    assert mixed.code == 1
    monkeypatch.delenv("LORAY_URL")
    assert "nothing is being served; start it with `loray serve` or `loray up`" in loray("chat", "tone").failed


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2J\tb\n\x07\x9bé") == "a[2J\tb\né"


def test_figures() -> None:
    assert (
        ChatAnswer("m", ttft_s=0.5, total_s=2.5, num_tokens=5).figures == "5 tokens, 2.0 tokens/s, first after 500 ms"
    )
    assert ChatAnswer("m", ttft_s=0.5, total_s=0.5, num_tokens=1).figures == "1 tokens, first after 500 ms"
    assert ChatAnswer("m").figures == "0 tokens"


def test_percentiles_of_buckets() -> None:
    buckets = {0.1: 50.0, 1.0: 100.0, math.inf: 100.0}
    assert percentile(buckets, 0.5) == pytest.approx(0.1)
    assert percentile(buckets, 0.75) == pytest.approx(0.55)
    assert percentile({0.1: 0.0, math.inf: 4.0}, 0.5) == 0.1  # above every bound
    assert percentile({}, 0.5) is None
    assert percentile({1.0: 0.0, math.inf: 0.0}, 0.5) is None


def test_percentiles_since_an_earlier_moment() -> None:
    now, earlier = {1.0: 5.0, math.inf: 8.0}, {1.0: 4.0, math.inf: 4.0}
    assert since(now, earlier) == {1.0: 1.0, math.inf: 4.0}
    assert since(now, None) == since(now, now) == now  # nothing in between
    assert since(earlier, now) == earlier  # the replica began anew


def test_json(loray: Loray, server: Server) -> None:
    found = loray("top", "--json", "--interval", 0.01).json
    assert (found["status"], found["base"], found["adapters"]) == ("ok", "tiny", 2)
    first = found["replicas"][0]
    assert (first["replica"], first["running"], first["waiting"], first["pool_used"]) == ("r1", 2, 3, 0.75)
    assert (first["adapters_in_pool"], first["adapters_on_host"]) == (1, 2)
    assert 0 < first["tokens_per_s"] <= 100 / 0.01
    assert first["ttft_p50_s"] == pytest.approx(0.1)
    assert first["ttft_p99_s"] == pytest.approx(0.982)
    (gateway,) = found["gateways"]
    assert (gateway["gateway"], gateway["under_way"], gateway["requests"]) == ("g1", 4, 20)
    assert found["placements"] == [
        {"adapter": "tone@1", "pools": 2, "hosts": 0},
        {"adapter": "dates@2", "pools": 1, "hosts": 1},
    ]


def test_once_is_one_table(loray: Loray, server: Server) -> None:
    shown = loray("top", "--once", "--interval", 0.01)
    assert shown.code == 0
    assert server.looks == 2
    for word in ("REPLICA", "r1", "r2", "75%", "100 ms", "GATEWAY", "g1", "tone@1"):
        assert word in shown.out


def test_a_key_that_may_not_read_metrics(loray: Loray, server: Server) -> None:
    server.refuses_metrics = True
    found = loray("top", "--json", "--interval", 0.01).json
    assert found["gateways"] == []
    assert found["replicas"][0]["ttft_p50_s"] is None
    assert found["replicas"][0]["tokens_per_s"] > 0
