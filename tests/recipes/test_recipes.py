"""Recipes: shipped ones, paths, defaults with their reasons, texts; what is wrong is said before anything starts."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.driver.prepare import prepare
from loray.bases.presets import preset
from loray.bases.quantization import Quantization
from loray.bases.registry import BaseModel, add_base, ensure_base, get_base
from loray.errors import BaseNotFound, DataError, SpecError
from loray.methods import METHODS
from loray.recipes.defaults import BASE_SIZES, complete, defaults_of, size_of
from loray.recipes.fields import fields_of, given, to_yaml
from loray.recipes.load import load_recipe, purpose, shipped, size_of_base
from loray.recipes.resolve import resolve
from loray.settings import Settings
from loray.spec import OBJECTIVES, DpoSpec, Method, ObjectiveType, TrainSpec
from loray.store import open_filesystem
from tests.fixtures.calls import refused
from tests.fixtures.recipes import RECIPE, write
from tests.fixtures.s3 import S3Server
from tests.fixtures.tiny import write_checkpoint


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
    small = ("dpo", "grpo", "ia3", "kto", "longlora", "lora", "miss", "orpo", "road", "simpo", "vera")
    assert shipped() == sorted([*(f"{kind}_smollm2.yaml" for kind in small), *llama])
    specs = {name: load_recipe(name).spec for name in shipped()}
    kinds = {
        name: spec.adapter.method if spec.objective.type in ("sft", "distill") else spec.objective.type
        for name, spec in specs.items()
    }
    assert all(name.startswith(kind) for name, kind in kinds.items())
    assert load_recipe("vera_smollm2") == load_recipe("vera_smollm2.yaml")


def test_paths_start_at_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write(tmp_path / "a", data={"train": "../data.jsonl", "eval": "s3://bucket/eval.parquet"})
    assert recipe.data().train == str(tmp_path / "data.jsonl")
    assert recipe.data().eval == "s3://bucket/eval.parquet"
    assert recipe.spec.data.train == "../data.jsonl"  # what is published names no folder of this machine
    monkeypatch.chdir(tmp_path)
    assert load_recipe("lora_smollm2").data().train == str(tmp_path / "data" / "train.jsonl")


@pytest.mark.parametrize("path", ["data\0.jsonl", "~nobody-of-this-name/data.jsonl"])
def test_what_is_no_path_is_refused(tmp_path: Path, path: str) -> None:
    recipe = write(tmp_path, data={"train": path})
    with pytest.raises(DataError, match="is no path"):
        recipe.data()


def test_a_recipe_is_also_an_object_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(json.dumps(RECIPE))
    assert recipe.spec == write(tmp_path).spec
    assert (recipe.path, recipe.data().train) == (None, str(tmp_path / "data.jsonl"))
    refused(SpecError, "the recipe is not valid JSON", load_recipe, '{"name": ')
    refused(SpecError, r"recipe nothing does not exist; .*lora_smollm2\.yaml", load_recipe, "nothing")
    refused(SpecError, r"the recipe is not valid:\n  speed: ", load_recipe, json.dumps(RECIPE | {"speed": 1}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": {"learning_rat": 0.1}}, "learning_rat"),
        ({"dtype": "float16"}, "float16 needs loss scaling"),
        ({"optimizer": {"learning_rate": float("inf")}}, r"optimizer\.learning_rate: .*finite"),
        ({"max_steps": None, "num_epochs": float("inf")}, "num_epochs: .*finite"),
        ({"adapter": {"method": "lora", "alpha": float("inf")}}, r"alpha: .*finite"),
        ({"adapter": {"method": "vera", "d_initial": float("nan")}}, r"d_initial: .*finite"),
    ],
)
def test_unknown_fields_and_numbers_that_cannot_train_are_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    refused(SpecError, message, write, tmp_path, **fields)


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
    refused(error, message, prepare, write(tmp_path, **fields), settings)


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
    with_options = write(tmp_path, data=data | {"train": f"{good}?{options}"})
    assert prepare(with_options, settings).data.report == local.data.report
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

    def build(name: str, *, home: Path, progress: object) -> BaseModel:
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
    refused(BaseNotFound, "loray base add other", ensure_base, home, "other")


def test_rows_of_a_long_context_adapter_fill_its_context(tmp_path: Path, settings: Settings, base: BaseModel) -> None:
    long = {"adapter": {"method": "longlora"}, "rope_scaling": {"factor": 2, "original_context": 64}}
    assert resolve(write(tmp_path, **long, data={"train": "data.jsonl"}).spec, base.config).row_length == 128
    assert resolve(write(tmp_path, **long).spec, base.config).row_length == 64
    window = resolve(write(tmp_path, data={"train": "data.jsonl"}).spec, base.config)
    assert window.row_length == 512  # of the base
    too_long = write(tmp_path, **long, data={"train": "data.jsonl", "max_length": 129})
    refused(SpecError, r"context is 128 tokens; lower it$", resolve, too_long.spec, base.config)


def test_a_quantised_base_is_not_quantised_again(tmp_path: Path, base: BaseModel) -> None:
    form = replace(base.config, quantization=Quantization("awq", "int4", 128))
    recipe = write(tmp_path, quantization={}).spec
    assert resolve(recipe, base.config) == resolve(write(tmp_path).spec, form)
    message = r"the base tiny is quantised already \(int4 \(awq, groups of 128\)\): leave quantization out"
    refused(SpecError, message, resolve, recipe, form)


def test_attention_scaling_and_method_are_independent(tmp_path: Path) -> None:
    spec = write(tmp_path, adapter={"method": "longlora"}).spec
    assert (spec.attention.type, spec.rope_scaling) == ("s2", None)
    spec = write(tmp_path, adapter={"method": "vera"}, attention={"type": "s2"}, rope_scaling={"factor": 2}).spec
    assert (spec.attention.type, spec.rope_scaling and spec.rope_scaling.factor) == ("s2", 2)
    spec = write(tmp_path, adapter={"method": "longlora"}, attention={"type": "dense"}).spec
    assert spec.attention.type == "dense"
    assert write(tmp_path).spec.attention.type == "dense"
    refused(SpecError, "group_size is S2-Attn's: set type: s2", write, tmp_path, attention={"group_size": 8})


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
    refused(SpecError, fix, prepare, write(tmp_path, **long, data=data), settings)
    prepare(write(tmp_path, **long, data=data | {"max_length": 32}), settings)


LITTLE: dict[str, Any] = {"name": "tone", "data": {"train": "my.jsonl"}}


def little(method: Method, **fields: Any) -> dict[str, Any]:
    return LITTLE | {"adapter": {"method": method}} | fields


def parsed(fields: dict[str, Any], size: Any) -> TrainSpec:
    return TrainSpec.parse(complete(fields, size), source="little")


# -- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("method", METHODS)
def test_every_field_has_a_reason_and_no_reason_is_of_another_field(method: Method, objective: ObjectiveType) -> None:
    fields, defaults = fields_of(method, objective), defaults_of(method, objective)
    assert [path for path in fields if path not in defaults] == []
    strangers = set(defaults) - {path for other in METHODS for path in fields_of(other, objective)}
    assert strangers == set()


@pytest.mark.parametrize("size", BASE_SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_a_name_and_data_are_enough(method: Method, size: Any) -> None:
    spec = parsed(little(method), size)
    assert (spec.adapter.method, spec.base, spec.warnings) == (method, "smollm2", ())


def test_an_objective_of_pairs_is_enough_too() -> None:
    for method in ("lora", "dora", "vera"):
        spec = load_recipe(over=little(method) | given(["adapter.method=" + method, "objective.type=dpo"])).spec
        assert (spec.objective.model_dump(), spec.batch.rows) == (DpoSpec().model_dump(), 4)
        assert (spec.optimizer.learning_rate, spec.warnings) == (5e-5 if method == "vera" else 5e-6, ())
    for kind in ("dpo", "orpo", "simpo", "kto"):
        ours = load_recipe(f"{kind}_smollm2").spec
        plain = parsed(LITTLE | {"objective": {"type": kind}}, "small")
        assert (ours.objective, ours.adapter, ours.optimizer) == (plain.objective, plain.adapter, plain.optimizer)
        assert ours.batch.rows == plain.batch.rows
    refused(SpecError, r"objective\.sft\.beta", load_recipe, over=LITTLE | given(["objective.beta=0.2"]))


def test_the_defaults_are_those_of_the_shipped_recipes() -> None:
    """But for what a recipe says for its own reasons: name, data, length and order of rows, and its alias."""
    for method in ("lora", "vera"):
        ours = load_recipe(f"{method}_smollm2").spec
        plain = parsed(little(method), "small")
        assert (ours.adapter, ours.optimizer, ours.num_epochs) == (plain.adapter, plain.optimizer, plain.num_epochs)
        assert ours.batch.rows == plain.batch.rows
    llama, large = load_recipe("longlora_llama2_7b_32k").spec, complete(little("longlora"), "large")
    plain = TrainSpec.parse(large, source="little")
    for name in ("learning_rate", "beta2"):
        assert getattr(llama.optimizer, name) == getattr(plain.optimizer, name)
    assert llama.batch == plain.batch.model_copy(update={"order": "concat"})
    assert (llama.adapter, llama.attention, llama.max_steps) == (plain.adapter, plain.attention, plain.max_steps)


def test_the_size_of_the_base_decides_the_rate() -> None:
    small, large = preset("smollm2"), preset("Llama-2-7b-hf")
    assert (size_of(small), size_of(large), size_of(None)) == ("small", "large", "large")
    rates = {
        (method, size): parsed(little(method), size).optimizer.learning_rate
        for method in METHODS
        for size in BASE_SIZES
    }
    for size in BASE_SIZES:
        assert rates["vera", size] >= 10 * rates["lora", size]
    for method in METHODS:
        assert rates[method, "large"] < rates[method, "small"]
    assert load_recipe(over=LITTLE | {"base": "Llama-2-7b-hf"}, shape_of=preset).spec.optimizer.learning_rate == 2e-4
    assert load_recipe(over=LITTLE, shape_of=preset).spec.optimizer.learning_rate == 1e-3
    assert size_of_base(None, preset) == "large"


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_goes_on_from_an_adapter_has_the_rate_of_a_new_one_and_says_why(method: Method) -> None:
    on = {"init_adapter": "tone@1"}
    assert complete(little(method, **on), "small") == complete(little(method), "small") | on
    text = to_yaml(parsed(little(method, **on), "small"), "small")
    assert "as for a new adapter" in text
    assert "as for a new adapter" not in to_yaml(parsed(little(method), "small"), "small")


@pytest.mark.parametrize(
    ("fields", "path", "value"),
    [
        ({"batch": {"tokens": 100}}, "batch", {"tokens": 100}),
        ({"optimizer": {"warmup_steps": 3}}, "optimizer", {"warmup_steps": 3, "learning_rate": 1e-3}),
        ({"optimizer": {"warmup_ratio": None}}, "optimizer", {"warmup_ratio": None, "learning_rate": 1e-3}),
        ({"max_steps": 5}, "num_epochs", None),
        ({"optimizer": "fast"}, "optimizer", "fast"),  # for the parser to refuse
        ({"adapter": {"method": "none"}}, "optimizer", None),
    ],
)
def test_what_is_given_stays(fields: dict[str, Any], path: str, value: object) -> None:
    assert complete(LITTLE | fields, "small").get(path) == value


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({"batch": "auto"}, 8),
        ({"batch": {"accumulation": "auto", "order": "packed"}}, 8),
        ({"batch": {"accumulation": "auto", "rows": 48}}, 48),
        ({"batch": "auto", "objective": {"type": "dpo"}}, 4),
        ({"batch": "auto", "adapter": {"method": "longlora"}}, 4),
    ],
)
def test_a_batch_that_is_cut_to_fit_has_the_rows_of_the_default_step(fields: dict[str, Any], rows: int) -> None:
    batch = parsed(LITTLE | fields, "small").batch
    assert (batch.rows, batch.accumulation, batch.tokens) == (rows, "auto", None)
    assert complete(complete(LITTLE | fields, "small"), "small") == complete(LITTLE | fields, "small")


def test_a_batch_that_is_cut_to_fit_keeps_the_step_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, batch={"rows": 2, "accumulation": 6, "order": "packed"}).path
    batch = load_recipe(str(path), over=given(["batch=auto"])).spec.batch
    assert (batch.rows, batch.accumulation, batch.order) == (12, "auto", "packed")
    batch = load_recipe(str(path), over=given(["batch.accumulation=auto"])).spec.batch
    assert (batch.rows, batch.accumulation) == (2, "auto")
    write(tmp_path, batch={"tokens": 100})
    refused(SpecError, "give rows instead of tokens", load_recipe, str(path), over={"batch": "auto"})


def test_completing_changes_neither_its_argument_nor_a_complete_recipe() -> None:
    fields = little("lora", optimizer={"schedule": "linear"})
    whole = complete(fields, "small")
    assert fields["optimizer"] == {"schedule": "linear"}
    assert complete(whole, "large") == whole
    spec = parsed(little("lora", optimizer={"warmup_ratio": None}), "small")
    assert parsed(spec.model_dump(mode="json"), "large") == spec


# -- fields as text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("optimizer.learning_rate=1e-3", {"optimizer": {"learning_rate": 1e-3}}),
        ("max_steps = 12", {"max_steps": 12}),
        ("use_gpu=true", {"use_gpu": True}),
        ("adapter.target_modules=q_proj,v_proj", {"adapter": {"target_modules": ("q_proj", "v_proj")}}),
        ("adapter.target_modules=[q_proj]", {"adapter": {"target_modules": ("q_proj",)}}),
        ("optimizer.max_grad_norm=null", {"optimizer": {"max_grad_norm": None}}),
        ("evaluation.perplexity={stride: 64}", {"evaluation": {"perplexity": {"stride": 64}}}),
        ("evaluation.perplexity.stride=64", {"evaluation": {"perplexity": {"stride": 64}}}),
        ("publish.description=a=b", {"publish": {"description": "a=b"}}),
        ("publish.licence=2", {"publish": {"licence": "2"}}),
    ],
)
def test_values_get_their_fields_types(text: str, fields: dict[str, Any]) -> None:
    assert load_recipe(over=LITTLE | given([text])).spec == load_recipe(over=LITTLE | fields).spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate=1", "did you mean optimizer.learning_rate?"),
        ("optimizer.learnig_rate=1", "did you mean optimizer.learning_rate?"),
        ("adapter.rnk=8", "did you mean adapter.rank?"),
        ("max_step=8", "did you mean max_steps"),
        ("colour=blue", "`loray recipes show` has them all"),
        ("seed", "gives a field no value"),
        ("evaluation.perplexity={stride", "is not valid YAML"),
        ("base=[2026-13-45]", "is not valid YAML"),
        ("base=" + "[" * 5000, "is not valid YAML"),
        ("base={a: &x {b: 1}, c: *x}", "write out what the alias *x stands for"),
    ],
)
def test_an_unknown_field_names_those_that_are_near(text: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        given([text])
    assert message in str(error.value)


def test_several_sources_start_where_they_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "recipe.yaml").write_text(yaml.safe_dump(little("lora")))
    sources = given(["data.train=[{path: b/*.jsonl, weight: 2}, s3://bucket/c]"])
    recipe = load_recipe("a/recipe.yaml", over=sources)
    assert recipe.spec.data.paths == ("../b/*.jsonl", "s3://bucket/c")
    assert recipe.data().paths == (str(tmp_path / "b" / "*.jsonl"), "s3://bucket/c")
    alone = load_recipe(over={"name": "tone", "data": {"train": ["x/**/*.jsonl", "y.jsonl"]}})
    assert (alone.folder, alone.spec.data.train) == (tmp_path, ("x/**/*.jsonl", "y.jsonl"))


def test_a_value_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(SpecError, match=r"optimizer\.learning_rate: Input should be a valid number"):
        load_recipe(over=LITTLE | given(["optimizer.learning_rate=fast"]))
    refused(SpecError, "alpha", load_recipe, over=little("vera") | given(["adapter.method=vera", "adapter.alpha=3"]))


# -- where a recipe comes from ----------------------------------------------------------------------------------------


def test_values_lie_on_top_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "recipe.yaml").write_text(yaml.safe_dump(little("vera", seed=3)))
    recipe = load_recipe("a/recipe.yaml", over=given(["seed=4", "data.train=b/my.jsonl"]))
    assert (recipe.path, recipe.folder) == (None, tmp_path / "a")
    assert (recipe.spec.adapter.method, recipe.spec.seed) == ("vera", 4)
    assert recipe.spec.data.train == "../b/my.jsonl"  # given from the current folder
    assert recipe.data().train == str(tmp_path / "b" / "my.jsonl")
    assert load_recipe("a/recipe.yaml").path == tmp_path / "a" / "recipe.yaml"


def test_a_recipe_of_values_alone_starts_at_its_data(tmp_path: Path) -> None:
    files = {"train": str(tmp_path / "a" / "x.jsonl"), "eval": str(tmp_path / "b" / "y.jsonl")}
    recipe = load_recipe(over={"name": "tone", "data": files})
    assert (recipe.folder, recipe.spec.data.train, recipe.spec.data.eval) == (tmp_path, "a/x.jsonl", "b/y.jsonl")
    assert recipe.data().train == files["train"]
    far = load_recipe(over={"name": "tone", "data": {"train": "s3://bucket/x.jsonl"}})
    assert (far.folder, far.data().train) == (Path.cwd(), "s3://bucket/x.jsonl")


def test_name_and_data_are_needed_but_in_an_example() -> None:
    refused(SpecError, "--name NAME and --data FILE is needed", load_recipe)
    refused(SpecError, r"recipe, --data FILE is needed", load_recipe, over={"name": "tone"})
    assert load_recipe(over={"adapter": {"method": "vera"}}, is_example=True).spec.name == "my-vera"


# -- as text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", BASE_SIZES)
def test_a_recipe_as_yaml_is_the_same_recipe(tmp_path: Path, size: Any) -> None:
    specs = [load_recipe(name).spec for name in shipped()]
    for method in METHODS:
        specs.append(parsed(little(method), size))
    odd = {"optimizer": {"warmup_ratio": None, "max_grad_norm": None}, "batch": {"tokens": 64}, "max_steps": 1}
    specs.append(parsed(little("lora", **odd), size))
    words = {"publish": {"description": "null # it's 1", "aliases": ["prod"]}, "name": "2.0"}
    specs.append(parsed(little("vera", **words), size))
    specs.append(parsed(little("lora", init_adapter="tone@1"), size))
    for objective in ({"type": "dpo", "loss_type": "ipo"}, {"type": "simpo", "cpo_alpha": 0.5}, {"type": "kto"}):
        specs.append(parsed(little("vera", objective=objective), size))
    for spec in specs:
        text = to_yaml(spec, size)
        (tmp_path / "again.yaml").write_text(text)
        base = preset("smollm2" if size == "small" else "Llama-2-7b-hf")
        assert load_recipe(str(tmp_path / "again.yaml"), shape_of=lambda name, base=base: base).spec == spec  # type: ignore[misc]
        assert all(len(line) <= 120 for line in text.splitlines())


def test_a_recipe_as_yaml_gives_reasons_and_what_was_changed() -> None:
    text = to_yaml(load_recipe(over=little("vera") | given(["seed=3"]), shape_of=preset).spec, "small")
    assert "learning_rate: 0.01  # about ten times LoRA's" in text
    assert "seed: 3  # default 0: of initial values" in text
    assert "  # tokens:  (instead of `rows`" in text


def test_shipped_recipes_say_what_they_are_for() -> None:
    assert purpose("lora_smollm2.yaml") == "LoRA on SmolLM2-135M-Instruct: the usual first adapter."
    assert all(purpose(name).endswith(".") and "loray " not in purpose(name) for name in shipped())
