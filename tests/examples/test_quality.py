"""The benchmark of quality: scores, sweeps, both training loops, and the whole benchmark on a tiny base."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.quality import __main__ as quality
from examples.quality import answers, worker
from examples.quality.report import Result, plot, table
from examples.quality.setting import FACTOR, METHODS, Run, Setting
from examples.quality.tasks import TASKS, Question, bleu, exact_match, last_number
from loray.bases.registry import BaseModel
from loray.errors import DataError

BaseFactory = Callable[..., BaseModel]


def questions(*references: str) -> list[Question]:
    return [Question("", (text,)) for text in references]


def test_bleu_takes_any_reference_and_the_first_line() -> None:
    asked = [Question("", ("a cat sat on the mat", "the cat sat on a mat")), Question("", ("dogs bark at night here",))]
    assert bleu(["the cat sat on a mat", " dogs bark at night here\nMeaning: more"], asked) == pytest.approx(100)
    assert bleu(["the cat sat on a rug", "dogs bark at night here"], asked) < 95
    assert bleu(["no", "words"], asked) == 0


def test_exact_matches() -> None:
    assert exact_match(["Business", " business \nmore", "Sports"], questions("Business", "Business", "World")) == (
        pytest.approx(200 / 3)
    )
    solved = questions("1+1=2\n#### 2", "#### 1,234", "#### 5")
    assert last_number(["so\n#### 2.0 apples", "#### 1234", "it is 5"], solved) == pytest.approx(200 / 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")

    def write(name: str, rows: list[dict[str, object]]) -> None:
        # U+2028 ends a line in str.splitlines, but not in JSONL
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")

    pairs = [{"prompt": f"Meaning: name[{i}]\nText:", "completion": f" It is\u2028{i}."} for i in range(40)]
    write("e2e_train.jsonl", list(pairs))
    write(
        "e2e_validation.jsonl", [{"prompt": f"Meaning: name[{i}]\nText:", "references": ["It is."]} for i in range(9)]
    )
    for name in ("gsm8k_train.jsonl", "gsm8k_validation.jsonl"):
        write(name, [{"prompt": f"Question: {i}?\nAnswer:", "completion": f" So.\n#### {i}"} for i in range(8)])
    articles = [
        ("train", "Stocks fell today. "),
        ("validation", "A new telescope. "),
        ("validation", "Stocks fell today. "),
    ]
    rows = [
        {"task": "ag_news_classify", "split": split, "prompt": f"{text}\nWhat label?\n", "completion": "Business"}
        for split, text in articles
    ]
    rows.append(rows[0] | {"task": "ag_news_recommend", "completion": "Scientist"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "t0_many_tasks.parquet")
    return folder


def test_tasks_read_their_files(data: Path) -> None:
    e2e, gsm8k, news = (TASKS[name] for name in ("e2e", "gsm8k", "ag_news"))
    assert (len(e2e.pairs(data)), e2e.pairs(data)[3].completion) == (40, " It is\u20283.")
    assert e2e.questions(data)[0] == Question("Meaning: name[0]\nText:", ("It is.",))
    assert gsm8k.questions(data)[7].references == (" So.\n#### 7",)
    assert [pair.completion for pair in news.pairs(data)] == ["Business"]
    # An article of the training pairs is not a question.
    assert [q.prompt for q in news.questions(data)] == ["A new telescope. \nWhat label?\n"]
    with pytest.raises(DataError, match=r"e2e_train.jsonl cannot be read: .*; name the folder that holds it"):
        e2e.pairs(data / "elsewhere")


def run_at(rate: float, held_out: float) -> Run:
    return Run(rate, 0, (1.0,), held_out, (0.1, 0.2), 10, 20, "folder")


@pytest.mark.parametrize(
    ("best", "tried"),
    [(0, [-1, 0, 1]), (1, [-1, 0, 1, 2]), (-1, [-2, -1, 0, 1]), (5, [-1, 0, 1, 2]), (-5, [-2, -1, 0, 1])],
)
def test_a_sweep_goes_on_towards_the_best(best: int, tried: list[int]) -> None:
    found = worker.sweep(1.0, lambda rate: run_at(rate, abs(math.log(rate, FACTOR) - best)), 4)
    assert sorted(round(math.log(r.rate, FACTOR)) for r in found) == tried


def test_a_diverged_rate_is_never_the_best() -> None:
    found = worker.sweep(1.0, lambda rate: run_at(rate, float("nan") if rate > 1 else 1.0), 3)
    assert len(found) == 3
    assert worker.best_of(found).rate < 1.5


def test_the_best_rates_seeds_make_a_result() -> None:
    runs = (run_at(1e-3, 2.0), run_at(1e-2, 1.0), Run(1e-2, 1, (1.0,), 1.2, (0.1, 0.4), 10, 2_000, "other"))
    result = Result("e2e", "BLEU", "VeRA r256", "loray", runs, 1 << 30, (30.0, 34.0))
    assert [r.seed for r in result.final] == [0, 1]
    text = table([Result("e2e", "BLEU", "base", "base", (), scores=(8.0,)), result]).splitlines()
    assert text[2].startswith("| e2e | base | – | – | – | – | 8.0 BLEU |")
    assert text[3] == (
        "| e2e | VeRA r256 | loray | 1.0e-02 | 2 | 1.100 ± 0.100 | 32.0 ± 2.0 BLEU | 10 | 20 B | 0.20 | 1.00 |"
    )


@pytest.mark.parametrize("system", ["loray", "peft"])
@pytest.mark.parametrize("method", METHODS)
def test_both_systems_learn_the_same(
    system: str, method: str, tiny_base: BaseFactory, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base()
    monkeypatch.setattr(answers, "POOL_BYTES", 16 << 20)  # to clear a pool of a gibibyte takes longer than all the rest
    rows = [json.dumps({"prompt": "say", "completion": " yes yes yes"})] * 12
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text("\n".join(rows), encoding="utf-8")
    home = str(base.path.parent.parent)
    setting = Setting(home, base.name, str(tmp_path), system, method, "qv", 6, 64, (0, 1), (METHODS[method][1],))  # type: ignore[arg-type]
    assert Setting.from_dict(json.loads(json.dumps(setting.to_dict()))) == setting
    found = worker.main(setting)
    first, second = (Run.from_dict(r) for r in found["runs"])
    assert (first.seed, second.seed) == (0, 1)
    assert len(first.losses) == len(first.seconds) == 6
    assert first.losses[-1] < first.losses[0]
    assert first.held_out < first.losses[0]
    assert first.nbytes == (Path(first.folder) / "adapter_model.safetensors").stat().st_size
    given = answers.main(Path(home), base.name, ["say", "tell"], 4, [first.folder, second.folder])["answers"]
    assert [len(texts) for texts in given] == [2, 2, 2]


@pytest.mark.slow
def test_the_whole_benchmark(
    tiny_base: BaseFactory, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_base()
    args = [str(data), "--tasks", "gsm8k", "--steps", "2", "--batch-tokens", "64", "--seeds", "1", "--questions", "3"]
    args += ["--base", str(base.path), "--home", str(tmp_path / "home"), "--folder", str(tmp_path / "work")]
    args += ["--threads", "1", "--methods", "VeRA r256"]  # the others: test_both_systems_learn_the_same
    picture, figures = tmp_path / "quality.svg", tmp_path / "quality.json"
    results = quality.main([*args, "--plot", str(picture), "--json", str(figures)])
    assert [(r.method, r.system) for r in results] == [
        ("base", "base"),
        ("VeRA r256, linear", "loray"),
        ("VeRA r256, linear", "peft"),
    ]
    assert all(len(r.scores) == 1 for r in results)
    assert "exact match" in capsys.readouterr().out
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert len(json.loads(figures.read_text())["results"]) == 3
    plot(results, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == picture.read_bytes()
    # Finished trainings are not repeated.
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    assert quality.main(args)[1].runs == results[1].runs
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")} == kept


@pytest.mark.slow
def test_sets_of_modules_side_by_side(tiny_base: BaseFactory, data: Path, tmp_path: Path) -> None:
    args = [str(data), "--tasks", "gsm8k", "e2e", "--steps", "2", "--batch-tokens", "64", "--questions", "3"]
    args += ["--base", str(tiny_base().path), "--home", str(tmp_path / "home"), "--folder", str(tmp_path / "work")]
    args += ["--threads", "1", "--seeds", "2", "--methods", "LoRA r16", "--modules", "attention", "linear"]
    _, attention, linear, _, again, _ = quality.main([*args, "--no-peft", "--one-rate"])
    assert [r.method for r in (attention, linear)] == ["LoRA r16, attention", "LoRA r16, linear"]
    assert linear.final[0].num_parameters > 2 * attention.final[0].num_parameters
    assert all(len(r.scores) == 2 for r in (attention, linear, again))
    # The first task has searched the rate.
    assert len(attention.runs) > 3
    assert [(r.rate, r.seed) for r in again.runs] == [(attention.final[0].rate, seed) for seed in (0, 1)]
