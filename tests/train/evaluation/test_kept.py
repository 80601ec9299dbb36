"""Figures of passes outlive the process that computed them, to the last bit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from math import pi
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from loray.bases.registry import BaseModel
from loray.errors import EvaluationError
from loray.spec import PerplexitySpec, RetrievalSpec, RopeParameters
from loray.train import objectives
from loray.train.evaluation import perplexity, retrieval
from loray.train.evaluation.measure import MeasuredModel, identity, measure, subjects
from loray.train.evaluation.perplexity import Figures, KeptFigures, Pass, digest
from tests.fixtures.peft_adapters import make_adapter
from tests.fixtures.ranks import forked
from tests.fixtures.training_data import documents

LINEAR = RopeParameters(rope_type="linear", rope_theta=10000.0, factor=2)
YARN = RopeParameters(rope_type="yarn", rope_theta=10000.0, factor=2, original_max_position_embeddings=512)
CPU = torch.device("cpu")
MODEL = {"base": "b"}
PASSES = [Pass(str(i), 2, "it") for i in range(4)]


def files_of(home: Path) -> list[Path]:
    return sorted((home / "cache" / "evaluations").glob("*/*.json"))


def no_pass(i: int) -> Figures:
    pytest.fail(f"pass {i} is computed again")


def be_killed(home: Path) -> None:
    """In the third pass."""

    def compute(i: int) -> Figures:
        if i == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"nll": i / 7}

    KeptFigures(home).figures(MODEL, PASSES, compute)


def test_a_killed_process_loses_the_pass_under_way_alone(tmp_path: Path) -> None:
    process = forked(be_killed, tmp_path)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.stem for path in files_of(tmp_path)] == ["0", "1"]
    asked: list[int] = []
    shares: list[float] = []
    kept = KeptFigures(tmp_path)
    found = kept.figures(MODEL, PASSES, lambda i: asked.append(i) or {"nll": i / 7}, shares.append)  # type: ignore[func-returns-value]
    assert [f["nll"] for f in found] == [0.0, 1 / 7, 2 / 7, 3 / 7]
    assert (asked, shares) == ([2, 3], [0.5, 0.75, 1.0])
    assert (kept.num_taken, kept.num_computed) == (4, 4)
    assert [f["nll"] for f in KeptFigures(tmp_path).figures(MODEL, PASSES, no_pass)] == [f["nll"] for f in found]


def test_what_is_kept_belongs_to_its_model_and_tokens(tmp_path: Path) -> None:
    kept = KeptFigures(tmp_path)
    for model, key, value in (("b", "x", pi), ("b", "y", 1e300), ("c", "x", 5e-324)):
        assert kept.figures({"base": model}, [Pass(key, 1, "it")], lambda i, v=value: {"nll": v}) == [{"nll": value}]  # type: ignore[misc]
    assert kept.num_taken == 0
    assert KeptFigures(tmp_path).figures(MODEL, [Pass("y", 1, "it"), Pass("x", 1, "it")], no_pass) == [
        {"nll": 1e300},
        {"nll": pi},
    ]
    assert digest("ab", [1, 2]) != digest("a", "b", [1, 2]) != digest("a", "b", [1], [2])


def test_fresh_computes_all_and_counts_from_then_on(tmp_path: Path) -> None:
    KeptFigures(tmp_path).figures(MODEL, PASSES, lambda i: {"nll": 1.0})
    kept = KeptFigures(tmp_path, fresh=True)
    assert kept.figures(MODEL, PASSES, lambda i: {"nll": 2.0}) == [{"nll": 2.0}] * 4
    assert kept.num_taken == 0
    assert KeptFigures(tmp_path).figures(MODEL, PASSES, no_pass) == [{"nll": 2.0}] * 4


def test_damage_and_age(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    KeptFigures(tmp_path).figures(MODEL, PASSES[:1], lambda i: {"nll": 1.0})
    (path,) = files_of(tmp_path)
    path.with_name("1.json").write_bytes(b"\x00\xff")
    path.with_name("2.json").write_bytes(b'{"nll": 0.2857')
    computed = KeptFigures(tmp_path).figures(MODEL, PASSES, lambda i: {"nll": 3.0})
    assert [f["nll"] for f in computed] == [1.0, 3.0, 3.0, 3.0]
    long_ago = time.time() - 31 * 24 * 3600
    for kept in files_of(tmp_path):
        os.utime(kept, (long_ago, long_ago))
    KeptFigures(tmp_path)
    assert not files_of(tmp_path)
    path.parent.rmdir()
    path.parent.write_text("not a folder")
    assert KeptFigures(tmp_path).figures(MODEL, PASSES[:1], lambda i: {"nll": 4.0}) == [{"nll": 4.0}]
    assert "a figure is not kept" in caplog.text


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base(std=0.05, max_position_embeddings=512)


def test_an_interrupted_measurement_ends_as_an_undisturbed_one(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    make_adapter(base, adapter, LoraConfig(r=2, target_modules=["q_proj"]), seed=1, rope=LINEAR, std=0.3)
    what: dict[str, Any] = {
        "dtype": "float32",
        "documents": documents(600),
        "perplexity": PerplexitySpec(context_lengths=(64, 200), stride=100, max_windows=None),
        "retrieval": [RetrievalSpec(context_lengths=(400,), depths=(0.0, 1.0), samples=2)],
    }
    chosen = subjects(LINEAR, adapter, compare=True)
    monkeypatch.setattr(perplexity, "MEASURED_AT_ONCE", 256)
    undisturbed = measure(base, chosen, **what)

    left, compute = 9, objectives.cross_entropy

    def failing(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return compute(*args)

    with monkeypatch.context() as patched:
        patched.setattr(objectives, "cross_entropy", failing)
        with pytest.raises(KeyboardInterrupt):
            measure(base, chosen, **what, kept=KeptFigures(tmp_path))
    kept = KeptFigures(tmp_path)
    assert measure(base, chosen, **what, kept=kept) == undisturbed
    num_base, num_next = 6 + 5 + 4, 6  # windows of 64 and 200 tokens and prompts of the base; two passes of the next
    assert (kept.num_taken, kept.num_computed) == (num_base + num_next, 2 * num_base - num_next)


def test_a_figure_that_is_not_finite_is_not_kept(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "score", lambda *_: retrieval.RetrievalScore(float("nan"), 0))
    spec = RetrievalSpec(context_lengths=(400,), depths=(0.0,), samples=1)
    with pytest.raises(EvaluationError, match="the log-likelihood of a key in 400 tokens is nan"):
        measure(base, [MeasuredModel("base")], retrieval=[spec], dtype="float32", kept=KeptFigures(tmp_path))
    assert not files_of(tmp_path)


def test_what_decides_a_figure_decides_where_it_is_kept(base: BaseModel, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, seed in ((one, 1), (other, 2)):
        make_adapter(base, folder, LoraConfig(r=2, target_modules=["q_proj"]), seed=seed, std=0.3)
    plain = MeasuredModel("base")
    found = [
        identity(base, plain, dtype="float32", device=CPU),
        identity(base, plain, dtype="bfloat16", device=CPU),
        identity(base, plain, dtype="float32", device=torch.device("cuda")),
        identity(replace(base, fingerprint="0" * 64), plain, dtype="float32", device=CPU),
        *(
            identity(base, MeasuredModel("adapter", rope, folder), dtype="float32", device=CPU)
            for rope in (None, LINEAR, YARN)
            for folder in (one, other)
        ),
    ]
    assert len({digest(repr(each)) for each in found}) == 10
    scaled = (MeasuredModel(subject, LINEAR) for subject in ("base_scaled", "adapter"))
    same = [identity(base, measured, dtype="float32", device=CPU) for measured in scaled]
    assert same[0] == same[1]
