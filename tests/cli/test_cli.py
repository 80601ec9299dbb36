"""The command line with real folders, store and catalog: output, exit codes and messages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from loray import __version__
from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.settings import Settings
from loray.store import AdapterStore, open_store
from tests.catalog.test_catalog import publish
from tests.cli.run import Loray, PeftFolder
from tests.fixtures.tiny import write_checkpoint


@pytest.fixture
def folder(base: BaseModel, peft_folder: PeftFolder) -> Path:
    return peft_folder(base)


def stored(home: Path) -> list[str]:
    return list(open_store(f"file://{home}/store").list())


# -- the group --------------------------------------------------------------------------------------------------------


def test_help_and_version(loray: Loray) -> None:
    shown = loray("--help")
    assert shown.code == 0
    for word in ("base", "adapters", "train", "up", "status", "down", "LORAY_HOME"):
        assert word in shown.out
    assert loray("--version").out.strip() == f"loray, version {__version__}"


def test_listing_imports_no_torch(home: Path) -> None:
    code = (
        "import sys; sys.argv = ['loray', 'adapters', 'ls']\n"
        "from loray.cli.main import _run\n"
        "assert _run() == 0; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_wrong_usage(loray: Loray) -> None:
    for line in ("nothing", "base add", "base verify", "adapters import x", "base ls --bad"):
        result = loray(*line.split())
        assert result.code == 2
        assert "Usage:" in result.err
        assert result.out == ""


def test_errors_are_one_line(loray: Loray, monkeypatch: pytest.MonkeyPatch) -> None:
    result = loray("adapters", "show", "nothing")
    assert (result.code, result.out) == (1, "")
    assert result.err == "error: no adapter 'nothing'; `loray adapters ls` lists them\n"
    monkeypatch.setenv("LORAY_LOG_LEVEL", "DEBUG")
    assert "Traceback" in loray("adapters", "show", "nothing").err
    monkeypatch.setenv("LORAY_LOG_LEVEL", "LOUD")
    assert loray("adapters", "ls").err.startswith("error: LORAY_LOG_LEVEL='LOUD'")


def test_unexpected_errors_say_how_to_see_more(loray: Loray, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(home: Path) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("loray.cli.base.list_bases", fail)
    result = loray("base", "ls")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "RuntimeError: a bug (LORAY_LOG_LEVEL=DEBUG" in result.err


# -- bases ------------------------------------------------------------------------------------------------------------


def test_bases(loray: Loray, checkpoint: Path, home: Path) -> None:
    assert "loray base add smollm2" in loray("base", "ls").out
    assert json.loads(loray("base", "ls", "--json").out) == []
    added = json.loads(loray("base", "add", checkpoint, "--json").out)
    assert (added["name"], added["architecture"]) == ("tiny", "LlamaForCausalLM")
    assert loray("base", "add", checkpoint).code == 0
    assert json.loads(loray("base", "ls", "--json").out) == [added]
    assert added["fingerprint"][:12] in loray("base", "ls").out
    assert loray("base", "verify", "tiny").out == "tiny: ok\n"
    weights = home / "bases" / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    result = loray("base", "verify", "--all", "--json")
    assert result.code == 1
    assert json.loads(result.out)[0]["ok"] is False
    assert "is damaged" in result.err


def test_unsupported_architecture(loray: Loray, checkpoint: Path, tmp_path: Path, home: Path) -> None:
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (other / "config.json").write_text(json.dumps(config))
    result = loray("base", "add", other)
    assert result.code == 1
    assert "architecture GPT2LMHeadModel is not supported; loray covers LlamaForCausalLM" in result.err
    assert not (home / "bases").exists()


# -- adapters ---------------------------------------------------------------------------------------------------------


def _check_release(loray: Loray, digest: str) -> None:
    catalog = Catalog(Settings.from_env().catalog)
    catalog.report_death(digest, "r1", datetime.now(UTC), lambda deaths: timedelta(minutes=deaths))
    catalog.close()
    assert "a replica died on it" in loray("adapters", "show", "tone@2").out
    assert json.loads(loray("adapters", "show", "tone@2", "--json").out)["quarantine"]["deaths"] == 1
    assert loray("adapters", "release", "tone@2").out == "released tone@2: the next request tries it\n"
    assert loray("adapters", "release", "tone@2").code == 1


def test_from_import_to_rollback(loray: Loray, folder: Path, base: BaseModel, peft_folder: PeftFolder) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert loray("adapters", "import", folder, "--name", "tone", "--alias", "prod").out == "published tone@1\n"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    again = json.loads(loray("adapters", "import", folder, "--name", "tone", "--json").out)
    assert (again["label"], again["aliases"]) == ("tone@1", ["prod"])
    vera = peft_folder(base, "vera")
    second = json.loads(
        loray("adapters", "import", vera, "--name", "tone", "--licence", "MIT", "--description", "terse", "--json").out
    )
    assert (second["version"], second["manifest"]["method"]) == (2, "vera")

    (listed,) = json.loads(loray("adapters", "ls", "--json").out)
    assert (listed["version"], listed["versions"], listed["base"]) == (1, [1, 2], "tiny")
    assert "prod→1" in loray("adapters", "ls").out
    assert loray("adapters", "promote", "tone").out == "tone@prod is version 2 now\n"
    shown = loray("adapters", "show", "tone").out
    for word in ("tone@2", "vera, rank 16, on q_proj v_proj", "MIT", "terse", second["digest"], "→ 2"):
        assert word in shown
    assert json.loads(loray("adapters", "show", "tone@1", "--json").out)["all_aliases"] == {"prod": 2}
    assert loray("adapters", "promote", "tone@1", "prod", "--expected", "1").code == 1
    _check_release(loray, second["digest"])
    assert loray("adapters", "rollback", "tone").out == "tone@prod is version 1 again\n"
    assert json.loads(loray("adapters", "promote", "tone@2", "canary", "--json").out)["aliases"] == ["canary"]
    nowhere = loray("adapters", "rollback", "tone", "canary")
    assert nowhere.code == 1
    assert "has no earlier target than version 2" in nowhere.err
    assert "did you mean 'tone'" in loray("adapters", "show", "tnoe").err


def test_an_adapter_is_imported_with_how_it_speaks(loray: Loray, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ tools }}")
    assert loray("adapters", "import", folder, "--name", "tone", "--tool-parser", "mistral").code == 0
    shown = loray("adapters", "show", "tone").out
    assert "mistral" in shown
    assert "its own" in shown
    assert loray("adapters", "import", folder, "--name", "tone", "--tool-parser", "other").code == 2


def test_verify_names_the_damaged_file(loray: Loray, folder: Path, home: Path) -> None:
    published = json.loads(loray("adapters", "import", folder, "--name", "tone", "--json").out)
    assert loray("adapters", "verify", "tone").out == "tone@1: ok\n"
    sha256 = published["manifest"]["files"]["adapter_model.safetensors"]
    blob = home / "store" / "blobs" / sha256[:2] / sha256
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    result = loray("adapters", "verify", "--all", "--json")
    assert result.code == 1
    assert [r["ok"] for r in json.loads(result.out)] == [False]
    assert "adapter_model.safetensors in the store differs" in result.err
    assert loray("adapters", "import", folder, "--name", "tone").out == "published tone@1\n"
    assert loray("adapters", "verify", "--all").code == 0


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def pickle_only(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: edit_config(f, peft_type="IA3"), "peft_type 'IA3' is not supported"),
        (lambda f: edit_config(f, use_qalora=True), "use_qalora=True is not supported"),
        (lambda f: edit_config(f, bias="all"), "bias='all' is not supported"),
        (lambda f: (f / "adapter_config.json").unlink(), "is not a PEFT adapter"),
        (cut, "damaged"),
        (pickle_only, "is a pickle and is never read"),
        (lambda f: (f / "chat_template.jinja").write_text("{% if %}"), "chat template is not valid"),
        (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "chat_template.jinja is not UTF-8"),
        (lambda f: (f / "chat_template.jinja").write_text("x" * 200_000), "has 200,000 characters"),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_bad_folders_leave_nothing(
    loray: Loray, folder: Path, home: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(folder)
    result = loray("adapters", "import", folder, "--name", "tone", "--base", "tiny")
    assert (result.code, result.out) == (1, "")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert stored(home) == []
    assert json.loads(loray("adapters", "ls", "--json").out) == []


def test_bad_names_leave_nothing(loray: Loray, folder: Path, home: Path) -> None:
    for args in (["--name", "a b"], ["--name", "ok", "--alias", "3"], ["--name", "tone", "--base", "nope"]):
        assert loray("adapters", "import", folder, *args).code == 1
    assert stored(home) == []
    loray("adapters", "import", folder, "--name", "tone")
    before = stored(home)
    assert "is a base model's name" in loray("adapters", "import", folder, "--name", "tiny").err
    assert stored(home) == before


def test_wrong_base(loray: Loray, folder: Path, home: Path, tmp_path: Path) -> None:
    narrow = write_checkpoint(tmp_path / "narrow", hidden_size=32)
    assert loray("base", "add", narrow).code == 0
    result = loray("adapters", "import", folder, "--name", "tone", "--base", "narrow")
    assert result.code == 1
    assert "the adapter is for another base model" in result.err
    assert stored(home) == []


def test_a_published_folder_keeps_its_identity(loray: Loray, folder: Path, home: Path, tmp_path: Path) -> None:
    first = json.loads(loray("adapters", "import", folder, "--name", "tone", "--json").out)
    fetched = tmp_path / "fetched"
    AdapterStore(open_store(f"file://{home}/store")).fetch(first["digest"], fetched)
    moved = json.loads(loray("adapters", "import", fetched, "--name", "copy", "--json").out)
    assert moved["digest"] == first["digest"]
    other = write_checkpoint(tmp_path / "other", seed=5)
    assert loray("base", "add", other).code == 0
    result = loray("adapters", "import", fetched, "--name", "copy", "--base", "other")
    assert result.code == 1
    assert "was trained on tiny" in result.err
    weights = fetched / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "adapter_model.safetensors is damaged" in loray("adapters", "import", fetched, "--name", "copy").err


def test_the_base_is_found(loray: Loray, folder: Path, tmp_path: Path, base: BaseModel) -> None:
    other = write_checkpoint(tmp_path / "other", seed=5)
    assert loray("base", "add", other).code == 0
    edit_config(folder, base_model_name_or_path="somebody/elses")
    result = loray("adapters", "import", folder, "--name", "tone")
    assert result.code == 1
    assert "--base: other, tiny" in result.err
    edit_config(folder, base_model_name_or_path=str(base.path))
    assert json.loads(loray("adapters", "import", folder, "--name", "tone", "--json").out)["manifest"]["base"] == "tiny"


def test_an_adapter_is_shared(loray: Loray, folder: Path) -> None:
    loray("adapters", "import", folder, "--name", "tone")
    assert loray("adapters", "share", "tone", "--with", "acme, beta").out == "tone is seen by default acme beta\n"
    (shown,) = json.loads(loray("adapters", "ls", "--json").out)
    assert (shown["tenant"], shown["visibility"], shown["shared_with"]) == ("default", "shared", ["acme", "beta"])
    assert loray("adapters", "share", "tone", "--public").out == "tone is seen by everybody\n"
    assert loray("adapters", "share", "tone", "--private").out == "tone is seen by default\n"
    assert loray("adapters", "share", "tone").code == 2
    assert "tenant's name" in loray("adapters", "share", "tone", "--with", "a/b").err


# -- search -----------------------------------------------------------------------------------------------------------


def test_search(loray: Loray, home: Path) -> None:
    catalog = Catalog(f"sqlite:///{home}/catalog.db")
    for name in ("tone-de", "tone-en", "dates"):
        publish(catalog, name, 1)
    catalog.close()
    found = json.loads(loray("adapters", "search", "TONE", "--json").out)
    assert [entry["name"] for entry in found] == ["tone-de", "tone-en"]
    assert json.loads(loray("adapters", "search", "--method", "vera", "--json").out) == []
    shown = loray("adapters", "search", "e", "--limit", "2").out
    assert "dates" in shown
    assert "the first 2; there are more (--limit)" in shown
    assert loray("adapters", "search", "nobody").out == "no adapter is like that; `loray adapters ls` lists all\n"
    assert loray("adapters", "search", "--tag", "=x").code == 1
