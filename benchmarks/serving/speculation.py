"""One stream with and without guessed tokens: tokens/s, and how many guesses were right.

    python -m benchmarks.serving.speculation [--adapter FOLDER --rows FILE] [--only TASK] [--prompts 8] [--json FILE]

Two engines in this process, which take turns; each request is the only one, and is answered by both with the same
tokens. Texts, code and records are copied, in part, by the base: `quotes` of a licence, `code` of the standard library
with another name, `json` held to a schema; `free` is sampled at temperature 1 and copies nothing. `--adapter`: a folder
in PEFT's format, and chats as its training data has them, whose first messages are answered: such as `orders` of
`make demo`. What is learned of earlier requests is forgotten before each round of a task.

The claims: tasks that copy ≥ 1.5 × without, free text ≥ 0.97 ×, from the first token to the last.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import random
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from tokenizers import Tokenizer

from benchmarks.options import check_only, one_or_more
from benchmarks.report import Cell, Report, Verdict, machine_line
from benchmarks.serving.models import bench_base
from benchmarks.stepping import finish
from benchmarks.world import describe_machine
from loray.adapters.manifest import describe, digest
from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel
from loray.engine.build import build_engine
from loray.engine.engine import Engine
from loray.engine.pool.packed import PackedAdapter, Packer
from loray.spec import AdapterRef, Constraint, GenerateRequest, SamplingParams, ServeSpec
from loray.text.templates import ChatTemplates

_COPYING, _FREE = 1.5, 0.97
_MOST_PROMPT = 700  # tokens
_COLUMNS = ("task", "without, tok/s\t.1f", "with, tok/s\t.1f", "×\t.2f", "tokens a step\t.2f", "guessed", "right\t.2f")
_TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
_TOPICS = ("a lighthouse", "two brothers", "the first snow", "a lost letter", "a market", "an old dog")
_PEOPLE = ("Mia Okafor", "Omar Lindqvist", "Lena Moreau", "Kofi Tanaka", "Yuki Novak", "Diego Hassan", "Anya Berg")
_CITIES = ("Lisbon", "Nairobi", "Osaka", "Tallinn", "Quito", "Galway", "Hanoi")
_FIELDS = {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}}
_SCHEMA = {
    "type": "array",
    "items": {"type": "object", "properties": _FIELDS, "required": [*_FIELDS], "additionalProperties": False},
}


class Asked(NamedTuple):
    """A request of one user message."""

    message: str
    params: SamplingParams
    adapter: AdapterRef | None = None


class Ran(NamedTuple):
    """An answer, and the seconds after its first token."""

    tokens: list[int]
    seconds: float


def _quotes(num: int, greedy: SamplingParams) -> list[Asked]:
    paragraphs = [" ".join(part.split()) for part in _TEXT.read_text(encoding="utf-8").split("\n\n")]
    parts = [part for part in paragraphs if len(part) > 400]
    asked = "Summarise this text: quote its most important sentences, word for word.\n\n{}"
    return [Asked(asked.format(part), greedy) for part in parts[:num]]


def _code(num: int, greedy: SamplingParams) -> list[Asked]:
    functions: list[Callable[..., Any]] = [ast.walk, textwrap.indent, ast.get_docstring, textwrap.shorten]
    functions += [ast.iter_child_nodes, inspect.cleandoc, ast.iter_fields, inspect.getblock]
    asked = "Rename the function `{}` to `renamed` and write all of the code again:\n\n```python\n{}```"
    return [Asked(asked.format(f.__name__, inspect.getsource(f)), greedy) for f in functions[:num]]


def _json(num: int, greedy: SamplingParams) -> list[Asked]:
    rng = random.Random(0)
    structured = Constraint.from_schema(_SCHEMA, whitespace=" ?")
    held = greedy.model_copy(update={"structured": structured})
    texts = []
    for _ in range(num):
        people = [(name, rng.randint(20, 70), rng.choice(_CITIES)) for name in rng.sample(_PEOPLE, 6)]
        texts.append(" ".join(f"{name} is {age} years old and lives in {city}." for name, age, city in people))
    return [Asked(f"List all people of this text as JSON, with name, age and city:\n\n{text}", held) for text in texts]


def _free(num: int, greedy: SamplingParams) -> list[Asked]:
    drawn = [greedy.model_copy(update={"temperature": 1.0, "seed": seed}) for seed in range(num)]
    return [Asked(f"Write a story about {_TOPICS[i % len(_TOPICS)]}.", params) for i, params in enumerate(drawn)]


TASKS: dict[str, Callable[[int, SamplingParams], list[Asked]]] = {
    "quotes": _quotes,
    "code": _code,
    "json": _json,
    "free": _free,
}


class Bench:
    """`ref`: of the adapter in the folder, if there is one."""

    def __init__(self, base: BaseModel, folder: Path | None) -> None:
        self._tokenizer = Tokenizer.from_file(str(base.path / "tokenizer.json"))
        template = ChatTemplates.load(base.path).find(with_tools=False)
        assert template is not None, "the base has no chat template"
        self._template = template
        self.ref: AdapterRef | None = None
        if folder is not None:
            manifest = describe(folder, base)
            self.ref = manifest.ref(digest(manifest), folder.name, version=1)

        def load(ref: AdapterRef, packer: Packer) -> PackedAdapter:
            assert folder is not None
            return packer.pack(read_adapter(folder, base.config))

        spec = ServeSpec(base=base.name, pool_bytes=256 << 20, enable_prefix_caching=False)
        self.without = build_engine(spec.model_copy(update={"speculation": "off"}), base, load)
        self.with_guesses = build_engine(spec, base, load)

    def ask(self, engine: Engine, asked: Asked) -> Ran:
        text = self._template.render([{"role": "user", "content": asked.message}])
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        most = min(_MOST_PROMPT, engine.max_model_len(asked.adapter) - asked.params.max_tokens)
        engine.add(GenerateRequest("r", tuple(ids[-most:]), asked.params, asked.adapter))
        tokens: list[int] = []
        began = 0.0
        for output in finish(engine):
            if output.token_id is not None:
                began = began or time.perf_counter()
                tokens.append(output.token_id)
        return Ran(tokens, time.perf_counter() - began)

    def task(self, asked: Sequence[Asked]) -> tuple[list[float], int]:
        """Seconds without and with guesses, and how many tokens both took them for. SystemExit if they differ."""
        seconds, num_tokens = [0.0, 0.0], 0
        self.with_guesses.guess_tokens()
        for one in asked:
            ran = [self.ask(engine, one) for engine in (self.without, self.with_guesses)]
            if ran[0].tokens != ran[1].tokens:
                raise SystemExit(f"with guesses another answer was given to: {one.message}")
            num_tokens += len(ran[0].tokens) - 1
            seconds = [total + r.seconds for total, r in zip(seconds, ran, strict=True)]
        return seconds, num_tokens


def main(argv: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a base on this machine (default %(default)s)")
    parser.add_argument("--adapter", type=Path, help="a folder in PEFT's format; its task has the folder's name")
    parser.add_argument("--rows", type=Path, help="JSON lines with `messages`, for the adapter")
    parser.add_argument("--only", default="", help="tasks whose name contains this")
    parser.add_argument("--prompts", type=one_or_more, default=8, help="of each task (default %(default)s)")
    parser.add_argument("--tokens", type=one_or_more, default=160, help="of an answer (default %(default)s)")
    parser.add_argument("--rounds", type=one_or_more, default=3, help="the figures are medians (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    if (args.adapter is None) != (args.rows is None):
        parser.error("--adapter and --rows belong together")
    machine = describe_machine()
    click.echo(machine_line(machine))
    bench = Bench(bench_base(args.model), args.adapter)
    greedy = SamplingParams(max_tokens=args.tokens, temperature=0)
    tasks = {name: make(args.prompts, greedy) for name, make in TASKS.items()}
    if args.adapter is not None:
        lines = args.rows.read_text(encoding="utf-8").splitlines()[: args.prompts]
        asked = [json.loads(line)["messages"][0]["content"] for line in lines]
        tasks[args.adapter.name] = [Asked(message, greedy, bench.ref) for message in asked]
    check_only(args.only, [*tasks])
    rows, verdicts = list[list[Cell]](), list[Verdict]()
    for name, own in tasks.items():
        if args.only not in name:
            continue
        bench.task(own[:1])  # compiles constraints, measures the time of a step
        before = bench.with_guesses.stats()
        rounds: list[list[float]] = []
        num_tokens = 0
        for _ in range(args.rounds):
            seconds, num_tokens = bench.task(own)
            rounds.append(seconds)
        after = bench.with_guesses.stats()
        without, with_guesses = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(a / b for a, b in rounds)
        num_drafts = after.num_draft_tokens - before.num_draft_tokens
        num_right = after.num_accepted_tokens - before.num_accepted_tokens
        num_given = num_tokens * args.rounds
        rows.append(
            [
                name,
                num_tokens / without,
                num_tokens / with_guesses,
                ratio,
                num_given / max(1, num_given - num_right),
                num_drafts,
                num_right / max(1, num_drafts),
            ]
        )
        verdicts.append(Verdict(name, "≥", _FREE if name == "free" else _COPYING, ratio))
    report = Report(machine, _COLUMNS, rows, " ".join(sys.argv[1:] if argv is None else argv))
    click.echo("\n".join([report.text(), *(verdict.line() for verdict in verdicts)]))
    report.write(args.json)
    return report


if __name__ == "__main__":
    main()
