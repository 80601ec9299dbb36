"""Preparation of a run before any worker starts: recipe, base, parent adapter and data."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from ray import ObjectRef
from transformers import AutoTokenizer

from jobs.driver.evaluation import check_measurable
from jobs.driver.fit import WorkerHardware, Workload
from jobs.driver.teaching import ServedTeacher
from jobs.events import SILENT, Stages
from jobs.runs.folders import BATCH, RunFolder
from jobs.trackers import check_installed
from jobs.workers.initial import InitialFiles
from jobs.workers.tokens import open_tokens
from loray.adapters.manifest import check_recipe, read_manifest, with_manifest
from loray.bases import quantized
from loray.bases.config import ModelConfig
from loray.bases.registry import BaseModel, ensure_base, list_bases
from loray.catalog import Catalog
from loray.errors import SpecError
from loray.fetching import fetched
from loray.methods import method_of
from loray.methods.base import stored_modules
from loray.methods.weights import AdapterWeights
from loray.planning.devices import device_on
from loray.planning.plan import make_plan
from loray.planning.run import shape_of
from loray.recipes.load import Recipe
from loray.recipes.resolve import check_row_lengths, check_token_budget, continued, on_hardware, resolve
from loray.settings import Settings
from loray.spec import AdapterSpec, BatchSpec, RlSpec, TrainSpec, format_size
from loray.store import AdapterStore, open_store
from loray.train.data.corpus import Runner, run_here
from loray.train.data.lessons import lessons_of, teach
from loray.train.data.rows import Dataset, load_data
from loray.train.data.tokenize import rules_of


def check_initial(spec: AdapterSpec, weights: AdapterWeights, base: ModelConfig, label: str) -> None:
    """Raises SpecError where training `spec` on `base` could not go on from `weights`, which are called `label`.

    It must have the same matrices. It may train norms and the embedding where they are the base's so far.
    """
    if differences := list(_differences(spec, weights, base)):
        raise SpecError(
            f"init_adapter {label} is another adapter than this recipe trains: {'; '.join(differences)}; write them in "
            "the recipe, or go on from another adapter"
        )


def _differences(spec: AdapterSpec, weights: AdapterWeights, base: ModelConfig) -> Iterator[str]:
    method = method_of(spec)
    if weights.method != method.stored_as:
        yield f"its method is {weights.method}"
        return
    modules = {key.module for key in weights.modules}
    if modules != set(stored_modules(spec.target_modules, base.fused)):
        yield f"its target_modules are {', '.join(sorted(modules))}"
    elif len(weights.modules) != len(modules) * base.num_layers:
        yield "it has no weights in some of the layers"
    ranks = {module.rank for module in weights.modules.values()}
    if ranks != {method.rank(spec)}:
        yield f"its rank is {', '.join(map(str, sorted(ranks)))}"
    else:
        yield from method.differences(spec, weights, base)
    if weights.norms and not spec.train_norms:
        yield "it has norms of its own (train_norms: true)"
    if weights.embedding is not None and not spec.train_embeddings:
        yield "it has an embedding of its own (train_embeddings: true)"


class Parent(NamedTuple):
    """The adapter that a run goes on from. `spec` is the recipe with what it takes over; `context` is what the adapter
    was trained for, in tokens.
    """

    spec: TrainSpec
    files: InitialFiles
    context: int


def fetch_parent(spec: TrainSpec, base: BaseModel, catalog: Catalog, settings: Settings) -> Parent:
    """Fetches the adapter that `spec` goes on from, its `init_adapter`.

    Raises NotFoundError, BaseMismatch for an adapter of another base, and SpecError where the recipe trains another
    adapter.
    """
    # imports torch, which other recipes do not need here
    from loray.adapters.peft_format import read_adapter

    assert spec.init_adapter is not None
    ref = catalog.adapters.resolve(spec.init_adapter)
    of = None if spec.quantization is None else catalog.bases.forms().get(ref.base_fingerprint)
    if of != base.fingerprint:  # else QLoRA trained it, on a form that this machine need not have yet
        ref.check_base(base.name, base.fingerprint)
    with tempfile.TemporaryDirectory(prefix="loray-initial-") as scratch:
        folder = Path(scratch) / "adapter"
        AdapterStore(open_store(settings.store)).fetch(ref.digest, folder)
        manifest = read_manifest(folder)
        spec = continued(spec, manifest, ref.label, base.config)
        weights = with_manifest(read_adapter(folder, base.config), manifest, ref.label)
        check_initial(spec.adapter, weights, base.config, ref.label)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return Parent(spec, InitialFiles(ref.digest, files), manifest.context_length)


class Prepared(NamedTuple):
    """A run before it starts. `spec` is the recipe with every default that affects the result filled in, so that it
    reproduces the run. `dtype_reason`: why its dtype is what it is. `measured_tokens`: that go through models before
    publishing. `batch_reason`: why a step's rows are cut as they are; empty where the recipe says it.
    """

    spec: TrainSpec
    base: BaseModel
    data: Dataset
    initial: InitialFiles | None = None
    dtype_reason: str = ""
    measured_tokens: int = 0
    batch_reason: str = ""

    @property
    def warnings(self) -> list[str]:
        """List what fits badly to the data."""
        desirable = self.data.train.desirable
        balance = None if desirable is None else self.spec.objective.warning(float(desirable.mean()))
        return [warning for warning in (self.data.report.warning, balance) if warning is not None]


def prepare(
    recipe: Recipe,
    settings: Settings,
    catalog: Catalog | None = None,
    run: Runner = run_here,
    datasets: MutableMapping[object, Dataset] | None = None,
    workers_of: Callable[[TrainSpec], WorkerHardware] = WorkerHardware.here,
    is_planned: bool = True,
    stages: Stages = SILENT,
) -> Prepared:
    """Checks the recipe against this machine, reads the data, and plans the memory of its workers. Raises LorayError
    that says what to change.

    `catalog` is that of the job, in which `init_adapter` is looked up; None: the settings', with all names.
    `run` tokenises what no earlier run has. `datasets` keeps what was read: a recipe with the same rows takes it from
    there. `workers_of` tells what a recipe's workers run on. Without `is_planned` a run starts that may not fit there.
    `stages` is told what goes on.
    """
    stages("checking the recipe")
    spec = recipe.spec
    if spec.name in {base.name for base in list_bases(settings.home)}:
        raise SpecError(f"name {spec.name!r} is a base model's; adapters and bases share their names: choose another")
    if isinstance(spec.objective, RlSpec):
        raise SpecError(f"objective.type {spec.objective.type} learns from rewards: `loray train` it, one recipe alone")
    check_recipe(spec)
    _check_packages(spec)
    base = ensure_base(settings.home, spec.base, progress=lambda stage, share: stages(stage, share, 1))
    adapter = method_of(spec.adapter).tokenised(spec.adapter, partial(AutoTokenizer.from_pretrained, base.path))
    spec = spec.model_copy(update={"adapter": adapter})
    parent = None
    if spec.init_adapter is not None:
        parent = fetch_parent(spec, base, catalog or Catalog(settings.catalog), settings)
        spec = parent.spec
        recipe = recipe._replace(spec=spec)
    workers = workers_of(spec)
    spec, dtype_reason = on_hardware(spec, workers.hardware)
    recipe = recipe._replace(spec=spec)
    if spec.quantization is not None:
        from loray.bases.rounding import form_trained_on  # imports torch, which other recipes do not need here

        form_trained_on(base, spec, settings.home, lambda stage, share: stages(stage, share, 1))
    max_length = resolve(spec, base.config).row_length
    measured_tokens = check_measurable(recipe, base, settings)
    stages("reading the data")
    data = _rows(recipe, base, max_length, settings, run, {} if datasets is None else datasets)
    if spec.early_stopping is not None and not len(data.evaluation):
        raise SpecError("early_stopping needs held-out rows: give data.eval, or a data.eval_fraction")
    order = spec.batch.order or ("concat" if data.is_joined else "shuffled")
    filled = {
        "data": spec.data.model_copy(update={"max_length": max_length}),
        "batch": spec.batch.model_copy(update={"order": order}),
    }
    spec = spec.model_copy(update=filled)
    check_token_budget(spec.batch, int(data.lengths.max(initial=0)))
    check_row_lengths(
        spec,
        float(np.median(data.train.lengths)),
        max_length,
        are_texts=data.report.format == "text",
        trained_context=None if parent is None else parent.context,
    )
    spec, batch_reason = _planned(spec, base, data, workers, is_checked=is_planned)
    data = _taught(spec, base, data, settings, stages)
    initial = None if parent is None else parent.files
    return Prepared(spec, base, data, initial, dtype_reason, measured_tokens, batch_reason)


def as_begun(recipe: Recipe, run: RunFolder) -> Recipe:
    """Cuts the rows of a step as the run did that goes on, whatever fits now, if the recipe asks for as many."""
    batch, saved = recipe.spec.batch, run.read_model(BatchSpec, BATCH)
    if batch.accumulation != "auto" or saved is None or saved.rows is None:
        return recipe
    if saved.rows * saved.chosen_accumulation != batch.rows:
        return recipe
    cut = batch.model_copy(update={"rows": saved.rows, "accumulation": saved.accumulation})
    return recipe._replace(spec=recipe.spec.model_copy(update={"batch": cut}))


def share_workload(prepared: Prepared, data: ObjectRef | None = None) -> Workload:
    """Puts what workers need into the object store. `data`: the dataset there, where several runs have the same."""
    initial = None if prepared.initial is None else ray.put(prepared.initial)
    is_evaluated = len(prepared.data.evaluation) > 0
    held = data or ray.put(prepared.data)
    return Workload(prepared.spec, prepared.base, held, is_evaluated, initial, *prepared[4:])


def _check_packages(spec: TrainSpec) -> None:
    """Raises SpecError or UnsupportedError with what to install where a package is missing that not every recipe needs.

    The workers run in the driver's environment.
    """
    check_installed(spec.tracking)
    if spec.parallel.strategy in ("zero2", "zero3"):
        from loray.train.strategies import zero  # imports PEFT and models, which the driver spares itself

        zero.check_installed()
    if spec.quantization is not None:
        quantized.check_installed()


def _planned(
    spec: TrainSpec, base: BaseModel, data: Dataset, workers: WorkerHardware, *, is_checked: bool
) -> tuple[TrainSpec, str]:
    """Cuts a step's rows to fit the workers' devices where the recipe leaves it to the plan, and says why so; empty
    where the recipe says them. Raises SpecError where the longest row does not fit, with what to change; not without
    `is_checked`.

    Without a GPU to be found where one is used, there is no plan.
    """
    is_cut = spec.batch.accumulation == "auto"
    if not (is_cut or is_checked):
        return spec, ""
    device = device_on(workers.hardware, workers.per_node, use_gpu=spec.use_gpu is True)
    if device is None and not is_cut:
        return spec, ""
    if device is None:
        batch = spec.batch.model_copy(update={"accumulation": 1})
        return spec.model_copy(update={"batch": batch}), "the workers' memory is not known"
    planned, is_shorter = spec, spec.batch.order in ("shuffled", "length_grouped") and spec.parallel.sequence == 1
    if is_shorter and spec.attention.type == "dense":
        longest = int(data.train.lengths.max(initial=2))
        planned = spec.model_copy(update={"data": spec.data.model_copy(update={"max_length": longest})})
    plan = make_plan(shape_of(planned, base.config), device)
    for problem in plan.problems:
        if problem.severity == "refusal" and is_checked:
            raise SpecError(f"{problem.message}; {problem.remedy}")
    if not is_cut:
        return spec, ""
    chosen = {"rows": plan.run.num_rows, "accumulation": plan.run.accumulation}
    taken, usable = format_size(plan.memory.peak_bytes), format_size(device.usable_bytes)
    why = f"the most that fit {device.name}: {taken} of {usable}"
    return spec.model_copy(update={"batch": spec.batch.model_copy(update=chosen)}), why


def _taught(spec: TrainSpec, base: BaseModel, data: Dataset, settings: Settings, stages: Stages) -> Dataset:
    """Adds what a served teacher says of the rows, which it is asked where no run has. Workers ask a base themselves.

    Raises SpecError where the teacher cannot be asked, or has another tokenizer.
    """
    teaching = spec.objective.teaching
    if teaching is None:
        return data
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    if teaching.url is None:
        teacher_base = ensure_base(settings.home, teaching.model)
        if rules_of(AutoTokenizer.from_pretrained(teacher_base.path)) != rules_of(tokenizer):
            raise SpecError(
                f"objective.teacher {teaching.model} has another tokenizer than {base.name}: distil from a base of the "
                "same family, or name the url that it is served at"
            )
        return data
    with ServedTeacher(teaching) as teacher:
        named = teacher.name()
        teacher.check(tokenizer)
        lessons = lessons_of(spec, data, named, teaching.num_top, base.config.vocab_size)
        if any(part.missing for part in lessons):
            for told in teach(lessons, data, teacher.answers):
                stages(**told)
    return replace(data, lessons=lessons)


def _rows(
    recipe: Recipe,
    base: BaseModel,
    max_length: int,
    settings: Settings,
    run: Runner,
    known: MutableMapping[object, Dataset],
) -> Dataset:
    spec, sources = recipe.spec, recipe.data()
    max_eval_rows, joined, invocation = spec.evaluation.max_rows, _is_joined(spec), spec.adapter.invoked_by
    kind = (joined, spec.is_long_context, spec.objective.formats, invocation)
    key = (base.fingerprint, sources, max_length, max_eval_rows, spec.seed, kind)
    if key not in known:
        with fetched(sources.paths, settings, sources.columns) as copies:
            known[key] = load_data(
                sources,
                _tokenizer(base.path),
                max_length=max_length,
                max_eval_rows=max_eval_rows,
                seed=spec.seed,
                joined=joined,
                whole_windows=spec.is_long_context,
                formats=spec.objective.formats,
                invocation=invocation,
                fetched=copies,
                cache=open_tokens(settings),
                run=run,
            )
    return known[key]


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Any:
    """Reads it once for all recipes of a driver."""
    return AutoTokenizer.from_pretrained(folder)


def _is_joined(spec: TrainSpec) -> bool | None:
    """Says whether texts are joined; None where only the data says whether it is texts, which then are joined."""
    if spec.batch.order is None and spec.adapter.usual_attention == "s2" and not spec.objective.compares_answers:
        return None
    return spec.batch.order == "concat"
