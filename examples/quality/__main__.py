"""Task scores of LoRA, rsLoRA and VeRA after equally many training steps, in loray and in PEFT, on SmolLM2-135M.

    python -m examples.quality DATA                       three tasks
    python -m examples.quality DATA --tasks e2e --seeds 1
    python -m examples.quality DATA --methods "LoRA r16" --modules attention linear --no-peft --one-rate

DATA holds e2e_train.jsonl, e2e_validation.jsonl, gsm8k_train.jsonl, gsm8k_validation.jsonl, t0_many_tasks.parquet.
docs/benchmarks/quality.md explains the tables and the picture.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import click

from benchmarks.report import machine_line, write_json
from benchmarks.world import describe_machine, run_modules
from examples.quality.report import Result, plot, table
from examples.quality.setting import METHODS, MODULES, Run, Setting, System, best_of
from examples.quality.tasks import TASKS, Question, Task
from loray.bases.registry import add_base
from loray.settings import Settings


@dataclass
class Benchmark:
    """`folder` keeps adapters and results; a training whose result is there for an equal setting is not repeated.

    With `has_one_rate` the best rate of a method on its modules is searched on the first task, and the others take it.
    """

    home: Path
    base: str
    data: Path
    folder: Path
    steps: int
    batch_tokens: int
    seeds: tuple[int, ...]
    num_questions: int
    threads: int
    methods: tuple[str, ...]
    modules: tuple[str, ...]
    has_peft: bool
    has_one_rate: bool
    _rates: dict[tuple[str, str], float] = field(default_factory=dict, init=False)

    def run(self, task: Task) -> list[Result]:
        """The base's result, then loray's and PEFT's for each method on each set of modules."""
        folder = self.folder / task.name
        folder.mkdir(parents=True, exist_ok=True)
        questions, rest = _split(task.questions(self.data), self.num_questions)
        _write_rows(folder / "train.jsonl", task.pairs(self.data))
        _write_rows(folder / "eval.jsonl", [(q.prompt, _completion(q)) for q in rest])
        results = [Result(task.name, task.metric, "base", "base", ())]
        for adapter in product(self.methods, self.modules):
            click.echo(f"{task.name}: {', '.join(adapter)}", err=True)
            known = (self._rates[adapter],) if adapter in self._rates else ()
            results.append(self._train(task, "loray", adapter, self.seeds, known))
            best = best_of(results[-1].runs).rate
            if self.has_one_rate:
                self._rates[adapter] = best
            if self.has_peft:
                results.append(self._train(task, "peft", adapter, self.seeds[:1], (best,)))
        adapters = [run.folder for result in results for run in result.final if run.folder]
        base, *scores = self._scores(task, folder, questions, adapters)
        results[0].scores, left = (base,), iter(scores)
        for result in results[1:]:  # a diverged run has no adapter
            result.scores = tuple(next(left) if run.folder else math.nan for run in result.final)
        return results

    def _train(
        self, task: Task, system: System, adapter: tuple[str, str], seeds: tuple[int, ...], rates: tuple[float, ...]
    ) -> Result:
        folder, name = self.folder / task.name, ", ".join(adapter)
        setting = Setting(
            str(self.home), self.base, str(folder), system, *adapter, self.steps, self.batch_tokens, seeds, rates
        )
        found = self._found(setting, folder / f"{system}-{'-'.join(adapter)}.json".replace(" ", "-"))
        runs = tuple(Run.from_dict(r) for r in found["runs"])
        return Result(task.name, task.metric, name, system, runs, found["peak_bytes"])

    def _found(self, setting: Setting, kept: Path) -> dict[str, Any]:
        if kept.is_file():
            saved = json.loads(kept.read_text(encoding="utf-8"))
            if Setting.from_dict(saved["setting"]) == setting:
                return dict(saved["found"])
        command = ["examples.quality.worker", json.dumps(setting.to_dict())]
        (found,) = run_modules([command], self.threads)
        kept.write_text(json.dumps({"setting": setting.to_dict(), "found": found}, indent=2) + "\n", encoding="utf-8")
        return found

    def _scores(self, task: Task, folder: Path, questions: Sequence[Question], adapters: list[str]) -> list[float]:
        asked = {"prompts": [q.prompt for q in questions], "max_tokens": task.max_tokens, "adapters": adapters}
        file = folder / "questions.json"
        file.write_text(json.dumps(asked), encoding="utf-8")
        (found,) = run_modules([["examples.quality.answers", str(self.home), self.base, str(file)]], self.threads)
        (folder / "answers.json").write_text(json.dumps(found["answers"], indent=1) + "\n", encoding="utf-8")
        return [task.score(answers, questions) for answers in found["answers"]]


def main(argv: Sequence[str] | None = None) -> list[Result]:
    args = _parser().parse_args(argv)
    base = add_base(args.base, home=args.home.absolute())
    machine = describe_machine()
    click.echo(machine_line(machine))
    click.echo(
        f"{base.name}, bf16, {args.threads} threads; {args.steps} steps of {args.batch_tokens} tokens, padding "
        f"included; {args.seeds} seeds, {args.questions} questions"
    )
    benchmark = Benchmark(
        home=args.home.absolute(),
        base=base.name,
        data=args.data,
        folder=args.folder.absolute(),
        steps=args.steps,
        batch_tokens=args.batch_tokens,
        seeds=tuple(range(args.seeds)),
        num_questions=args.questions,
        threads=args.threads,
        methods=tuple(args.methods),
        modules=tuple(args.modules),
        has_peft=not args.no_peft,
        has_one_rate=args.one_rate,
    )
    results: list[Result] = []
    for name in args.tasks:
        found = benchmark.run(TASKS[name])
        click.echo("\n" + table(found))
        results += found
    if args.plot:
        plot(results, args.plot)
    write_json(args.json, {"machine": machine, "results": [r.to_dict() for r in results]})
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", type=Path, help="folder of the tasks' files")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--modules", nargs="+", choices=MODULES, default=["linear"], help="that adapters are on, one after the other")
    add("--no-peft", action="store_true", help="train in loray alone")
    add("--one-rate", action="store_true", help="search the rate on the first task alone")
    add("--steps", type=int, default=24)
    add("--batch-tokens", type=int, default=768, help="of a step, padding included")
    add("--seeds", type=int, default=3)
    add("--questions", type=int, default=100, help="of each task, at most")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--folder", type=Path, default=Path(".cache/quality"), help="keeps adapters, answers and finished results")
    add("--base", default="smollm2", help="or the folder of a checkpoint")
    add("--home", type=Path, default=Settings.from_env().home, help="where the base is, or is made")
    add("--plot", type=Path, help="write the picture there, as SVG")
    add("--json", type=Path, help="write everything there too")
    return parser


def _completion(question: Question) -> str:
    """The first reference as a completion. E2E's completions begin with a space; its references do not."""
    text = question.references[0]
    return text if question.prompt[-1:].isspace() or text[:1].isspace() else f" {text}"


def _split(questions: list[Question], count: int) -> tuple[list[Question], list[Question]]:
    """(questions to score, questions for choosing the rate). Both are spread over the file and do not overlap; at most
    half are scored.
    """
    every = max(2, len(questions) // count)
    scored = questions[::every][:count]
    return scored, [q for i, q in enumerate(questions) if i % every]


def _write_rows(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    lines = (json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
