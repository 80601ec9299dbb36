"""The reference of pairs: exactly what the model said before the first step, by row, computed once and kept."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from loray.bases.registry import BaseModel
from loray.errors import TrainingError
from loray.methods.attach import InitialAdapter
from loray.spec import REWARDS, DataSource, TrainSpec
from loray.train import checkpoint
from loray.train.checkpoint import FolderReporter
from loray.train.data import kept
from loray.train.data.batches import TrainBatch
from loray.train.data.rows import Dataset, load_data
from loray.train.data.shards import FolderCache
from loray.train.model import build_model
from loray.train.objectives import log_probs
from loray.train.reference import Reference
from tests.fixtures.ranks import run_ranks
from tests.fixtures.tiny import byte_tokenizer
from tests.fixtures.training import (
    MAX_PAIR_LENGTH,
    METHODS,
    assert_equal,
    curve,
    masters,
    pair,
    paired,
    recipe,
    run,
)


class Killed(Exception):
    pass


class Counting(FolderReporter):
    """Counts pairs that the pass has computed; dies after `most` of them."""

    def __init__(self, folder: Path, most: int = 1 << 30) -> None:
        super().__init__(folder, keep=9)
        self.num_pairs, self._most = 0, most

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        super().report(metrics, checkpoint)
        if metrics["event"] == "progress" and metrics["stage"] == "computing the reference of pairs":
            self.num_pairs = metrics["done"]
            if self.num_pairs >= self._most:
                raise Killed


def kept_data(folder: Path, spec: TrainSpec) -> Dataset:
    """Pairs whose tokens, and references, stay in a folder."""
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair(i)) + "\n" for i in range(32)))
    source = spec.data.model_copy(update={"train": str(path)})
    cache = FolderCache(folder / "tokens")
    options: dict[str, Any] = {"max_length": MAX_PAIR_LENGTH, "max_eval_rows": 8, "seed": spec.seed, "cache": cache}
    return load_data(source, byte_tokenizer(), formats=spec.objective.formats, **options)


def computed(spec: TrainSpec, base: BaseModel, folder: Path, name: str, **options: Any) -> Counting:
    """Run, and give what was reported."""
    reporter = Counting(folder / name, options.pop("most", 1 << 30))
    run(spec, base, folder, reporter=reporter, data=options.pop("data", None) or kept_data(folder, spec), **options)
    return reporter


def first_rewards(reporter: FolderReporter) -> list[float]:
    """Rewards and margins of the first step, and of the first evaluation."""
    events = [next(e for e in reporter.events if e["event"] == kind) for kind in ("step", "eval")]
    return [event[name] for event in events for name in REWARDS if name != "rewards/accuracies"]


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_a_run_is_the_one_that_computes_its_reference_in_each_step_bit_for_bit(
    method: str, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = paired(method, max_steps=6)  # of an epoch
    _, once = run(spec, base, tmp_path, name="once")
    assert first_rewards(once) == [0.0] * 6
    untrained = build_model(base, spec).eval()

    @torch.no_grad()
    def joined(self: Reference, batch: TrainBatch) -> TrainBatch:
        return batch._replace(reference_B=log_probs(untrained, batch)[0])

    monkeypatch.setattr(Reference, "joined", joined)
    _, each = run(spec, base, tmp_path, name="each")
    assert curve(once) == curve(each)
    assert_equal(masters(once), masters(each))


def test_it_is_by_row_in_mixtures_and_epochs(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = paired(max_steps=24, optimizer={"learning_rate": 1e-9})
    paths = [tmp_path / f"{name}.jsonl" for name in ("twice", "quarter")]
    for path, numbers in zip(paths, (range(8), range(8, 32)), strict=True):
        path.write_text("".join(json.dumps(pair(i)) + "\n" for i in numbers))
    sources = tuple(DataSource(path=str(p), weight=w) for p, w in zip(paths, (2, 0.25), strict=True))
    source = spec.data.model_copy(update={"train": sources})
    data = load_data(source, byte_tokenizer(), max_length=48, max_eval_rows=8, seed=0, formats=spec.objective.formats)
    untrained = build_model(base, spec).eval()
    met, given = set[int](), Reference.joined

    def checked(self: Reference, batch: TrainBatch) -> TrainBatch:
        batch = given(self, batch)
        with torch.no_grad():
            torch.testing.assert_close(batch.reference_B, log_probs(untrained, batch)[0])
        met.update(row for (row,) in batch.rows)
        return batch

    monkeypatch.setattr(Reference, "joined", checked)
    reporter = computed(spec, base, tmp_path, "run", data=data)
    assert len(met) > 1.5 * data.report.num_rows  # of twice as many, over epochs that each draw other ones
    assert reporter.num_pairs >= len(met) / 2 + data.report.num_eval_rows


def test_another_run_and_one_that_was_killed_go_on_with_what_is_kept(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_AT_ONCE", 3)
    spec = paired(max_steps=12, checkpoint={"interval_steps": 6})  # 24 pairs and 8 held out, two at a time
    with pytest.raises(Killed):
        computed(spec, base, tmp_path, "killed", most=12)
    went_on = computed(spec, base, tmp_path, "went on")
    assert went_on.num_pairs == 32 - 12
    again = computed(spec, base, tmp_path, "again")
    assert (again.num_pairs, curve(again)) == (0, curve(went_on))
    faster = paired(max_steps=3, optimizer={"learning_rate": 3e-2, "warmup_steps": 1}, objective={"beta": 0.5})
    assert computed(faster, base, tmp_path, "faster").num_pairs == 0
    assert computed(paired(max_steps=2, dtype="bfloat16"), base, tmp_path, "bf16").num_pairs == 8 + 8
    # All that a resumed run has lost is computed by the model before the first step, not by the trained one.
    shutil.rmtree(tmp_path / "tokens")
    resumed = computed(spec, base, tmp_path, "resumed", resume_from=went_on.checkpoints[0].path)
    assert resumed.num_pairs == 32
    assert curve(resumed) == curve(went_on)[6:]
    assert_equal(masters(resumed), masters(went_on))


def test_what_is_not_finite_is_said(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loray.train.objectives.log_probs", lambda model, batch: (torch.full((4,), math.nan), None))
    with pytest.raises(TrainingError, match="log-probability of an answer is not finite before any training"):
        run(paired(), base, tmp_path)


def test_a_damaged_note_is_computed_again(base: BaseModel, tmp_path: Path) -> None:
    spec = paired(max_steps=1)
    computed(spec, base, tmp_path, "first")
    for path in (tmp_path / "tokens").rglob("*.note"):
        path.write_bytes(path.read_bytes()[:40])
    assert computed(spec, base, tmp_path, "second").num_pairs == 4 + 8


@pytest.mark.parametrize("method", ["lora", "longlora"])
def test_pairs_go_on_from_an_adapter_with_trained_embeddings_and_norms_too(
    method: str, base: BaseModel, tmp_path: Path
) -> None:
    sections = {"adapter": METHODS[method]["adapter"] | {"dropout": 0.0}}
    _, tuned = run(recipe(method, **sections), base, tmp_path, name="tuned")
    initial = InitialAdapter("a" * 64, tuned.best.path / checkpoint.ADAPTER)
    spec = paired(method, init_adapter="tuned@1", max_steps=24)
    (tmp_path / "pairs").mkdir()
    _, reporter = run(spec, base, tmp_path / "pairs", initial=initial)
    assert first_rewards(reporter) == [0.0] * 6
    before, _ = (e for e in reporter.events if e["event"] == "eval")
    assert (before["subject"], before["eval_loss"]) == ("parent", pytest.approx(math.log(2), abs=1e-7))
    assert min(e["loss"] for e in reporter.events if e["event"] == "step") < 0.5
    assert checkpoint.read_state(reporter.best.path).parent == "a" * 64


# -- rows that several ranks share ------------------------------------------------------------------------------------


def shared(attention: str, size: int) -> TrainSpec:
    return paired(
        num_workers=4 if size > 1 else 1,
        parallel={"sequence": size},
        attention={"type": attention, "group_size": 16} if attention == "s2" else {"type": attention},
        batch={"rows": 2, "accumulation": 1 if size > 1 else 2},
        optimizer={"learning_rate": 1e-2, "schedule": "constant"},
        evaluation={"interval_steps": 2},
        max_steps=4,
    )


def told(reporter: FolderReporter) -> list[list[float]]:
    evaluated = [e for e in reporter.events if e["event"] == "eval"]
    return [list(row) for row in curve(reporter)] + [[e[n] for n in ("eval_loss", *REWARDS)] for e in evaluated]


def _run_shared(rank: int, base: BaseModel, folder: Path, attention: str) -> None:
    (folder / str(rank)).mkdir()
    _, reporter = run(shared(attention, 2), base, folder / str(rank))
    (folder / f"{rank}.json").write_text(json.dumps([first_rewards(reporter), *told(reporter)]))


@pytest.mark.parametrize("attention", ["dense", "s2"])
def test_ranks_that_share_rows_do_what_one_does(attention: str, base: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    _, alone = run(shared(attention, 1), base, tmp_path / "alone")
    run_ranks(_run_shared, 4, tmp_path, base, tmp_path, attention)
    zeros, *ours = json.loads((tmp_path / "0.json").read_text())
    assert zeros == [0.0] * 6
    for mine, theirs in zip(ours, told(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
