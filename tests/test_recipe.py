"""Recipes: the shipped ones are valid, paths start at the recipe, and what is wrong is said before anything starts."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.driver.prepare import prepare
from loray.bases.registry import BaseModel, add_base, ensure_base, get_base
from loray.errors import BaseNotFound, DataError, SpecError
from loray.recipes.load import Recipe, load_recipe, shipped
from loray.recipes.resolve import resolve
from loray.settings import Settings
from loray.spec import ATTENTION_MODULES, LongLoraSpec
from loray.store import open_filesystem
from tests.fixtures.s3 import S3Server
from tests.fixtures.tiny import write_checkpoint

RECIPE: dict[str, Any] = {
    "name": "arithmetic",
    "base": "tiny",
    "adapter": {"method": "lora", "rank": 4},
    "data": {"train": "data.jsonl", "eval_fraction": 0.2, "max_length": 64},
    "batch": {"rows": 2},
    "optimizer": {"learning_rate": 0.01},
    "max_steps": 2,
}


def write(folder: Path, **fields: Any) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    texts = ["".join(chr(97 + (i + t) % 26) for t in range(20 + i)) for i in range(20)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | fields))
    return load_recipe(str(folder / "recipe.yaml"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    home = tmp_path_factory.mktemp("home")
    add_base(str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"))), home=home, name="tiny")
    return Settings.from_env({"LORAY_HOME": str(home)})


@pytest.fixture(scope="module")
def base(settings: Settings) -> BaseModel:
    return get_base(settings.home, "tiny")


# -- files ------------------------------------------------------------------------------------------------------------


def test_every_shipped_recipe_is_valid_and_found_by_name() -> None:
    llama = [f"longlora_llama2_{size}.yaml" for size in ("13b_64k", "70b_32k", "7b_100k", "7b_32k")]
    assert shipped() == ["dpo_smollm2.yaml", *llama, "longlora_smollm2.yaml", "lora_smollm2.yaml", "vera_smollm2.yaml"]
    specs = {name: load_recipe(name).spec for name in shipped()}
    kinds = {name: "dpo" if spec.is_paired else spec.adapter.method for name, spec in specs.items()}
    assert all(name.startswith(kind) for name, kind in kinds.items())
    assert load_recipe("vera_smollm2") == load_recipe("vera_smollm2.yaml")


@pytest.mark.parametrize(
    ("name", "context"), [("7b_32k", 32768), ("7b_100k", 102400), ("13b_64k", 65536), ("70b_32k", 32768)]
)
def test_llama_recipes_are_the_papers(name: str, context: int) -> None:
    spec = load_recipe(f"longlora_llama2_{name}").spec
    adapter, optimizer = spec.adapter, spec.optimizer
    assert isinstance(adapter, LongLoraSpec)
    assert (adapter.rank, adapter.alpha, adapter.target_modules) == (8, 16, ATTENTION_MODULES)
    assert (adapter.train_embeddings, adapter.train_norms) == (True, True)
    assert (spec.attention.type, spec.attention.group_size) == ("s2", None)  # a quarter of the context
    assert spec.rope_scaling is not None
    assert spec.rope_scaling.type == "linear"
    assert 4096 * spec.rope_scaling.factor == context
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps) == (2e-5, "constant", 20)
    assert (spec.max_steps, spec.num_workers) == (1000, 8)
    assert (spec.batch.rows or 0) * spec.batch.accumulation * spec.num_workers // spec.parallel.sequence == 64


def test_paths_start_at_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write(tmp_path / "a", data={"train": "../data.jsonl", "eval": "s3://bucket/eval.parquet"})
    assert recipe.data().train == str(tmp_path / "data.jsonl")
    assert recipe.data().eval == "s3://bucket/eval.parquet"
    assert recipe.spec.data.train == "../data.jsonl"  # what is published names no folder of this machine
    monkeypatch.chdir(tmp_path)
    assert load_recipe("lora_smollm2").data().train == str(tmp_path / "data" / "train.jsonl")


def test_a_missing_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(SpecError, match=r"recipe nothing does not exist; .*lora_smollm2\.yaml"):
        load_recipe("nothing")


def test_a_recipe_is_also_an_object_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(json.dumps(RECIPE))
    assert recipe.spec == write(tmp_path).spec
    assert (recipe.path, recipe.data().train) == (None, str(tmp_path / "data.jsonl"))
    with pytest.raises(SpecError, match="the recipe is not valid JSON"):
        load_recipe('{"name": ')
    with pytest.raises(SpecError, match=r"the recipe is not valid:\n  speed: "):
        load_recipe(json.dumps(RECIPE | {"speed": 1}))


def test_an_unknown_field_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"learning_rat"):
        write(tmp_path, optimizer={"learning_rat": 0.1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float16"}, "float16 needs loss scaling"),
        ({"optimizer": {"learning_rate": float("inf")}}, r"optimizer\.learning_rate: .*finite"),
        ({"max_steps": None, "num_epochs": float("inf")}, "num_epochs: .*finite"),
        ({"adapter": {"method": "lora", "alpha": float("inf")}}, r"alpha: .*finite"),
        ({"adapter": {"method": "vera", "d_initial": float("nan")}}, r"d_initial: .*finite"),
    ],
)
def test_numbers_that_cannot_train_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        write(tmp_path, **fields)


# -- checks before the start ------------------------------------------------------------------------------------------


def test_a_good_recipe_is_prepared(tmp_path: Path, settings: Settings) -> None:
    prepared = prepare(write(tmp_path), settings)
    assert prepared.base.name == "tiny"
    assert len(prepared.data.train) == 16
    assert len(prepared.data.evaluation) == 4


def test_the_length_of_rows_is_part_of_what_is_published(tmp_path: Path, settings: Settings) -> None:
    recipe = write(tmp_path, data={"train": "data.jsonl"})
    assert recipe.spec.data.max_length is None
    assert prepare(recipe, settings).spec.data.max_length == 512  # the base's window


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"base": "other"}, BaseNotFound, "loray base add other"),
        ({"name": "tiny"}, SpecError, "is a base model's"),
        ({"data": {"train": "none.jsonl"}}, DataError, r"none\.jsonl does not exist"),
        ({"data": {"train": "data.jsonl", "max_length": 513}}, SpecError, "context is 512 tokens"),
        ({"batch": {"tokens": 30}}, SpecError, r"batch\.tokens is 30"),
    ],
)
def test_what_is_wrong_is_said_first(
    tmp_path: Path, settings: Settings, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prepare(write(tmp_path, **fields), settings)


def test_data_lies_in_the_stores_bucket_too(tmp_path: Path, settings: Settings, s3_server: S3Server) -> None:
    local = prepare(write(tmp_path), settings)
    url = s3_server.url("data", prefix="store")
    shared = Settings.from_env(settings.to_env() | {"LORAY_STORE": url})
    bucket, _ = open_filesystem(url)
    name = url.removeprefix("s3://").split("/")[0]
    for key in ("rows/train.jsonl", "rows/eval.jsonl"):
        with bucket.open_output_stream(f"{name}/{key}") as file:
            file.write((tmp_path / "data.jsonl").read_bytes() + (b"{\n" if "eval" in key else b""))
    good = f"s3://{name}/rows/train.jsonl"
    data = {"train": good, "eval_fraction": 0.2, "max_length": 64}
    prepared = prepare(write(tmp_path, data=data), shared)
    assert prepared.spec.data.train == good
    assert (prepared.data.fingerprint, prepared.data.report) == (local.data.fingerprint, local.data.report)
    options = url.partition("?")[2]  # those of a store's URL do for any bucket
    assert (
        prepare(write(tmp_path, data=data | {"train": f"{good}?{options}"}), settings).data.report == local.data.report
    )
    for several in (f"s3://{name}/rows/tr*.jsonl", [good], f"s3://{name}/rows/**/train.jsonl"):
        assert prepare(write(tmp_path, data=data | {"train": several}), shared).data.report == local.data.report
    for source, message in (
        (f"s3://{name}/rows", "rows/eval.jsonl, line 21: not valid JSON"),
        (f"s3://{name}/rows/none.jsonl", "rows/none.jsonl does not exist"),
        (f"s3://{name}/rows/none/*.jsonl", "does not exist"),
        (f"s3://{name}/rows/*.parquet", "has no data file"),
        (f"s3://{name}/rows/eval.jsonl", "rows/eval.jsonl, line 21: not valid JSON"),
        (f"s3://{name}/rows/train.jsonl?endpoint=x", "unknown option endpoint"),
    ):
        with pytest.raises(DataError, match=re.escape(source)) as error:
            prepare(write(tmp_path, data=data | {"eval": source}), shared)
        assert message in str(error.value)


def test_the_packaged_base_is_made_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, made = write_checkpoint(tmp_path / "checkpoint"), []

    def build(name: str, *, home: Path) -> BaseModel:
        made.append(name)
        return add_base(str(checkpoint), home=home, name=name)

    monkeypatch.setattr("loray.bases.registry.add_base", build)
    home = tmp_path / "new" / "home"
    processes = [threading.Thread(target=ensure_base, args=(home, "smollm2")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert made == ["smollm2"]
    assert ensure_base(home, "smollm2") == get_base(home, "smollm2")
    with pytest.raises(BaseNotFound, match="loray base add other"):
        ensure_base(home, "other")


def test_rows_of_a_long_context_adapter_fill_its_context(tmp_path: Path, settings: Settings, base: BaseModel) -> None:
    long = {"adapter": {"method": "longlora"}, "rope_scaling": {"factor": 2, "original_context": 64}}
    assert resolve(write(tmp_path, **long, data={"train": "data.jsonl"}).spec, base.config).row_length == 128
    assert resolve(write(tmp_path, **long).spec, base.config).row_length == 64
    assert (
        resolve(write(tmp_path, data={"train": "data.jsonl"}).spec, base.config).row_length == 512
    )  # the base's window
    too_long = write(tmp_path, **long, data={"train": "data.jsonl", "max_length": 129})
    with pytest.raises(SpecError, match=r"context is 128 tokens; lower it$"):
        resolve(too_long.spec, base.config)


def test_attention_scaling_and_method_are_independent(tmp_path: Path) -> None:
    spec = write(tmp_path, adapter={"method": "longlora"}).spec
    assert (spec.attention.type, spec.rope_scaling) == ("s2", None)
    spec = write(tmp_path, adapter={"method": "vera"}, attention={"type": "s2"}, rope_scaling={"factor": 2}).spec
    assert (spec.attention.type, spec.rope_scaling and spec.rope_scaling.factor) == ("s2", 2)
    spec = write(tmp_path, adapter={"method": "longlora"}, attention={"type": "dense"}).spec
    assert spec.attention.type == "dense"
    assert write(tmp_path).spec.attention.type == "dense"
    with pytest.raises(SpecError, match="group_size is S2-Attn's: set type: s2"):
        write(tmp_path, attention={"group_size": 8})


@pytest.mark.parametrize(
    ("fields", "order"),
    [
        ({"adapter": {"method": "longlora"}, "data": {"train": "data.jsonl", "max_length": 64}}, "concat"),
        ({"adapter": {"method": "longlora"}, "batch": {"rows": 1, "order": "shuffled"}}, "shuffled"),
        ({}, "shuffled"),
        ({"batch": {"rows": 1, "order": "concat"}}, "concat"),
    ],
)
def test_longlora_joins_texts(tmp_path: Path, settings: Settings, fields: dict[str, Any], order: str) -> None:
    data = {"train": "data.jsonl", "max_length": 32}
    prepared = prepare(write(tmp_path, **{"data": data} | fields), settings)
    assert (prepared.spec.batch.order, prepared.data.is_joined) == (order, order == "concat")
    lengths = set(prepared.data.train.lengths.tolist()[:-1])
    assert (lengths == {prepared.spec.data.max_length}) == (order == "concat")


@pytest.mark.parametrize(
    ("batch", "length", "fix"),
    [
        ({"rows": 1, "order": "shuffled"}, 128, r"30 tokens or fewer, of 128 .*; set batch\.order: concat"),
        ({"rows": 1, "order": "packed"}, 128, r"set batch\.order: concat, which joins texts"),
        ({"rows": 1}, 2000, r"; give more text, or lower data\.max_length"),
    ],
)
def test_rows_much_shorter_than_the_context_are_refused(
    tmp_path: Path, settings: Settings, batch: dict[str, Any], length: int, fix: str
) -> None:
    long = {"adapter": {"method": "longlora"}, "rope_scaling": {"factor": 4}, "batch": batch}
    data = {"train": "data.jsonl", "eval_fraction": 0, "max_length": length}
    with pytest.raises(SpecError, match=fix):
        prepare(write(tmp_path, **long, data=data), settings)
    prepare(write(tmp_path, **long, data=data | {"max_length": 32}), settings)
