"""The commands of `loray eval`: bases, published adapters and folders; recorded results, the gate, the heat map."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig

from loray.adapters.manifest import ManifestDetails, describe
from loray.bases.registry import BaseModel, add_base
from loray.bases.rounding import add_rounded
from loray.catalog import Catalog
from loray.cli import eval_tasks, pictures
from loray.cli.eval_tasks import read_results
from loray.errors import EvaluationError
from loray.settings import Settings
from loray.spec import Evaluation, RopeParameters
from tests.cli.run import Loray
from tests.fixtures.calls import refused
from tests.fixtures.cluster import Served
from tests.fixtures.figures import GOOD, NATIVE, OWN, RESULTS, figures
from tests.fixtures.peft_adapters import make_adapter
from tests.fixtures.tiny import write_checkpoint

LINEAR = RopeParameters(rope_type="linear", rope_theta=10000.0, factor=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return write_checkpoint(folder, std=0.05, max_position_embeddings=512)


@pytest.fixture
def loray(loray: Loray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loray:
    monkeypatch.chdir(tmp_path)
    return loray


@pytest.fixture
def base(tmp_path: Path, checkpoint: Path) -> BaseModel:
    return add_base(str(checkpoint), home=tmp_path / "home")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two documents of about 1,300 and 700 tokens, and one of another split."""
    draw = np.random.default_rng(0)
    rows = [
        {"text": "".join(map(chr, draw.integers(97, 123, length))), "split": split}
        for length, split in ((1300, "eval"), (700, "eval"), (5000, "train"))
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "docs.jsonl"


@pytest.fixture
def folder(base: BaseModel, tmp_path: Path) -> Path:
    """A LongLoRA adapter that extends 512 to 1,024 tokens, with a manifest but not published."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["norm"])
    make_adapter(base, tmp_path / "adapter", config, seed=1, rope=LINEAR, std=3.0)
    describe(tmp_path / "adapter", base, ManifestDetails(rope_parameters=LINEAR, context_length=1024))
    return tmp_path / "adapter"


EVAL = ("--where", "split=eval", "--max-windows", "3", "--dtype", "float32")


def test_a_base_and_the_base_scaled(loray: Loray, base: BaseModel, data: Path) -> None:
    plain = loray("eval", "perplexity", "tiny", "--data", data, *EVAL, "-c", "256,512", "-c", "64", "--json").json
    assert (plain["model"], plain["base"], plain["recorded"], plain["gate"]) == ("tiny", "tiny", False, None)
    assert (plain["num_documents"], plain["num_tokens"]) == (2, 2002)
    assert [e["context_length"] for e in plain["evaluations"]] == [256, 512, 64]
    assert {(e["subject"], e["stride"], e["count"]) for e in plain["evaluations"]} == {("base", 256, 3)}

    both = loray("eval", "perplexity", "tiny", "--rope", "linear:2", "--compare", "--data", data, *EVAL, "--json").json
    assert both["model"] == "tiny (linear × 2)"
    assert both["rope_parameters"]["factor"] == 2
    found = {(e["subject"], e["context_length"]): e["value"] for e in both["evaluations"]}
    assert list(found) == [("base", 512), ("base", 1024), ("base_scaled", 512), ("base_scaled", 1024)]
    assert found["base", 512] == plain["evaluations"][1]["value"]
    assert found["base", 512] != found["base_scaled", 512]

    shown = loray(
        "eval", "perplexity", "tiny", "--data", data, *EVAL, "-c", "64", "--stride", "100", "--max-tokens", "900"
    )
    assert shown.code == 0
    for part in ("docs.jsonl, split=eval: 1 documents, 900 tokens", "a new one every 100 tokens", "mean loss", "BASE"):
        assert part in shown.out


def test_a_quantised_form_is_compared_with_its_base(
    loray: Loray, base: BaseModel, folder: Path, data: Path, tmp_path: Path
) -> None:
    form = add_rounded(base, "int8", home=tmp_path / "home")
    assert loray("adapters", "import", folder, "--name", "long").code == 0
    line = ("--data", data, *EVAL, "-c", "256", "--compare")
    bases = loray("eval", "perplexity", form.name, *line, "--json").json
    assert ([e["subject"] for e in bases["evaluations"]], bases["of"]["base"]) == (["base"], "tiny")
    both = loray("eval", "perplexity", "long", "--base", form.name, *line, "--json").json
    assert (both["base"], both["recorded"], both["gate"]) == ("tiny-int8", False, None)
    values = {(b, e["subject"]): e["value"] for b, found in ((0, both), (1, both["of"])) for e in found["evaluations"]}
    assert len(values) == len(set(values.values())) == 6
    for subject in ("base", "base_scaled", "adapter"):
        assert values[0, subject] == pytest.approx(values[1, subject], rel=0.05)
    assert values[1, "base"] == bases["of"]["evaluations"][0]["value"]
    shown = loray("eval", "perplexity", "long", "--base", form.name, *line).out
    assert all(column in shown for column in ("ADAPTER ON TINY-INT8", "ADAPTER ON TINY"))
    assert json.loads(loray("adapters", "show", "long", "--json").out)["evaluations"] == []
    other = add_base(str(write_checkpoint(tmp_path / "other", seed=1)), home=tmp_path / "home")
    refused = loray("eval", "perplexity", "long", "--base", other.name, *line).failed
    assert "adapter long@1 was trained on another base than 'other'" in refused


def test_a_published_longlora_adapter_earns_its_alias(
    loray: Loray, base: BaseModel, folder: Path, data: Path, tmp_path: Path
) -> None:
    assert (
        "alias 'prod' is refused to long@1: at its own context of 1,024 tokens"
        in loray("adapters", "import", folder, "--name", "long", "--alias", "prod").failed
    )
    assert loray("adapters", "import", folder, "--name", "long").out == "published long@1\n"
    assert "gate" in loray("adapters", "show", "long").out
    assert loray("adapters", "promote", "long").code == 1

    trial = loray("eval", "perplexity", "long", "--data", data, *EVAL, "--no-record", "--json").json
    assert (trial["recorded"], len(trial["evaluations"])) == (False, 2)
    measured = loray("eval", "perplexity", "long@1", "--compare", "--data", data, *EVAL, "--json").json
    assert measured["evaluations"][-2:] == trial["evaluations"]
    assert [(e["subject"], e["context_length"]) for e in measured["evaluations"]] == [
        (subject, length) for subject in ("base", "base_scaled", "adapter") for length in (512, 1024)
    ]
    assert measured["recorded"] is True
    assert measured["gate"]  # random weights are no better than the base
    assert "is not below" in loray("adapters", "promote", "long").err
    shown = json.loads(loray("adapters", "show", "long", "--json").out)
    assert shown["evaluations"] == measured["evaluations"]
    assert shown["manifest"]["evaluations"] == []

    catalog = Catalog(f"sqlite:///{tmp_path}/home/catalog.db")
    lengths = {OWN: 1024, NATIVE: 512}
    good = {(subject, lengths[length]): value for (subject, length), value in GOOD.items()}
    catalog.evaluations.record(measured["digest"], figures(good))
    catalog.close()
    assert loray("adapters", "promote", "long").out == "long@prod is version 1 now\n"
    shown_text = loray("adapters", "show", "long").out
    assert "passed" in shown_text
    assert "512 tokens" in shown_text


def test_the_gate_can_be_overridden_with_a_reason(loray: Loray, folder: Path) -> None:
    imported = loray("adapters", "import", folder, "--name", "long", "--alias", "canary", "--no-gate", "a quick run")
    assert imported.out == "published long@1\n"
    assert loray("adapters", "promote", "long@1", "--no-gate", "still one").code == 0
    assert "without the gate: a quick run" in loray("adapters", "show", "long").out
    moves = json.loads(loray("adapters", "show", "long", "--json").out)["alias_moves"]
    assert [m["no_gate"] for m in moves] == ["a quick run", "still one"]


def test_a_folder_measures_as_the_adapter_published_from_it(
    loray: Loray, folder: Path, data: Path, tmp_path: Path
) -> None:
    options = ("--data", data, *EVAL, "--json")
    local = loray("eval", "perplexity", "./adapter", *options).json
    assert (local["digest"], local["recorded"]) == (None, False)
    assert loray("adapters", "import", folder, "--name", "long").code == 0
    published = loray("eval", "perplexity", "long", *options).json
    assert local["evaluations"] == published["evaluations"]
    plain = Path(shutil.copytree(folder, tmp_path / "plain"))
    (plain / "loray.json").unlink()
    scaled = loray("eval", "perplexity", "./plain", "--rope", "linear:2", "--base", "tiny", *options).json
    assert scaled["evaluations"] == local["evaluations"]
    assert loray("eval", "perplexity", "./plain", "--base", "tiny", "-c", "512", *options).json != local
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter_config.json is damaged" in loray("eval", "perplexity", folder, *options).err


def test_a_second_run_takes_what_the_first_has_computed(loray: Loray, base: BaseModel, data: Path) -> None:
    options: tuple[object, ...] = ("eval", "perplexity", "tiny", "--data", data, "--where", "split=eval", "-c", "256")
    options = (*options, "--dtype", "float32")
    first = loray(*options, "--max-windows", "2", "--json").json
    assert (first["num_computed"], first["num_taken"]) == (2, 0)
    again = loray(*options, "--max-windows", "2", "--json").json
    assert (again["num_computed"], again["num_taken"]) == (0, 2)
    assert again["evaluations"] == first["evaluations"]
    assert (
        "2 of 2 windows taken from earlier runs; --fresh computes all again"
        in loray(*options, "--max-windows", "2").out
    )
    fresh = loray(*options, "--max-windows", "2", "--fresh", "--json").json
    assert (fresh["num_computed"], fresh["num_taken"]) == (2, 0)
    assert "taken" not in loray(*options, "--max-windows", "2", "--dtype", "bfloat16").out
    keys = ("eval", "passkey", "tiny", "-c", "400", "--samples", "1")
    assert loray(*keys, "--depths", "0", "--json").json["num_taken"] == 0
    assert "1 of 2 prompts taken" in loray(*keys, "--depths", "0,1").out


def test_retrieval_and_its_picture(loray: Loray, base: BaseModel, tmp_path: Path) -> None:
    picture = tmp_path / "passkey.svg"
    options = ("-c", "400,512", "--depths", "0,1", "--samples", "2")
    shown = loray("eval", "passkey", "tiny", *options, "--heatmap", picture)
    assert shown.code == 0, shown.err
    for part in ("passkey retrieval of tiny, 2 prompts a cell, seed 0", "DEPTH", "400", "512", "100%", f"{picture}"):
        assert part in shown.out
    words = [e.text for e in ET.parse(picture).iter("{http://www.w3.org/2000/svg}text")]
    for word in ("base: exact match", "base: log-likelihood of the key", "400", "512", "0%", "100%"):
        assert word in words
    first, again = (loray("eval", "passkey", "tiny", *options, "--json").json["evaluations"] for _ in range(2))
    assert first == again
    other = loray("eval", "passkey", "tiny", *options, "--seed", "1", "--json").json["evaluations"]
    assert [e["value"] for e in other] != [e["value"] for e in first]
    topics = loray("eval", "topics", "tiny", "-c", "2500", "--depths", "0.5", "--samples", "1", "--json").json
    assert [e["metric"] for e in topics["evaluations"]] == ["topics_exact_match", "topics_log_likelihood"]


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("perplexity tiny", 2, "Missing option '--data'"),
        ("perplexity nothing --data docs.jsonl", 1, "no adapter 'nothing'"),
        ("perplexity ./nothing --data docs.jsonl", 1, "nothing is not a folder"),
        ("perplexity tiny --data docs.jsonl -c x", 2, "'x' is not a list of numbers"),
        ("perplexity tiny --data docs.jsonl -c 0", 1, "context_lengths.0: Input should be greater than 1"),
        ("perplexity tiny --data docs.jsonl -c 9000", 1, "no document of docs.jsonl has 9,000 tokens"),
        ("perplexity tiny --data docs.jsonl --where split", 2, "'split' is not COLUMN=VALUE"),
        ("perplexity tiny --data docs.jsonl --rope linear", 2, "is not TYPE:FACTOR"),
        ("perplexity tiny --data docs.jsonl --rope linear:0.5", 2, "is not TYPE:FACTOR"),
        ("perplexity tiny --data docs.jsonl --original-context 9", 1, "--original-context says what --rope extends"),
        ("perplexity tiny --data docs.jsonl --compare", 1, "there is nothing to compare tiny with"),
        ("perplexity tiny --data docs.jsonl --base tiny", 1, "--base is for folders"),
        ("perplexity tiny --data docs.jsonl --device abc", 1, "--device abc:"),
        ("passkey tiny -c 400 --depths 2", 1, "depths.0: Input should be less than or equal to 1"),
        ("passkey tiny -c 40", 1, "context length 40 is too short"),
        ("passkey tiny --heatmap a.png", 2, "--heatmap draws SVG: a.svg"),
        ("passkey tiny --heatmap none/a.svg", 2, "--heatmap: none is not a folder"),
    ],
)
def test_wrong_use_is_one_line(loray: Loray, base: BaseModel, data: Path, line: str, code: int, message: str) -> None:
    result = loray("eval", *line.split())
    assert (result.code, result.out) == (code, "")
    assert message in result.err


def test_published_rope_is_not_scaled_again(loray: Loray, folder: Path, data: Path) -> None:
    result = loray("eval", "perplexity", "./adapter", "--rope", "linear:2", "--data", data)
    assert "adapter is published with its RoPE" in result.err


def test_colours_of_all_models_mean_the_same() -> None:
    def cell(subject: Any, value: float) -> Evaluation:
        same: dict[str, Any] = {"dataset": "d", "context_length": 1024, "depth": 0.5}
        return Evaluation(metric="passkey_log_likelihood", subject=subject, value=value, **same)

    svg = pictures.draw_heat_maps("a <title> & more", [cell("base", -10.0), cell("adapter", -0.01)])
    root = ET.fromstring(svg)
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a <title> & more" in texts
    assert texts.count("−10.0") == 3  # in its cell, and in both legends
    assert texts.count("0.0") == 3


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
    version = Catalog(Settings.from_env().catalog).adapters.version("tone", 1)
    found = [(e.dataset, e.metric, e.value, e.count) for e in version.evaluations]
    assert found == [
        ("letters", "acc", 0.5, 6),
        ("letters", "acc_norm", 0.25, 6),
        ("sums", "exact_match/strict-match", 0.75, None),
    ]
    assert json.loads(told.out)["digest"] == version.digest

    (tmp_path / "broken").mkdir()
    assert (
        "lm_eval ended with code 1:\nasking"
        in loray("eval", "tasks", "tone", "letters", "--include-path", tmp_path / "broken").failed
    )
    unrecorded = loray("eval", "tasks", "tone", "letters", "--no-record")
    assert unrecorded.code == 0
    assert "exact_match/strict-match" in unrecorded.out
    assert len(Catalog(Settings.from_env().catalog).adapters.version("tone", 1).evaluations) == 3


def test_without_the_package(loray: Loray, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_tasks, "find_spec", lambda name: None)
    assert "pip install 'lm-eval[api]'" in loray("eval", "tasks", "tone", "letters").err


def test_results_without_figures_are_an_error(tmp_path: Path) -> None:
    refused(EvaluationError, "no results", read_results, tmp_path)
    (tmp_path / "results_1.json").write_text(json.dumps({"results": {"letters": {"alias": "letters"}}}))
    refused(EvaluationError, "no figure: letters", read_results, tmp_path)


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
