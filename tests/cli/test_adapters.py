"""`loray base` and `loray adapters` with real folders, store and catalog: output, exit codes and messages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from peft import LoHaConfig, get_peft_model
from transformers import AutoModelForCausalLM

from loray.adapters.peft_format import WEIGHTS_FILE, read_adapter
from loray.bases.config import ARCHITECTURES
from loray.bases.registry import BaseModel, add_base
from loray.catalog import Catalog
from loray.settings import Settings
from loray.spec import CanaryCounts
from loray.store import AdapterStore, open_store
from tests.cli.run import Loray, PeftFolder
from tests.fixtures.figures import counts
from tests.fixtures.tiny import write_checkpoint
from tests.fixtures.versions import publish


@pytest.fixture
def folder(base: BaseModel, peft_folder: PeftFolder) -> Path:
    return peft_folder(base)


def stored(home: Path) -> list[str]:
    return list(open_store(f"file://{home}/store").list())


# -- bases ------------------------------------------------------------------------------------------------------------


def test_bases(loray: Loray, checkpoint: Path, home: Path) -> None:
    assert "loray base add smollm2" in loray("base", "ls").out
    assert loray("base", "ls", "--json").json == []
    added = loray("base", "add", checkpoint, "--json").json
    assert (added["name"], added["architecture"]) == ("tiny", "LlamaForCausalLM")
    assert loray("base", "add", checkpoint).code == 0
    assert loray("base", "ls", "--json").json == [added]
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
    error = loray("base", "add", other).failed
    assert "architecture GPT2LMHeadModel is not supported; loray covers " in error
    assert all(name in error for name in ARCHITECTURES)
    assert not (home / "bases").exists()


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_from_import_to_rollback(loray: Loray, folder: Path, base: BaseModel, peft_folder: PeftFolder) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert loray("adapters", "import", folder, "--name", "tone", "--alias", "prod").out == "published tone@1\n"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    again = loray("adapters", "import", folder, "--name", "tone", "--json").json
    assert (again["label"], again["aliases"]) == ("tone@1", ["prod"])
    vera = peft_folder(base, "vera")
    second = loray(
        "adapters", "import", vera, "--name", "tone", "--licence", "MIT", "--description", "terse", "--json"
    ).json
    assert (second["version"], second["manifest"]["method"]) == (2, "vera")

    (listed,) = loray("adapters", "ls", "--json").json
    assert (listed["version"], listed["versions"], listed["base"]) == (1, [1, 2], "tiny")
    assert "prod→1" in loray("adapters", "ls").out
    assert loray("adapters", "promote", "tone").out == "tone@prod is version 2 now\n"
    shown = loray("adapters", "show", "tone").out
    for word in ("tone@2", "vera, rank 16, on q_proj v_proj", "MIT", "terse", second["digest"], "→ 2"):
        assert word in shown
    assert loray("adapters", "show", "tone@1", "--json").json["all_aliases"] == {"prod": 2}
    assert loray("adapters", "promote", "tone@1", "prod", "--expected", "1").code == 1
    with closing(Catalog(Settings.from_env().catalog)) as catalog:
        catalog.quarantine.report_death(
            second["digest"], "r1", datetime.now(UTC), lambda deaths: timedelta(minutes=deaths)
        )
    assert "a replica died on it" in loray("adapters", "show", "tone@2").out
    assert loray("adapters", "show", "tone@2", "--json").json["quarantine"]["deaths"] == 1
    assert loray("adapters", "release", "tone@2").out == "released tone@2: the next request tries it\n"
    assert loray("adapters", "release", "tone@2").code == 1
    assert loray("adapters", "rollback", "tone").out == "tone@prod is version 1 again\n"
    assert loray("adapters", "promote", "tone@2", "canary", "--json").json["aliases"] == ["canary"]
    assert "has no earlier target than version 2" in loray("adapters", "rollback", "tone", "canary").failed
    assert "did you mean 'tone'" in loray("adapters", "show", "tnoe").err


def test_an_adapter_is_imported_with_how_it_speaks(loray: Loray, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ tools }}")
    assert loray("adapters", "import", folder, "--name", "tone", "--tool-parser", "mistral").code == 0
    shown = loray("adapters", "show", "tone").out
    assert "mistral" in shown
    assert "its own" in shown
    assert loray("adapters", "import", folder, "--name", "tone", "--tool-parser", "other").code == 2


def test_an_adapter_is_imported_with_its_invocation(loray: Loray, folder: Path) -> None:
    edit_config(folder, alora_invocation_tokens=[257, 97])
    published = loray("adapters", "import", folder, "--name", "tone", "--json").json
    assert (published["manifest"]["method"], published["manifest"]["invocation_tokens"]) == ("alora", [257, 97])
    assert "active from tokens 257 97 on" in loray("adapters", "show", "tone").out
    merged = loray("adapters", "pull", "tone", folder / "m", "--format", "merged")
    assert "active from its invocation on alone" in merged.failed


def test_verify_names_the_damaged_file(loray: Loray, folder: Path, home: Path) -> None:
    published = loray("adapters", "import", folder, "--name", "tone", "--json").json
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


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: edit_config(f, peft_type="XLORA"), "peft_type 'XLORA' is not supported"),
        (lambda f: edit_config(f, use_qalora=True), "use_qalora=True is not supported"),
        (lambda f: edit_config(f, bias="all"), "bias='all' is not supported"),
        (lambda f: edit_config(f, alora_invocation_tokens="a"), "alora_invocation_tokens is 'a', not a list of tokens"),
        (lambda f: edit_config(f, alora_invocation_tokens=[]), "alora_invocation_tokens is [], not a list of tokens"),
        (lambda f: edit_config(f, alora_invocation_tokens=[320]), "go beyond this base's 320 tokens"),
        (lambda f: (f / "adapter_config.json").unlink(), "is not a PEFT adapter"),
        (lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes()[:-50]), "damaged"),
        (lambda f: (f / WEIGHTS_FILE).rename(f / "adapter_model.bin"), "is a pickle and is never read"),
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
    assert loray("adapters", "ls", "--json").json == []


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
    assert (
        "the adapter is for another base model"
        in loray("adapters", "import", folder, "--name", "tone", "--base", "narrow").failed
    )
    assert stored(home) == []


def test_a_published_folder_keeps_its_identity(loray: Loray, folder: Path, home: Path, tmp_path: Path) -> None:
    first = loray("adapters", "import", folder, "--name", "tone", "--json").json
    fetched = tmp_path / "fetched"
    AdapterStore(open_store(f"file://{home}/store")).fetch(first["digest"], fetched)
    moved = loray("adapters", "import", fetched, "--name", "copy", "--json").json
    assert moved["digest"] == first["digest"]
    other = write_checkpoint(tmp_path / "other", seed=5)
    assert loray("base", "add", other).code == 0
    assert "was trained on tiny" in loray("adapters", "import", fetched, "--name", "copy", "--base", "other").failed
    weights = fetched / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "adapter_model.safetensors is damaged" in loray("adapters", "import", fetched, "--name", "copy").err


def test_the_base_is_found(loray: Loray, folder: Path, tmp_path: Path, base: BaseModel) -> None:
    other = write_checkpoint(tmp_path / "other", seed=5)
    assert loray("base", "add", other).code == 0
    edit_config(folder, base_model_name_or_path="somebody/elses")
    assert "--base: other, tiny" in loray("adapters", "import", folder, "--name", "tone").failed
    edit_config(folder, base_model_name_or_path=str(base.path))
    assert loray("adapters", "import", folder, "--name", "tone", "--json").json["manifest"]["base"] == "tiny"


def test_an_adapter_is_shared(loray: Loray, folder: Path) -> None:
    loray("adapters", "import", folder, "--name", "tone")
    assert loray("adapters", "share", "tone", "--with", "acme, beta").out == "tone is seen by default acme beta\n"
    (shown,) = loray("adapters", "ls", "--json").json
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
    found = loray("adapters", "search", "TONE", "--json").json
    assert [entry["name"] for entry in found] == ["tone-de", "tone-en"]
    assert loray("adapters", "search", "--method", "vera", "--json").json == []
    shown = loray("adapters", "search", "e", "--limit", "2").out
    assert "dates" in shown
    assert "the first 2; there are more (--limit)" in shown
    assert loray("adapters", "search", "nobody").out == "no adapter is like that; `loray adapters ls` lists all\n"
    assert loray("adapters", "search", "--tag", "=x").code == 1


@pytest.fixture
def with_canary(home: Path) -> Catalog:
    catalog = Catalog(Settings.from_env().catalog)
    publish(catalog, "tone", 1, 2, 3)
    catalog.aliases.move("tone", "prod", 2)
    return catalog


def test_a_canary_from_its_start_to_its_end(loray: Loray, with_canary: Catalog) -> None:
    given = ("adapters", "canary", "tone", "--version", 3)
    started = loray(*given, "--percent", 10, "--max-error-rate", 0.5, "--min-requests", 10)
    assert started.code == 0
    assert "prod 2→3" in started.out
    grown = loray(*given, "--percent", 20, "--max-ttft-ratio", 3, "--json").json
    wanted = {"max_error_rate": 0.5, "max_ttft_ratio": 3.0, "max_itl_ratio": 2.0, "min_requests": 10}
    assert (grown["percent"], grown["bounds"]) == (20, wanted)
    running = with_canary.canaries.get("tone")
    with_canary.canaries.report("a", {running.id: CanaryCounts(counts(80), counts(20, errors=3))})
    assert loray("adapters", "canary", "tone", "--json").json["counts"]["canary"]["num_requests"] == 20
    (row,) = loray("adapters", "ls", "--json").json
    assert row["weights"] == {"prod": {"2": 80, "3": 20}}
    with_canary.canaries.report("a", {running.id: CanaryCounts(counts(80), counts(30, errors=16))})
    ended = loray("adapters", "canary", "tone", "--json").json
    assert (ended["outcome"], ended["reason"][:24]) == ("rolled_back", "16 of 30 requests failed")
    assert "rolled back" in loray("adapters", "show", "tone").out
    again = loray(*given, "--percent", 10, "--json")
    assert json.loads(again.out)["bounds"]["max_error_rate"] == 0.05
    assert loray("adapters", "promote", "tone@3").out == "tone@prod is version 3 now\n"
    assert with_canary.canaries.get("tone").outcome == "promoted"


def test_wrong_canaries(loray: Loray, with_canary: Catalog) -> None:
    for wrong in (("--version", 3), ("--percent", 3), ("--end", "--version", 3, "--percent", 3), ("--min-requests", 5)):
        assert loray("adapters", "canary", "tone", *wrong).code == 2
    assert loray("adapters", "canary", "tone", "--version", 3, "--percent", 100).code == 2
    assert "has no canary" in loray("adapters", "canary", "tone").err
    assert "points at version 2 already" in loray("adapters", "canary", "tone", "--version", 2, "--percent", 5).err


@pytest.mark.filterwarnings("ignore")
def test_another_kind_becomes_lora_where_little_is_lost(loray: Loray, base: BaseModel, tmp_path: Path) -> None:
    config = LoHaConfig(r=2, target_modules=["q_proj", "v_proj"], init_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), config).save_pretrained(tmp_path / "loha")
    arguments = ("adapters", "import", tmp_path / "loha", "--name", "tone", "--base", base.name)
    plain = loray(*arguments)
    assert (plain.code, "'LOHA' is not supported" in plain.err, "--rank N` makes LoRA" in plain.err) == (1, True, True)
    refused = loray(*arguments, "--rank", "1")
    assert refused.code == 1
    assert "of the change's energy is lost" in refused.err
    assert "more than 1.00% are not: take a higher rank, or allow it with --max-energy-lost" in refused.err
    assert loray("adapters", "ls", "--json").json == []
    assert loray(*arguments, "--rank", "1", "--max-energy-lost", "1").out.startswith("published tone@1, LoRA of rank 1")
    made = loray(*arguments, "--energy", "0.999", "--json").json
    assert made["approximation"]["kind"] == "LOHA"
    assert 0 < made["approximation"]["energy_lost"] <= 0.001
    assert (made["manifest"]["method"], made["manifest"]["rank"]) == ("lora", made["approximation"]["rank"])
    assert made["manifest"]["description"].startswith(f"LoRA of rank {made['manifest']['rank']} made of LOHA: ")
    assert loray(*arguments, "--rank", "1", "--energy", "0.9").code == 2
    assert loray(*arguments, "--max-energy-lost", "0.9").code == 2


def test_what_is_served_is_not_converted(loray: Loray, folder: Path) -> None:
    done = loray("adapters", "import", folder, "--name", "tone", "--rank", "4")
    assert (done.code, "LORA is served as it is: import it without a rank" in done.err) == (1, True)


@pytest.fixture
def vera(loray: Loray, base: BaseModel, peft_folder: PeftFolder) -> str:
    assert loray("adapters", "import", peft_folder(base, "vera"), "--name", "tone").code == 0
    return "tone@1"


def test_vera_becomes_lora(loray: Loray, base: BaseModel, home: Path, vera: str, tmp_path: Path) -> None:
    done = loray("adapters", "convert", vera, "--to", "lora", "--name", "tone-lora", "--alias", "prod")
    assert (done.code, done.out) == (0, "published tone-lora@1, converted from tone@1\n")
    old, new = (loray("adapters", "show", name, "--json").json for name in ("tone", "tone-lora"))
    assert (new["manifest"]["method"], new["manifest"]["rank"]) == ("lora", 16)
    assert new["manifest"]["derived_from"] == old["digest"]
    assert f"converted from {old['digest'][:12]}" in " ".join(loray("adapters", "show", "tone-lora").out.split())
    AdapterStore(open_store(f"file://{home}/store")).fetch(new["digest"], tmp_path / "lora")
    assert (tmp_path / "lora" / WEIGHTS_FILE).stat().st_size > 1000
    assert read_adapter(tmp_path / "lora", base.config).pair is None
    again = loray("adapters", "convert", "tone-lora", "--to", "lora", "--name", "twice")
    assert again.err == "error: the adapter's method is lora, which is stored as LoRA already\n"


def test_merged_is_a_base(loray: Loray, home: Path, vera: str, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    done = loray("adapters", "convert", vera, "--to", "merged", "--folder", target, "--dtype", "bfloat16", "--json")
    assert (done.code, json.loads(done.out)["folder"]) == (0, str(target))
    assert add_base(str(target), home=tmp_path / "other", name="merged").config.hidden_size == 64
    again = loray("adapters", "convert", vera, "--to", "merged", "--folder", target)
    assert (again.code, again.err) == (1, f"error: {target} is not empty; name a new folder\n")
    whole = loray("adapters", "convert", vera, "--to", "merged", "--folder", tmp_path / "new", "--as-trained")
    assert (whole.code, "was not trained on a quantized base" in whole.err) == (1, True)


def test_gguf(loray: Loray, home: Path, vera: str, tmp_path: Path) -> None:
    file = tmp_path / "new" / "tone.gguf"
    done = loray("adapters", "convert", vera, "--to", "gguf", "--file", file, "--json")
    assert (done.code, json.loads(done.out)["file"]) == (0, str(file))
    assert file.read_bytes()[:4] == b"GGUF"
    assert "exists already" in loray("adapters", "convert", vera, "--to", "gguf", "--file", file).err
    for form, target in (("peft", "folder"), ("merged", "checkpoint"), ("gguf", "again.gguf")):
        done = loray("adapters", "pull", "tone", tmp_path / target, "--format", form)
        assert done.out == f"downloaded tone@1 to {tmp_path / target}\n", done.err
    assert (tmp_path / "folder" / WEIGHTS_FILE).is_file()
    assert (tmp_path / "checkpoint" / "config.json").is_file()
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "args",
    [
        ("--to", "lora"),
        ("--to", "lora", "--name", "x", "--folder", "y"),
        ("--to", "merged"),
        ("--to", "merged", "--folder", "y", "--name", "x"),
        ("--to", "gguf"),
        ("--to", "gguf", "--folder", "y"),
        ("--to", "gguf", "--file", "x", "--dtype", "float32"),
        ("--to", "gguf", "--file", "x", "--as-trained"),
        ("--to", "merged", "--folder", "y", "--file", "x"),
    ],
)
def test_wrong_conversions(loray: Loray, vera: str, args: tuple[str, ...]) -> None:
    assert loray("adapters", "convert", vera, *args).code == 2
