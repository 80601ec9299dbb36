"""`make demo`: adds a base model, trains and publishes three adapters on Ray, serves them in one batch, sends requests.

It uses only the `loray` command and the HTTP endpoint, as a user does. The adapters stay in LORAY_HOME.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import data
import show
from commands import Commands, Interrupted
from estimate import estimated
from rich.console import Console

from loray.bases.registry import get_base
from loray.client import CatalogClient, LorayClient
from loray.planning.run import count_base
from loray.settings import Settings

HERE = Path(__file__).resolve().parent
TRAININGS = (("orders", "dates"), ("codepages",))  # what one job trains: adapters on the base as it is share its passes
ADAPTERS = tuple(name for names in TRAININGS for name in names)
_DONE = "published.json"  # what was published, and of which recipe and data


class Question(NamedTuple):
    """A request to the adapter `model`; `expected` is the right answer where only one is right."""

    model: str
    prompt: str
    expected: str | None
    chat: bool
    max_tokens: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="where the endpoint listens (default 8000)")
    parser.add_argument("--keep", action="store_true", help="leave the endpoint running")
    args = parser.parse_args()
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=110)
    commands, is_kept = Commands(), False
    with commands.interruptible():
        try:
            ok = Demo(commands, console).run(args.port, keep=args.keep)
            is_kept = args.keep
        except Interrupted as e:
            console.print("\n[yellow]interrupted: stopping what was started[/]")
            return 128 + e.number
        finally:
            if not is_kept:
                commands.stop_all(ADAPTERS)
                show.stopped(console)
    return 0 if ok else 1


class Demo:
    def __init__(self, commands: Commands, console: Console) -> None:
        self._loray, self._console = commands, console
        self._home = Settings.from_env().home
        self._work = self._home / "demo"
        self._started = time.monotonic()
        self._expected: float | None = None  # seconds for all, as estimated
        self._catalog: dict[str, Any] = {}  # its adapters by name, as of the last look

    def run(self, port: int, *, keep: bool) -> bool:
        """Whether every adapter is as good as it should be."""
        self._heading(1, "The base model: SmolLM2-135M-Instruct")
        self._loray("base", "add", "smollm2")
        self._heading(2, "Data: two generated tasks, and sources of this Python")
        prepare(self._work)
        self._look()
        left = [[name for name in names if not self._is_published(name)] for names in TRAININGS]
        estimate = estimated(self._loray, self._work, left)
        self._expected = estimate.seconds
        show.expected(self._console, estimate)
        for step, (names, to_train) in enumerate(zip(TRAININGS, left, strict=True), 3):
            what = " and ".join(f"`{name}` ({show.PURPOSE[name]})" for name in names)
            self._heading(step, f"Train and publish {what}{' in one process' if names[1:] else ''}")
            for name in names:
                if name not in to_train:
                    label = self._noted()[name]["label"]
                    self._console.print(f"`{name}` was published before as {label}; it goes on from there")
            if to_train:
                self._train(to_train)

        self._heading(5, "Serve the base and all three from one replica")
        self._loray("up", "--port", str(port))
        url = f"http://127.0.0.1:{port}"
        with LorayClient(url) as client, CatalogClient(url) as catalog:
            questions = [
                Question("orders", *data.question("orders", 1), chat=True, max_tokens=80),
                Question("dates", *data.question("dates", 2), chat=True, max_tokens=16),
                Question("codepages", data.codepage(), None, chat=False, max_tokens=48),
            ]
            self._heading(6, "Send each question to its adapter and to the base, all at once over HTTP")
            answers, tokens_per_s = ask(client, questions)
            status = client.status()
            published = [catalog.version(name, self._catalog[name]["version"]) for name in ADAPTERS]

        show.answers(self._console, questions, answers)
        show.served(self._console, status, tokens_per_s)
        rates = {name: show.training_rate(self._home / "runs" / name) for name in ADAPTERS}
        num_parameters = count_base(get_base(self._home, "smollm2").config).total
        show.adapters(self._console, published, rates, num_parameters)
        ok = show.verdict(self._console, published)
        show.next_steps(self._console, port, self._work / "recipes", keep=keep, seconds=self._seconds())
        return ok

    def _train(self, names: Sequence[str]) -> None:
        """Train these and note them: also the one that is published when a signal comes, or the other fails."""
        before, is_done = self._catalog, False
        try:
            self._loray("train", *(str(self._recipe(name)) for name in names))
            is_done = True
        finally:
            self._look()
            for name in names:
                if is_done or self._catalog.get(name) != before.get(name):
                    self._note(name)

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _heading(self, step: int, title: str) -> None:
        show.heading(self._console, step, title, self._seconds(), self._expected)

    def _recipe(self, name: str) -> Path:
        return self._work / "recipes" / f"{name}.yaml"

    def _made_of(self, name: str) -> str:
        """The digest of an adapter's recipe and data."""
        files = (self._recipe(name), *sorted((self._work / "data").glob(f"{name}_*.jsonl")))
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

    def _noted(self) -> dict[str, dict[str, str]]:
        try:
            found: dict[str, dict[str, str]] = json.loads((self._work / _DONE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found

    def _look(self) -> None:
        self._catalog = {row["name"]: row for row in self._loray.ask("adapters", "ls") or ()}

    def _note(self, name: str) -> None:
        row = self._catalog[name]
        label = f"{name}@{row['version']}"
        entry = {"made_of": self._made_of(name), "label": label, "digest": row["digest"]}
        (self._work / _DONE).write_text(json.dumps(self._noted() | {name: entry}, indent=2) + "\n", encoding="utf-8")

    def _is_published(self, name: str) -> bool:
        """Whether an earlier demo, which may have been interrupted, has published it from the same recipe and data."""
        noted = self._noted().get(name)
        if noted is None or noted["made_of"] != self._made_of(name):
            return False
        return name in self._catalog and bool(self._catalog[name]["digest"] == noted["digest"])


def prepare(work: Path) -> None:
    """Write recipes and data below LORAY_HOME, where a user can change them and train again."""
    (work / "recipes").mkdir(parents=True, exist_ok=True)
    for recipe in sorted((HERE / "recipes").glob("*.yaml")):
        shutil.copy(recipe, work / "recipes")
    data.write(work / "data")
    for path in sorted((work / "data").glob("*_train.jsonl")):
        with path.open(encoding="utf-8") as f:
            print(f"  {path.name:22} {sum(1 for _ in f):5} rows, {path.stat().st_size / 1e6:.1f} MB")


def ask(client: LorayClient, questions: list[Question]) -> tuple[dict[tuple[str, str], str], float]:
    """Send every question to its adapter and to the base at the same time; returns answers and output tokens/s.

    A first round of one token each loads the adapters; the second round is timed.
    """
    answers: dict[tuple[str, str], str] = {}
    tokens: list[int] = []

    def one(question: Question, model: str, limit: int) -> None:
        options: dict[str, Any] = {"temperature": 0, "max_tokens": min(question.max_tokens, limit)}
        if question.chat:
            chat = client.chat(model, [{"role": "user", "content": question.prompt}], **options)
            text, usage = chat.choices[0].message.content, chat.usage
        else:
            completion = client.complete(model, question.prompt, **options)
            text, usage = completion.choices[0].text, completion.usage
        answers[question.model, model] = text or ""
        tokens.append(usage.completion_tokens if usage else 0)

    for limit in (1, 1 << 20):
        answers.clear()
        tokens.clear()
        began = time.monotonic()
        threads = [
            threading.Thread(target=one, args=(q, m, limit), daemon=True)
            for q in questions
            for m in (q.model, "smollm2")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
    if len(answers) < 2 * len(questions):
        sys.exit("\nthe demo stopped: a request failed, see above")
    return answers, sum(tokens) / seconds


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
