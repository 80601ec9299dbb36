"""Cohorts: recipes whose adapters are trained together, since they share one forward pass of the base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loray.bases.config import ModelConfig
from loray.errors import SpecError, UnsupportedError
from loray.planning.many import Load
from loray.planning.run import shape_of
from loray.recipes.resolve import resolve
from loray.spec import AdapterSpec, Method, TrainSpec

if TYPE_CHECKING:
    from loray.train.data.rows import Dataset  # imports torch, which a driver does not need here

METHODS: tuple[Method, ...] = ("lora", "longlora", "dora", "vera")  # of which a bank has stacks
_COMMON = ("base", "dtype", "quantization")  # of all recipes of a job, which has one base in memory


def cohorts(specs: Sequence[TrainSpec], config: ModelConfig) -> list[list[TrainSpec]]:
    """Divide recipes into cohorts, whose RoPE, attention and sequence groups are equal; one is trained after the other.

    Recipes keep their order, and cohorts that of their first ones. Raises SpecError where there is no recipe, where two
    have one name, or where two have different bases, dtypes or quantisations, and UnsupportedError for a recipe that is
    to be trained alone.
    """
    if not specs:
        raise SpecError("there is no recipe to train; give one or more")
    ((name, count),) = Counter(spec.name for spec in specs).most_common(1)
    if count > 1:
        raise SpecError(f"{count} of the recipes have the name {name}; adapters that are trained together need others")
    first = specs[0]
    for spec in specs:
        for reason in _alone(spec):
            raise UnsupportedError(f"train {spec.name} alone: {reason}")
        for field in _COMMON:
            ours, theirs = getattr(first, field), getattr(spec, field)
            if ours != theirs:
                raise SpecError(
                    f"{first.name} and {spec.name} cannot be trained in one job: {field} is {_shown(ours)} in the one "
                    f"and {_shown(theirs)} in the other; make them equal, or train them in two jobs"
                )
    found: dict[tuple[object, ...], list[TrainSpec]] = {}
    for spec in specs:
        resolved = resolve(spec, config)
        key = (resolved.rope, resolved.context, resolved.group_size, spec.parallel.sequence)
        found.setdefault(key, []).append(spec)
    return list(found.values())


def _alone(spec: TrainSpec) -> Iterator[str]:
    """Say what of a recipe a cohort does not do."""
    yield from _unshared(spec.adapter)
    if spec.objective.type != "sft":
        yield f"adapters that are trained together learn by objective.type sft, and its is {spec.objective.type}"
    if spec.parallel.strategy != "ddp":
        yield f"parallel.strategy {spec.parallel.strategy} takes apart the base, which many adapters share"


def check_adapter(name: str, spec: AdapterSpec) -> None:
    """Raise UnsupportedError where the adapter `name` cannot be trained beside others."""
    for reason in _unshared(spec):
        raise UnsupportedError(f"train {name} alone: {reason}")


def _unshared(spec: AdapterSpec) -> Iterator[str]:
    if spec.method not in METHODS:
        yield f"adapters that are trained together are {', '.join(METHODS)}, not {spec.method}"
    for option in ("train_embeddings", "train_norms"):
        if getattr(spec, option):
            yield f"adapter.{option} changes what adapters that are trained together share"
    if (init := getattr(spec, "init", None)) is not None:
        yield f"adapter.init {init} takes a part out of the base, which adapters that are trained together share"


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


def load_of(spec: TrainSpec, data: Dataset, config: ModelConfig) -> Load:
    """Say how much work an adapter is."""
    stream = data.stream(spec)
    tokens_per_step = int(data.lengths.sum()) / stream.num_steps(1.0)
    return Load(shape_of(spec, config), stream.steps_of(spec), tokens_per_step)
