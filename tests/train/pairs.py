"""A task of preferences for tiny models: letters that go on in order are better than those that go back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loray.bases.registry import BaseModel
from loray.spec import TrainSpec
from loray.train.checkpoint import FolderReporter
from loray.train.data.rows import Dataset, load_data
from loray.train.loop import train
from tests.fixtures.tiny import byte_tokenizer
from tests.train.test_loop import METHODS, recipe

MAX_LENGTH = 48


def pair(i: int) -> dict[str, str]:
    """Answers of different lengths."""
    letters = [chr(97 + (i + t) % 26) for t in range(40)]
    prompt, rest = letters[: 4 + i % 5], letters[4 + i % 5 :]
    return {
        "prompt": "".join(prompt),
        "chosen": "".join(rest[: 6 + i % 7]),
        "rejected": "".join(reversed(prompt)) + "".join(rest[: i % 4]),
    }


def paired(method: str = "lora", objective: dict[str, Any] | None = None, **fields: Any) -> TrainSpec:
    plain = {"adapter": METHODS[method]["adapter"] | {"dropout": 0.0}, "data": {"train": "x", "eval_fraction": 0.25}}
    plain |= {"batch": {"rows": 2, "accumulation": 2}}
    return recipe(method, objective={"type": "dpo"} | (objective or {}), **(plain | fields))


def make_pairs(folder: Path, spec: TrainSpec, *, number: int = 32) -> Dataset:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair(i)) + "\n" for i in range(number)))
    source = spec.data.model_copy(update={"train": str(path)})
    return load_data(source, byte_tokenizer(), max_length=MAX_LENGTH, max_eval_rows=8, seed=spec.seed, paired=True)


def run(spec: TrainSpec, base: BaseModel, folder: Path, name: str = "run", **options: Any) -> FolderReporter:
    reporter = FolderReporter(folder / name, keep=9)
    train(spec, base, make_pairs(folder, spec), reporter=reporter, workdir=folder, **options)
    return reporter


def curve(reporter: FolderReporter) -> list[tuple[float, ...]]:
    keys = ("step", "loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    return [tuple(e[key] for key in keys) for e in reporter.events if e["event"] == "step"]
