"""Defaults of recipes: each field has one and a reason, and a recipe that says little is what its method wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from loray.bases.presets import preset
from loray.errors import SpecError
from loray.recipes.defaults import BASE_SIZES, METHODS, OBJECTIVES, complete, defaults_of, size_of
from loray.recipes.fields import fields_of, given, to_yaml
from loray.recipes.load import load_recipe, purpose, shipped, size_of_base
from loray.spec import DpoSpec, Method, ObjectiveType, TrainSpec

LITTLE: dict[str, Any] = {"name": "tone", "data": {"train": "my.jsonl"}}


def little(method: Method, **fields: Any) -> dict[str, Any]:
    return LITTLE | {"adapter": {"method": method}} | fields


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
    spec = TrainSpec.parse(complete(little(method), size), source="little")
    assert (spec.adapter.method, spec.base, spec.warnings) == (method, "smollm2", ())


def test_an_objective_of_pairs_is_enough_too() -> None:
    for method in ("lora", "dora", "vera"):
        spec = load_recipe(over=little(method) | given(["adapter.method=" + method, "objective.type=dpo"])).spec
        assert spec.is_paired
        assert (spec.objective.model_dump(), spec.batch.rows) == (DpoSpec().model_dump(), 4)
        assert (spec.optimizer.learning_rate, spec.warnings) == (5e-5 if method == "vera" else 5e-6, ())
    ours = load_recipe("dpo_smollm2").spec
    plain = TrainSpec.parse(complete(LITTLE | {"objective": {"type": "dpo"}}, "small"), source="little")
    assert (ours.objective, ours.adapter, ours.optimizer) == (plain.objective, plain.adapter, plain.optimizer)
    with pytest.raises(SpecError, match=r"objective\.sft\.beta"):
        load_recipe(over=LITTLE | given(["objective.beta=0.2"]))


def test_the_defaults_are_those_of_the_shipped_recipes() -> None:
    """But for what a recipe says for its own reasons: name, data, length and order of rows, and its alias."""
    for method in ("lora", "vera"):
        ours = load_recipe(f"{method}_smollm2").spec
        plain = TrainSpec.parse(complete(little(method), "small"), source="little")
        assert (ours.adapter, ours.optimizer, ours.num_epochs) == (plain.adapter, plain.optimizer, plain.num_epochs)
        assert ours.batch.rows == plain.batch.rows
    llama, large = load_recipe("longlora_llama2_7b_32k").spec, complete(little("longlora"), "large")
    plain = TrainSpec.parse(large, source="little")
    assert (llama.optimizer.learning_rate, llama.optimizer.beta2) == (
        plain.optimizer.learning_rate,
        plain.optimizer.beta2,
    )
    assert llama.batch == plain.batch.model_copy(update={"order": "concat"})
    assert (llama.adapter, llama.attention, llama.max_steps) == (plain.adapter, plain.attention, plain.max_steps)


def test_the_size_of_the_base_decides_the_rate() -> None:
    small, large = preset("smollm2"), preset("Llama-2-7b-hf")
    assert (size_of(small), size_of(large), size_of(None)) == ("small", "large", "large")
    rates = {
        (method, size): TrainSpec.parse(complete(little(method), size), source="little").optimizer.learning_rate
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
    text = to_yaml(TrainSpec.parse(complete(little(method, **on), "small"), source="on"), "small")
    assert "as for a new adapter" in text
    assert "as for a new adapter" not in to_yaml(
        TrainSpec.parse(complete(little(method), "small"), source="new"), "small"
    )


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


def test_completing_changes_neither_its_argument_nor_a_complete_recipe() -> None:
    fields = little("lora", optimizer={"schedule": "linear"})
    whole = complete(fields, "small")
    assert fields["optimizer"] == {"schedule": "linear"}
    assert complete(whole, "large") == whole
    spec = TrainSpec.parse(complete(little("lora", optimizer={"warmup_ratio": None}), "small"), source="little")
    assert TrainSpec.parse(complete(spec.model_dump(mode="json"), "large"), source="again") == spec


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
    with pytest.raises(SpecError, match="alpha"):
        load_recipe(over=little("vera") | given(["adapter.method=vera", "adapter.alpha=3"]))


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
    with pytest.raises(SpecError, match="--name NAME and --data FILE is needed"):
        load_recipe()
    with pytest.raises(SpecError, match=r"recipe, --data FILE is needed"):
        load_recipe(over={"name": "tone"})
    assert load_recipe(over={"adapter": {"method": "vera"}}, is_example=True).spec.name == "my-vera"


# -- as text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", BASE_SIZES)
def test_a_recipe_as_yaml_is_the_same_recipe(tmp_path: Path, size: Any) -> None:
    specs = [load_recipe(name).spec for name in shipped()]
    for method in METHODS:
        specs.append(TrainSpec.parse(complete(little(method), size), source="little"))
    odd = {"optimizer": {"warmup_ratio": None, "max_grad_norm": None}, "batch": {"tokens": 64}, "max_steps": 1}
    specs.append(TrainSpec.parse(complete(little("lora", **odd), size), source="odd"))
    words = {"publish": {"description": "null # it's 1", "aliases": ["prod"]}, "name": "2.0"}
    specs.append(TrainSpec.parse(complete(little("vera", **words), size), source="words"))
    specs.append(TrainSpec.parse(complete(little("lora", init_adapter="tone@1"), size), source="on"))
    pairs = {"objective": {"type": "dpo", "loss_type": "ipo"}}
    specs.append(TrainSpec.parse(complete(little("vera", **pairs), size), source="pairs"))
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
