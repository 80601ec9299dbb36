"""DPO on two ranks does what one rank does, under every strategy; and what recipes refuse of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loray.bases.registry import BaseModel
from loray.errors import SpecError
from loray.spec import REWARDS, TrainSpec
from loray.train import checkpoint
from loray.train.checkpoint import FolderReporter
from loray.train.strategies import zero
from tests.train.pairs import curve, paired, run
from tests.train.ranks import run_ranks
from tests.train.strategies.test_strategies import STRATEGIES, assert_close
from tests.train.test_loop import TINY

SIZE = 2
TRAINING: dict[str, Any] = {
    "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
    "batch": {"rows": 2, "accumulation": 2},
    "checkpoint": {"interval_steps": 1},
    "max_steps": 3,
}


def spec_of(method: str, strategy: str, num_workers: int = SIZE) -> TrainSpec:
    fields = TRAINING if num_workers > 1 else TRAINING | {"batch": {"rows": 2, "accumulation": 2 * SIZE}}
    return paired(method, num_workers=num_workers, parallel={"strategy": strategy}, **fields)


def evaluations(reporter: FolderReporter) -> list[list[float]]:
    return [[e[name] for name in ("eval_loss", *REWARDS)] for e in reporter.events if e["event"] == "eval"]


def _run(rank: int, base: BaseModel, folder: Path, method: str, strategy: str) -> None:
    zero._PERSISTENT_ELEMENTS = 0  # so that ZeRO-3 shards a tiny model
    (folder / str(rank)).mkdir()
    reporter = run(spec_of(method, strategy), base, folder / str(rank))
    told = {"curve": curve(reporter), "eval": evaluations(reporter)}
    (folder / f"{rank}.json").write_text(json.dumps(told))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", ["lora", pytest.param("vera", marks=pytest.mark.slow)])
def test_two_ranks_do_what_one_does(
    method: str, strategy: str, base: BaseModel, tmp_path: Path
) -> None:
    (tmp_path / "alone").mkdir()
    alone = run(spec_of(method, "ddp", 1), base, tmp_path / "alone")
    run_ranks(_run, SIZE, tmp_path, base, tmp_path, method, strategy)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(SIZE))
    assert first == second
    for ours, theirs in zip(first["curve"], curve(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert first["eval"] == [pytest.approx(figures, rel=1e-4, abs=1e-5) for figures in evaluations(alone)]
    saved = checkpoint.read_optimizer(tmp_path / "0" / "run" / "step_000001")
    assert_close(saved.exp_avg, checkpoint.read_optimizer(alone.checkpoints[0].path).exp_avg, 1e-4)
    assert all(bool(torch.isfinite(t).all()) for t in saved.masters.values())


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("lora", {"batch": {"rows": 2, "order": "packed"}}, "batch.order packed joins rows"),
        ("lora", {"data": {"train": "x", "format": "chat"}}, "data.format chat has no pairs"),
        ("lora", {"init_adapter": "a@1"}, "DPO's reference is the base, and init_adapter starts elsewhere"),
        (
            "lora",
            {"attention": {"type": "s2"}, "num_workers": 2, "parallel": {"sequence": 2}},
            "DPO compares whole answers, which parallel.sequence splits: set it to 1",
        ),
        ("longlora", {}, "trained embeddings and norms stay on: set adapter.train_embeddings"),
        ("lora", {"objective": {"type": "sft"}, "data": {"train": "x", "format": "preference"}}, "is for pairs: set"),
        ("lora", {"objective": {"type": "dpo", "label_smoothing": 0.1}}, "loss_type robust and label_smoothing"),
        ("lora", {"objective": {"type": "dpo", "loss_type": "robust"}}, "loss_type robust and label_smoothing"),
    ],
)
def test_what_does_not_go_with_pairs_is_refused(method: str, fields: dict[str, Any], message: str) -> None:
    objective = fields.pop("objective", {"type": "dpo"})
    with pytest.raises(SpecError) as error:
        paired(method, objective, **fields)
    assert message in str(error.value)
