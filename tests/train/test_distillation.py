"""Distillation from another base: asked once, kept, joined to the rows of any batch; a student that learns from it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from loray.bases.registry import BaseModel
from loray.errors import DataError, SpecError
from loray.spec import TrainSpec
from loray.train import checkpoint
from loray.train.checkpoint import FolderReporter
from loray.train.data import kept
from loray.train.data.batches import IGNORED, collate
from loray.train.data.lessons import TOP, lessons_of, teach
from loray.train.data.rows import Dataset, load_data
from loray.train.data.shards import FolderCache
from loray.train.teacher import BaseTeacher
from tests.fixtures.models import BaseFactory
from tests.fixtures.ranks import run_ranks
from tests.fixtures.tiny import byte_tokenizer
from tests.fixtures.training import METHODS, assert_equal, curve, masters, recipe, run

K = 8


def distilled(**fields: Any) -> TrainSpec:
    objective = {"type": "distill", "teacher": "wise", "top_k": K} | fields.pop("objective", {})
    plain = {"adapter": METHODS["lora"]["adapter"] | {"dropout": 0.0}}
    return recipe(objective=objective, **(plain | fields))


def rows_in(folder: Path, spec: TrainSpec) -> Dataset:
    """Prompts and completions, whose tokens and lessons stay in a folder."""
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    letters = [chr(97 + i) for i in range(26)]
    spans = ((i, i + 5, i + 9 + i % 4) for i in range(14))
    rows = [{"prompt": "".join(letters[a:b]), "completion": "".join(letters[b:c])} for a, b, c in spans]
    if not path.exists():  # ranks share it
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = spec.data.model_copy(update={"train": str(path), "format": "raw"})
    cache = FolderCache(folder / "tokens")
    joined = spec.batch.order == "concat"
    return load_data(
        source, byte_tokenizer(), max_length=64, max_eval_rows=6, seed=spec.seed, cache=cache, joined=joined
    )


@pytest.fixture(scope="session")
def wise(tiny_base: BaseFactory) -> BaseModel:
    """Another base of the same tokenizer."""
    return tiny_base(std=0.3, seed=7)


@pytest.mark.parametrize("order", ["shuffled", "packed"])
def test_a_batch_has_what_the_teacher_says_of_its_targets(
    order: str, base: BaseModel, wise: BaseModel, tmp_path: Path
) -> None:
    spec = distilled(batch={"rows": 3, "order": order}, num_epochs=1, max_steps=None)
    data = rows_in(tmp_path, spec)
    teacher = BaseTeacher(wise, "float32", torch.device("cpu"), K)
    lessons = lessons_of(spec, data, ["wise"], K, base.config.vocab_size)
    told = list(teach(lessons, data, lambda rows: map(teacher.top, rows)))
    assert told[0] == {"stage": "asking the teacher", "done": 0, "total": 14}
    assert told[-1]["done"] == 14
    assert not any(part.missing for part in lessons_of(spec, data, ["wise"], K, base.config.vocab_size))
    assert any(part.missing for part in lessons_of(spec, data, ["wiser"], K, base.config.vocab_size))

    theirs = AutoModelForCausalLM.from_pretrained(wise.path, dtype=torch.float32)
    stream = data.stream(spec)
    trained = pickle.loads(pickle.dumps(lessons[0]))
    batches = [(trained.joined(batch), data.train) for batch in stream.next_step()]
    held_out = collate(data.evaluation, ((0,), (1,)), packed=False)
    for batch, rows in (*batches, (lessons[1].joined(held_out), data.evaluation)):
        ids_BTK, log_probs_BTK = batch.teacher_ids_BTK, batch.teacher_log_probs_BTK
        assert ids_BTK is not None
        assert log_probs_BTK is not None
        assert not log_probs_BTK[batch.labels_BT == IGNORED].any()
        for b, row in enumerate(batch.rows):
            at = 0
            for number in row:
                ids, targets = rows.row(number)
                with torch.no_grad():
                    logits_TV = theirs(torch.from_numpy(ids[None].astype(np.int64))).logits[0, :-1]
                best, learned_T = logits_TV.log_softmax(1).topk(K), torch.from_numpy(targets[1:].copy())
                span = slice(at, at + len(ids) - 1)
                assert ids_BTK[b, span][learned_T].long().equal(best.indices[learned_T])
                torch.testing.assert_close(log_probs_BTK[b, span][learned_T], best.values[learned_T])
                at += len(ids)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_student_comes_nearer_to_its_teacher(
    divergence: str, base: BaseModel, wise: BaseModel, tmp_path: Path
) -> None:
    spec = distilled(
        objective={"divergence": divergence, "weight": 0.9},
        optimizer={"learning_rate": 2e-2, "warmup_steps": 2},
        max_steps=24,
        gradient_checkpointing=divergence == "reverse",
    )
    _, reporter = run(spec, base, tmp_path, data=rows_in(tmp_path, spec), teacher=wise)
    before, after = (e["divergence"] for e in reporter.events if e["event"] == "eval")
    # Held-out rows of a random teacher, whose few likely tokens are hard to guess: the reverse one hardly moves.
    assert after < before * (1.0 if divergence == "forward" else 1.02)
    for event in (e for e in reporter.events if e["event"] in ("step", "eval")):
        loss = event.get("loss", event.get("eval_loss"))
        assert loss == pytest.approx(0.9 * event["divergence"] + 0.1 * event["cross_entropy"], rel=1e-5)
    state = checkpoint.read_state(reporter.best.path)
    assert {e.metric for e in state.evaluations()} == {"loss", "divergence", "cross_entropy"}


class Killed(Exception):
    pass


class Mortal(FolderReporter):
    """Dies when the teacher has said something of so many rows."""

    def __init__(self, folder: Path, most: int = 1 << 30) -> None:
        super().__init__(folder, keep=9)
        self.num_rows, self._most = 0, most

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        super().report(metrics, checkpoint)
        if metrics["event"] == "progress":
            self.num_rows = metrics["done"]
            if self.num_rows >= self._most:
                raise Killed


def test_a_killed_and_a_repeated_run_go_on_with_what_was_said(
    base: BaseModel, wise: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_AT_ONCE", 2)
    spec = distilled(max_steps=4, checkpoint={"interval_steps": 2})

    def told(name: str, most: int = 1 << 30, **options: Any) -> Mortal:
        reporter = Mortal(tmp_path / name, most)
        run(spec, base, tmp_path, reporter=reporter, data=rows_in(tmp_path, spec), teacher=wise, **options)
        return reporter

    with pytest.raises(Killed):
        told("killed", 4)
    unbroken = told("went on")
    assert unbroken.num_rows == 14 - 4
    again = told("again")
    assert (again.num_rows, curve(again)) == (0, curve(unbroken))
    resumed = told("resumed", resume_from=unbroken.checkpoints[0].path)
    assert (resumed.num_rows, curve(resumed)) == (0, curve(unbroken)[2:])
    assert_equal(masters(resumed), masters(unbroken))


def _run_shared(rank: int, base: BaseModel, wise: BaseModel, folder: Path) -> None:
    spec = shared(2)
    _, reporter = run(spec, base, folder, name=str(rank), data=rows_in(folder, spec), teacher=wise)
    (folder / f"{rank}.json").write_text(json.dumps(curve(reporter)))


def shared(size: int) -> TrainSpec:
    return distilled(
        num_workers=4 if size > 1 else 1,
        parallel={"sequence": size},
        attention={"type": "dense"},
        batch={"rows": 2, "accumulation": 1 if size > 1 else 2},
        max_steps=3,
    )


def test_ranks_that_share_rows_learn_what_one_does(base: BaseModel, wise: BaseModel, tmp_path: Path) -> None:
    spec = shared(1)
    _, alone = run(spec, base, tmp_path, data=rows_in(tmp_path / "alone", spec), teacher=wise)
    rows_in(tmp_path, shared(2))
    run_ranks(_run_shared, 4, tmp_path, base, wise, tmp_path)
    ours = json.loads((tmp_path / "0.json").read_text())
    for mine, theirs in zip(ours, curve(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_what_cannot_be_distilled_is_said(base: BaseModel, tmp_path: Path) -> None:
    spec = distilled()
    data = rows_in(tmp_path, spec)
    with pytest.raises(SpecError, match=r"objective\.top_k is 320, and the base has 320 tokens"):
        lessons_of(spec, data, [], base.config.vocab_size, base.config.vocab_size)
    lessons = lessons_of(spec, data, [], 1, base.config.vocab_size)
    strange = np.array((999, -1.0), TOP)
    with pytest.raises(DataError, match="tokens that the base does not have"):
        list(teach(lessons, data, lambda rows: (np.full((len(ids) - 1, 1), strange) for ids in rows)))
