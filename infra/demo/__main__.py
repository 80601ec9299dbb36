"""`make demo`: adds a base model, trains and publishes three adapters on Ray, serves them in one batch, sends requests.

It uses only the `loray` command and the HTTP endpoint, as a user does. The adapters stay in LORAY_HOME.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import data
import show
from rich.console import Console

from loray.bases.registry import get_base
from loray.client import LorayClient
from loray.planning.counts import count_base
from loray.settings import Settings

HERE = Path(__file__).resolve().parent
ADAPTERS = ("orders", "dates", "codepages")


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
    started = time.monotonic()
    home = Settings.from_env().home
    work = home / "demo"

    def heading(step: int, title: str) -> None:
        show.heading(console, step, title, time.monotonic() - started)

    heading(1, "The base model: SmolLM2-135M-Instruct")
    loray("base", "add", "smollm2")
    heading(2, "Data: two generated tasks, and sources of this Python")
    prepare(work)
    for i, name in enumerate(ADAPTERS):
        heading(3 + i, f"Train and publish `{name}`: {show.PURPOSE[name]}")
        loray("train", str(work / "recipes" / f"{name}.yaml"))
    published = [json.loads(loray("adapters", "show", name, "--json", capture=True)) for name in ADAPTERS]

    heading(6, "Serve the base and all three from one replica")
    loray("up", "--port", str(args.port))
    try:
        with LorayClient(f"http://127.0.0.1:{args.port}") as client:
            questions = [
                Question("orders", *data.question("orders", 1), chat=True, max_tokens=80),
                Question("dates", *data.question("dates", 2), chat=True, max_tokens=16),
                Question("codepages", data.codepage(), None, chat=False, max_tokens=48),
            ]
            heading(7, "Send each question to its adapter and to the base, all at once over HTTP")
            answers, tokens_per_s = ask(client, questions)
            status = client.status()
    finally:
        if not args.keep:
            loray("down", capture=True)

    show.answers(console, questions, answers)
    show.served(console, status, tokens_per_s)
    rates = {name: show.training_rate(home / "runs" / name) for name in ADAPTERS}
    show.adapters(console, published, rates, count_base(get_base(home, "smollm2").config).total)
    ok = show.verdict(console, published)
    show.next_steps(console, args.port, work / "recipes", keep=args.keep, seconds=time.monotonic() - started)
    return 0 if ok else 1


def loray(*arguments: str, capture: bool = False) -> str:
    """Run this environment's `loray`; returns its output if `capture`, else prints it. Exits if the command fails."""
    command = [str(Path(sys.executable).with_name("loray")), *arguments]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE if capture else None, check=False)
    if done.returncode:
        sys.exit(f"\nthe demo stopped: `loray {' '.join(arguments)}` failed")
    return done.stdout or ""


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
        threads = [threading.Thread(target=one, args=(q, m, limit)) for q in questions for m in (q.model, "smollm2")]
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
