"""Whether reinforcement learning learns: SmolLM2 says which of two numbers is larger, and is rewarded.

    python -m benchmarks.quality.rl                      three seeds and a control for each, 120 steps: most of an hour
    python -m benchmarks.quality.rl --steps 20 --seeds 0 --no-control --held-out 50
    python -m benchmarks.quality.rl --digits 3           where two digits are too easy
    python -m benchmarks.quality.rl --shots 0            the question alone, which the base hardly ever answers as asked

"Which number is larger, 47 or 83? Answer with the number only.", after --shots such questions with answers. The
reward is 1 where the first number of the answer is the larger one and nothing but a full stop follows, else 0
(`builtin: number`). No pair of the 400 rows that are trained is among the 200 that are held out. A control gets a
coin as its reward; its steps have no direction and stray, so that there is one for each seed. All answer the held-out
rows greedily over HTTP, the base before and each published version afterwards, so that one judge judges all.

A cluster of its own runs in --home, with `loray up` and a `loray train` for each run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import click
import httpx
import numpy as np

from benchmarks.report import Report
from benchmarks.world import describe_machine, run_loray
from loray.local.processes import free_ports
from loray.spec import RewardSpec
from loray.train.rl.rewards import reward_of

BASE = "smollm2"
COLUMNS = (
    "run",
    "base, %\t.1f",
    "trained, %\t.1f",
    "gain, points\t+.1f",
    "reward, first tenth\t.2f",
    "reward, last tenth\t.2f",
    "mismatch, mean\t.2g",
    "mismatch, max\t.2g",
    "groups alike, %\t.0f",
    "s a step\t.1f",
    "of it sampling\t.1f",
    "training\t.1f",
    "publishing\t.2f",
)
_COIN = '''"""A coin, which knows nothing of the answer."""

import random


def reward(row, answer):
    return float(random.random() < 0.5)
'''
_AT_ONCE = 8


class Pair(NamedTuple):
    first: int
    second: int

    def messages(self, shots: Sequence[Pair] = ()) -> list[dict[str, str]]:
        """Ask which is larger, after `shots` that are answered."""
        asked = [
            {"role": "user", "content": f"Which number is larger, {a} or {b}? Answer with the number only."}
            for a, b in (*shots, self)
        ]
        answers = [{"role": "assistant", "content": str(max(pair))} for pair in shots]
        return [message for turn in zip(asked, answers, strict=False) for message in turn] + asked[-1:]

    def row(self, shots: Sequence[Pair] = ()) -> dict[str, Any]:
        return {"messages": self.messages(shots), "answer": max(self)}


def pairs(digits: int, num_train: int, num_held_out: int) -> tuple[list[Pair], list[Pair]]:
    """Draw pairs of different numbers with so many digits, none of them twice, in whichever order."""
    low, high = 10 ** (digits - 1), 10**digits
    random = np.random.default_rng(0)
    found: dict[frozenset[int], Pair] = {}
    while len(found) < num_train + num_held_out:
        first, second = random.integers(low, high, 2).tolist()
        if first != second:
            found.setdefault(frozenset((first, second)), Pair(first, second))
    drawn = list(found.values())
    return drawn[:num_train], drawn[num_train:]


class Run(NamedTuple):
    """A run's name, the label of what it published, and its events."""

    name: str
    label: str
    events: list[dict[str, Any]]


class Deployment:
    """`loray up` in a home of its own."""

    def __init__(self, home: Path, port: int) -> None:
        self._home, self._port = home, port

    @classmethod
    @contextmanager
    def started(cls, home: Path) -> Iterator[Deployment]:
        (port,) = free_ports(1)
        deployment = cls(home, port)
        try:
            run_loray(home, "base", "add", BASE)
            run_loray(home, "up", "--base", BASE, "--port", str(port))
            yield deployment
        finally:
            run_loray(home, "down")

    def train(self, recipe: Mapping[str, Any], folder: Path) -> Run:
        name = recipe["name"]
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps(recipe))
        published = json.loads(run_loray(self._home, "train", str(file), "--no-plan", "--json"))
        (run, *_) = sorted((self._home / "runs" / name).iterdir(), reverse=True)
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        return Run(name, published["label"], events)

    def accuracy(self, model: str, held_out: Sequence[Pair], shots: Sequence[Pair], max_tokens: int) -> float:
        """Judge greedy answers; a share."""
        reward = reward_of(RewardSpec(builtin="number", field="answer"))

        def judged(pair: Pair) -> float:
            body = {"model": model, "temperature": 0, "max_tokens": max_tokens}
            response = client.post("/v1/chat/completions", json=body | {"messages": pair.messages(shots)})
            response.raise_for_status()
            found = reward(pair.row(), response.json()["choices"][0]["message"]["content"])
            assert isinstance(found, float)
            return found

        with (
            httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=120) as client,
            ThreadPoolExecutor(_AT_ONCE) as pool,
        ):
            return fmean(pool.map(judged, held_out))


