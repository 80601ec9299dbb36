"""Recipes of several adapters that one job trains: several files, a file that lists `adapters`, or one for each file of
data.

    base: smollm2
    adapter: {method: lora}
    adapters:                                   # each lies on top of the rest of the file
      - {name: acme, data.train: acme.jsonl}
      - {name: globex, data.train: globex.jsonl, adapter.rank: 4}
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from loray.errors import LorayError, SpecError
from loray.recipes.fields import merge, nested
from loray.recipes.load import ADAPTERS, Recipe, ShapeOf, complete_recipe, read_recipe
from loray.spec import Frozen, Name, TrainSpec

MAX_ADAPTERS = 10_000
_NAME: TypeAdapter[str] = TypeAdapter(Name)
_NUM_NAMED = 5


class Member(Frozen):
    """An adapter of a job. Its relative data paths start at `folder`."""

    recipe: TrainSpec
    folder: str


class ManyPlan(Frozen):
    """What a job of several adapters trains. `name` is shown where the job has one: of the recipe that they share, else
    of the first.
    """

    name: Name
    members: tuple[Member, ...]

    @classmethod
    def of(cls, name: str, recipes: Sequence[Recipe], folder_of: Callable[[Recipe], str]) -> ManyPlan:
        return cls(name=name, members=tuple(Member(recipe=r.spec, folder=folder_of(r)) for r in recipes))

    @property
    def recipe(self) -> TrainSpec:
        """What the catalog keeps as the recipe of the whole job: the first one, under the job's name."""
        most = max(each.recipe.num_workers for each in self.members)
        return self.members[0].recipe.model_copy(update={"name": self.name, "num_workers": most})

    @property
    def num_workers(self) -> int:
        """Workers, or groups of them that share rows, to which adapters are dealt."""
        return max(each.recipe.num_workers // each.recipe.parallel.sequence for each in self.members)


def on_one_worker(spec: TrainSpec) -> TrainSpec:
    """The recipe with steps of as many rows, all of one worker or one sequence group: as a cohort trains it, in which
    `num_workers` share the adapters and not the rows.
    """
    groups, batch = spec.num_workers // spec.parallel.sequence, spec.batch
    if batch.accumulation == "auto":
        batch = batch.model_copy(update={"rows": (batch.rows or 1) * groups})
    else:
        batch = batch.model_copy(update={"accumulation": batch.accumulation * groups})
    return spec.model_copy(update={"batch": batch, "num_workers": spec.parallel.sequence, "min_workers": None})


def load_many(
    names: Sequence[str | None],
    *,
    over: Mapping[str, Any] | None = None,
    each: str | None = None,
    shape_of: ShapeOf = lambda base: None,
    is_example: bool = False,
) -> tuple[str, list[Recipe]]:
    """Load what `loray train` is given, and return (the job's name, a recipe for each adapter).

    `names` are files, shipped recipes or JSON, or None: `over` alone. `over` lies on top of each. `each` is a pattern
    of data files: the only recipe is trained once for each, as NAME-STEM. Raises SpecError: two adapters of one name,
    no file, an entry that is not valid.
    """
    shared: str | None
    if each is not None:
        if len(names) != 1:
            raise SpecError(f"--each trains one recipe on each file, and these are {len(names)} recipes: give one")
        shared, found = _load_each(names[0], over or {}, each, shape_of)
    else:
        loaded = [_load(name, over or {}, shape_of, is_example=is_example) for name in names]
        found = [recipe for _, recipes in loaded for recipe in recipes]
        shared = loaded[0][0] if len(loaded) == 1 else None
    _check(found)
    return shared or found[0].spec.name, found


def expand(fields: Mapping[str, Any], shape_of: ShapeOf) -> tuple[str, list[Recipe]]:
    """Make (name, recipes) of a recipe with `adapters` that came over HTTP. Raises SpecError."""
    shared, found = _entries(dict(fields), None, Path("/"), {}, shape_of, is_example=False)
    _check(found)
    return shared or found[0].spec.name, found


def _check(recipes: Sequence[Recipe]) -> None:
    twice = [name for name, count in Counter(recipe.spec.name for recipe in recipes).items() if count > 1]
    if twice:
        raise SpecError(f"several adapters are called {', '.join(twice[:_NUM_NAMED])}: a job trains each name once")
    if len(recipes) > MAX_ADAPTERS:
        raise SpecError(f"these are {len(recipes):,} adapters, and {MAX_ADAPTERS:,} are the most of one job")


def _load(
    name: str | None, over: Mapping[str, Any], shape_of: ShapeOf, *, is_example: bool
) -> tuple[str | None, list[Recipe]]:
    fields, path, folder = read_recipe(name, over)
    if ADAPTERS in fields:
        if over.get("name"):
            raise SpecError(f"--name names one adapter, and {path or 'the recipe'} lists several: leave it out")
        return _entries(fields, path, folder, over, shape_of, is_example=is_example)
    recipe = complete_recipe(
        fields, path, folder, over=over, shape_of=shape_of, is_example=is_example, is_alone=name is None
    )
    return recipe.spec.name, [recipe]


def _entries(
    fields: dict[str, Any],
    path: Path | None,
    folder: Path,
    over: Mapping[str, Any],
    shape_of: ShapeOf,
    *,
    is_example: bool,
) -> tuple[str | None, list[Recipe]]:
    """Make a recipe of each entry on top of the rest, with the defaults of its own method."""
    source, entries = str(path or "the recipe"), fields.pop(ADAPTERS)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise SpecError(f"{source}: `adapters` is a list of adapters, each with a name and what it has of its own")
    found = []
    for number, entry in enumerate(entries, 1):
        label = f"{source}, adapter {entry.get('name') or number}"
        if "name" not in entry:
            raise SpecError(f"{label} has no name: each adapter needs its own")
        try:
            own = merge(copy.deepcopy(fields), nested(entry))
            recipe = complete_recipe(own, None, folder, over=over, shape_of=shape_of, is_example=is_example)
        except LorayError as e:
            raise type(e)(f"{label}: {e}") from e
        found.append(recipe)
    shared = fields.get("name")
    return (shared if isinstance(shared, str) else None), found


def _load_each(name: str | None, over: Mapping[str, Any], pattern: str, shape_of: ShapeOf) -> tuple[str, list[Recipe]]:
    if "://" in pattern:
        raise SpecError(f"--each {pattern}: it looks for files of this machine; list those of a bucket as `adapters`")
    files = sorted(glob(str(Path(pattern).expanduser()), recursive=True))
    if not files:
        raise SpecError(f"--each {pattern}: no file matches; put the pattern in quotes, as 'customers/*.jsonl'")
    fields, path, folder = read_recipe(name, over)
    shared = over.get("name", fields.get("name"))
    if ADAPTERS in fields or not isinstance(shared, str):
        raise SpecError(
            f"{path or 'the recipe'} has no name of its own: --each makes the adapters' names of it and of the files'"
        )
    found = []
    for file in files:
        adapter = f"{shared}-{Path(file).stem}"
        try:
            _NAME.validate_python(adapter)
        except ValidationError as e:
            raise SpecError(
                f"--each: {file} would make an adapter {adapter!r}, which is no name (letters, digits, '.', '_' and "
                "'-', at most 96): rename the file"
            ) from e
        own = merge(merge({}, over), {"name": adapter, "data": {"train": file}})
        found.append(
            complete_recipe(copy.deepcopy(fields), path, folder, over=own, shape_of=shape_of, is_alone=name is None)
        )
    return shared, found
