"""`loray chat`, with messages from a pipe."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import httpx
import pytest

from loray.cli.chat import ChatAnswer, _Talk, printable
from loray.client import LorayClient
from tests.cli.interactive.conftest import Server
from tests.cli.run import Loray

Say = Callable[..., None]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """`say("one", "two")`: what stdin holds."""

    def put(*lines: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))

    return put


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
        talk = _Talk(client, ["tone", "dates"], None, {}, quiet=False)
        answers = [ChatAnswer("tone"), ChatAnswer("dates")]
        talk._side_by_side("one", answers)
    shown = capsys.readouterr().out
    assert "tonehearsone" in shown
    assert "dateshearsone" in shown
    assert [a.num_tokens for a in answers] == [5, 5]
    assert [m["content"] for m in talk._messages["dates"]] == ["one", "dateshearsone"]


def test_what_is_not_served(loray: Loray, server: Server, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    say("one")
    assert loray("chat", "other").err == "error: no model 'other'\n"
    say("fail")
    failed = loray("chat", "tone")
    assert failed.code == 1
    assert "it broke" in failed.err
    say("fail", "two")
    mixed = loray("chat", "tone", "--compare", "dates", "-q")
    assert mixed.code == 1
    monkeypatch.delenv("LORAY_URL")
    nothing = loray("chat", "tone")
    assert nothing.code == 1
    assert "nothing is being served; start it with `loray serve` or `loray up`" in nothing.err


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2J\tb\n\x07\x9bé") == "a[2J\tb\né"


def test_figures() -> None:
    assert (
        ChatAnswer("m", ttft_s=0.5, total_s=2.5, num_tokens=5).figures == "5 tokens, 2.0 tokens/s, first after 500 ms"
    )
    assert ChatAnswer("m", ttft_s=0.5, total_s=0.5, num_tokens=1).figures == "1 tokens, first after 500 ms"
    assert ChatAnswer("m").figures == "0 tokens"
