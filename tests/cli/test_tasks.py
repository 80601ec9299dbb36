"""`loray eval tasks`: what lm-evaluation-harness is asked to do, and what is kept of its results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.cli import eval_tasks
from loray.cli.eval_tasks import read_results
from loray.errors import EvaluationError
from loray.settings import Settings
from tests.cli.run import Loray
from tests.fixtures.cluster import Served

# As version 0.4.13 writes them.
RESULTS: dict[str, Any] = {
    "results": {
        "letters": {
            "alias": "letters",
            "name": "letters",
            "sample_len": 6,
            "acc,none": 0.5,
            "acc_stderr,none": 0.22360679774997896,
            "acc_norm,none": 0.25,
            "acc_norm_stderr,none": "N/A",
        },
        "sums": {"alias": "sums", "exact_match,strict-match": 0.75, "exact_match_stderr,strict-match": 0.1},
    },
    "n-samples": {"letters": {"original": 6, "effective": 6}},
}
# Stands for the package: writes the results above, and how it was called.
STAND_IN = """
import json, os, sys
folder = sys.argv[sys.argv.index("--output_path") + 1] + "/model"
os.makedirs(folder)
json.dump({results}, open(folder + "/results_2026.json", "w"))
json.dump([sys.argv[1:], os.environ.get("OPENAI_API_KEY")], open({called!r}, "w"))
print("asking")
sys.exit("broken" in sys.argv[-1])
"""


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stand-in says how it was called."""
    package = tmp_path / "site" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    said = tmp_path / "called.json"
    (package / "__main__.py").write_text(
        STAND_IN.replace("{results}", repr(RESULTS)).replace("{called!r}", repr(str(said)))
    )
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=":")
    return said


def test_figures_are_recorded_with_the_version_that_was_asked(
    loray: Loray,
    base: BaseModel,
    peft_folder: Callable[..., Path],
    called: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert loray("adapters", "import", peft_folder(base), "--name", "tone", "--base", base.name).code == 0
    monkeypatch.setenv("LORAY_API_KEY", "k" * 40)
    told = loray("eval", "tasks", "tone", "letters", "sums", "--limit", 6, "--url", "http://10.0.0.9:8000", "--json")
    assert told.code == 0, told.err
    assert "asking" in told.err
    arguments, key = json.loads(called.read_text())
    options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert arguments[0] == "run"
    assert options["--tasks"] == "letters,sums"
    assert options["--limit"] == "6"
    assert options["--model_args"].split(",") == [
        "model=tone@1",
        "base_url=http://10.0.0.9:8000/v1/completions",
        f"tokenizer={base.path}",
        "num_concurrent=8",
    ]
    assert key == "k" * 40
    version = Catalog(Settings.from_env().catalog).adapter("tone").versions[-1]
    found = [(e.dataset, e.metric, e.value, e.count) for e in version.evaluations]
    assert found == [
        ("letters", "acc", 0.5, 6),
        ("letters", "acc_norm", 0.25, 6),
        ("sums", "exact_match/strict-match", 0.75, None),
    ]
    assert json.loads(told.out)["digest"] == version.digest

    failed = loray("eval", "tasks", "tone", "letters", "--include-path", _folder(tmp_path / "broken"))
    assert failed.code == 1
    assert "lm_eval ended with code 1:\nasking" in failed.err
    unrecorded = loray("eval", "tasks", "tone", "letters", "--no-record")
    assert unrecorded.code == 0
    assert "exact_match/strict-match" in unrecorded.out
    assert len(Catalog(Settings.from_env().catalog).adapter("tone").versions[-1].evaluations) == 3


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_without_the_package(loray: Loray, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_tasks, "find_spec", lambda name: None)
    assert "pip install 'lm-eval[api]'" in loray("eval", "tasks", "tone", "letters").err


def test_results_without_figures_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no results"):
        read_results(tmp_path)
    (tmp_path / "results_1.json").write_text(json.dumps({"results": {"letters": {"alias": "letters"}}}))
    with pytest.raises(EvaluationError, match="no figure: letters"):
        read_results(tmp_path)


@pytest.mark.slow
def test_the_harness_itself_on_a_server(
    loray: Loray,
    served_alone: Served,
    peft_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it is installed: it is no part of the development environment."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed", exc_type=ImportError)
    rows = [{"question": f"{a} then", "choices": [" b", " z"], "answer": 0} for a in "acegik"]
    (tmp_path / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "letters.yaml").write_text(
        f"task: letters\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/letters.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_target: answer\n"
        "doc_to_choice: choices\nmetric_list: [{metric: acc}]\n"
    )
    monkeypatch.setenv("LORAY_HOME", str(served_alone.settings.home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    name = served_alone.base.name
    assert loray("adapters", "import", peft_folder(served_alone.base), "--name", "harnessed", "--base", name).code == 0
    told = loray(
        "eval", "tasks", "harnessed", "letters", "--include-path", tmp_path, "--url", served_alone.url, "--json"
    )
    assert told.code == 0, told.err
    (figure,) = json.loads(told.out)["evaluations"]
    assert (figure["dataset"], figure["metric"], figure["count"]) == ("letters", "acc", 6)
    assert 0 <= figure["value"] <= 1