def recipe(args: argparse.Namespace, seed: int, *, is_control: bool) -> dict[str, Any]:
    """Make the recipe of a run."""
    reward = {"function": "coin:reward"} if is_control else {"builtin": "number", "field": "answer"}
    return {
        "name": f"larger-{'coin-' if is_control else ''}{seed}",
        "base": BASE,
        "objective": {
            "type": "rl",
            "loss": "ppo",
            "group_size": 8,
            "prompts_per_step": 4,
            "max_tokens": args.max_tokens,
            "max_staleness": args.max_staleness,
            "reward": reward,
        },
        "adapter": {"method": "lora", "rank": 8},
        "data": {"train": "train.jsonl", "eval": "held_out.jsonl"},
        "optimizer": {"learning_rate": args.learning_rate, "schedule": "constant", "warmup_ratio": 0.0},
        "max_steps": args.steps,
        "evaluation": {"interval_steps": args.interval, "max_rows": args.held_out, "keep_best": False},
        "tracking": [],
        "seed": seed,
    }


def row(run: Run, base: float, trained: float) -> list[Any]:
    """Make a row of the table."""
    found = [event["metrics"] for event in run.events if event["event"] == "rollout"]
    rewards = [metrics["reward_mean"] for metrics in found]
    tenth = max(1, len(rewards) // 10)
    apart = [metrics for metrics in found if "mismatch_mean" in metrics]
    seconds = [fmean(metrics.get(name, 0.0) for metrics in found) for name in ("sample_s", "train_s", "publish_s")]
    alike = sum(m["groups_dropped"] for m in found) / sum(m["groups_dropped"] + m["groups_kept"] for m in found)
    return [
        run.name,
        100 * base,
        100 * trained,
        100 * (trained - base),
        fmean(rewards[:tenth]),
        fmean(rewards[-tenth:]),
        fmean(metrics["mismatch_mean"] for metrics in apart) if apart else None,
        max((metrics["mismatch_max"] for metrics in apart), default=None),
        100 * alike,
        sum(seconds),
        *seconds,
    ]


def verdicts(gains: Mapping[str, float]) -> list[str]:
    """Say which bounds hold: a mean gain of 20 points, 10 for each seed, and none beyond 7 for the controls."""
    seeds = {name: gain for name, gain in gains.items() if "coin" not in name}
    lines = [
        f"mean gain {fmean(seeds.values()):+.1f} points, at least +20: {_said(fmean(seeds.values()) >= 20)}",
        f"least gain of a seed {min(seeds.values()):+.1f}, at least +10: {_said(min(seeds.values()) >= 10)}",
    ]
    coins = [gain for name, gain in gains.items() if "coin" in name]
    lines += [f"control {gain:+.1f}, within ± 7: {_said(abs(gain) <= 7)}" for gain in coins]
    if len(coins) > 1:
        lines.append(f"mean of the controls {fmean(coins):+.1f}, within ± 7: {_said(abs(fmean(coins)) <= 7)}")
    return lines


def _said(holds: bool) -> str:
    return "yes" if holds else "NO"


def main(argv: Sequence[str] | None = None) -> Report:
    args = _parser().parse_args(argv)
    machine = describe_machine()
    home = args.home or Path(tempfile.mkdtemp(prefix="loray-rl-"))
    train, held_out = pairs(args.digits, args.shots + args.rows, args.held_out)
    shots, train = train[: args.shots], train[args.shots :]
    folder = home / "larger"
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawn in (("train", train), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(pair.row(shots))}\n" for pair in drawn))
    (folder / "coin.py").write_text(_COIN)
    click.echo(f"{len(train)} pairs of {args.digits}-digit numbers to train, {len(held_out)} held out; {home}")
    rows: list[list[Any]] = []
    curves: dict[str, dict[int, float]] = {}
    gains: dict[str, float] = {}
    with Deployment.started(home) as deployment:
        base = deployment.accuracy(BASE, held_out, shots, args.max_tokens)
        click.echo(f"{BASE} answers {base:.1%} of the held-out rows right")
        if not 0.05 <= base <= 0.75:
            click.echo("that is outside of 5 to 75 %: --digits and --shots make other tasks")
        kinds = [False] if args.no_control else [False, True]
        runs = [(seed, is_control) for is_control in kinds for seed in args.seeds]
        for seed, is_control in runs:
            began = time.monotonic()
            run = deployment.train(recipe(args, seed, is_control=is_control), folder)
            trained = deployment.accuracy(run.label, held_out, shots, args.max_tokens)
            rows.append(row(run, base, trained))
            gains[run.name] = 100 * (trained - base)
            curves[run.name] = {e["step"]: e["reward"] for e in run.events if e["event"] == "eval"}
            steps = ", ".join(f"{step}: {reward:.3f}" for step, reward in curves[run.name].items())
            click.echo(f"{run.label}: {trained:.1%} after {time.monotonic() - began:,.0f} s; held out by step {steps}")
    report = Report(machine, COLUMNS, rows, " ".join(argv or sys.argv[1:]), {"curves": curves})
    click.echo(report.text())
    click.echo("\n".join(verdicts(gains)))
    report.write(args.json)
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--steps", type=int, default=120)
    add("--digits", type=int, default=2)
    add("--shots", type=int, default=2, help="questions with their answers before the one that is asked")
    add("--rows", type=int, default=400, help="pairs to train on")
    add("--held-out", type=int, default=200)
    add("--interval", type=int, default=20, help="steps between two evaluations")
    add("--max-tokens", type=int, default=8)
    add("--max-staleness", type=int, default=1)
    add("--learning-rate", type=float, default=1e-4)
    add("--no-control", action="store_true", help="without the runs whose reward is a coin")
    add("--home", type=Path, help="of the cluster; default: a new folder")
    add("--json", type=Path, help="write everything there too")
    return parser


if __name__ == "__main__":
    main()
