"""Shares: which adapters a worker trains together, and what it is given for that."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import ray
from ray.actor import ActorHandle

from jobs.driver.prepare import Prepared
from jobs.events import Emit
from jobs.runs.folders import RunFolder, Runs
from jobs.workers.many import Places, Share
from loray.errors import SpecError
from loray.planning.devices import Device
from loray.planning.many import ManyPlan, plan_many
from loray.settings import Settings
from loray.train.many.cohort import cohorts, load_of


class Dealt(NamedTuple):
    """The adapters of a share, and the most tokens of a pass."""

    names: tuple[str, ...]
    tokens_per_pass: int


def deal_shares(
    prepared: Mapping[str, Prepared],
    saved: Mapping[str, Sequence[str]],
    device: Device,
    num_workers: int,
    emit: Emit = lambda event: None,
    *,
    most: int | None = None,
    splits: bool = False,
) -> dict[str, Dealt]:
    """Deals adapters to workers, cohort by cohort: their names by shares.

    Those of a share that is `saved` keep it, since its snapshot has their states. `most`: at once. With `splits` those
    that do not fit together are trained one after the other. Raises SpecError and UnsupportedError for what
    cannot be trained in one job, and what does not fit.
    """
    if not prepared:
        return {}
    config = next(iter(prepared.values())).base.config
    specs = {name: each.spec.model_copy(update={"name": name}) for name, each in prepared.items()}
    loads = {name: load_of(specs[name], each.data, config) for name, each in prepared.items()}

    def planned(names: Sequence[str]) -> Iterator[ManyPlan]:
        try:
            yield plan_many({name: loads[name] for name in names}, device, num_workers)
        except SpecError:
            if not splits or len(names) == 1:
                raise
            yield from planned(names[: len(names) // 2])
            yield from planned(names[len(names) // 2 :])

    found: dict[str, Dealt] = {}
    share_of = {name: share for share, of in saved.items() for name in of}
    kept: dict[str, list[str]] = {}
    new = []
    for cohort in cohorts(list(specs.values()), config):
        names = [spec.name for spec in cohort if spec.name not in share_of]
        at_once = len(names) if most is None else most
        new += [names[first : first + at_once] for first in range(0, len(names), max(at_once, 1))]
    for name in specs:
        if name in share_of:
            kept.setdefault(share_of[name], []).append(name)
    for share, names in kept.items():
        plan = plan_many({name: loads[name] for name in names}, device)
        found[share] = Dealt(tuple(names), plan.tokens_per_pass)
    for plan in (plan for names in new for plan in planned(names)):
        emit({"event": "plan", "lines": [plan.memory_line()]})
        for dealt in filter(None, plan.shares):
            found[f"share_{secrets.token_hex(4)}"] = Dealt(dealt, plan.tokens_per_pass)
    return found


def make_share(
    prepared: Mapping[str, Prepared],
    dealt: Dealt,
    settings: Settings,
    *,
    runs: Places,
    snapshots: Places,
    num_workers: int,
    sink: ActorHandle,
) -> Share:
    """Puts into the object store what a worker needs; of data that several have, once."""
    data = {key: ray.put(each) for key, each in {id(p.data): p.data for p in prepared.values()}.items()}
    first = next(iter(prepared.values()))
    return Share(
        specs=tuple(each.spec.model_copy(update={"name": name}) for name, each in prepared.items()),
        runs=runs,
        snapshots=snapshots,
        data={name: data[id(each.data)] for name, each in prepared.items()},
        initial={name: ray.put(each.initial) for name, each in prepared.items() if each.initial is not None},
        base_fingerprint=first.base.fingerprint,
        dtype_reason=first.dtype_reason,
        tokens_per_pass=dealt.tokens_per_pass,
        per_node=min(num_workers * first.spec.parallel.sequence, os.cpu_count() or 1),
        settings=replace(settings, catalog="", api_key=None),  # a worker needs no catalog, and no key
        sink=sink,
    )


def below_root(folder: RunFolder, runs: Runs) -> str:
    """Returns where a folder is among those of its kind."""
    return folder.path.removeprefix(f"{runs.root}/")
