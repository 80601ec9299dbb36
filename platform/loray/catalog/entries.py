"""What the catalog answers with: versions, names with aliases, jobs, and snapshots that resolve without a database."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from loray.errors import AdapterNotFound
from loray.spec import AdapterManifest, AdapterRef, Evaluation, JobStatus, TrainSpec, has_ended

DEFAULT_ALIAS = "prod"


class ModelName(NamedTuple):
    """`name`, `name@3` or `name@alias` in its parts."""

    name: str
    selector: str | None


def split_model(model: str) -> ModelName:
    name, at, selector = model.partition("@")
    return ModelName(name, selector if at else None)


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version; `aliases` and `later_evaluations` are as they were when it was read."""

    name: str
    version: int
    digest: str
    manifest: AdapterManifest
    created_at: datetime
    aliases: tuple[str, ...] = ()
    later_evaluations: tuple[Evaluation, ...] = ()

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """All that was measured, the oldest first: what the manifest has, and what was recorded later."""
        return self.manifest.evaluations + self.later_evaluations

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def ref(self) -> AdapterRef:
        return self.manifest.ref(self.digest, self.name, self.version)


@dataclass(frozen=True, slots=True)
class AliasState:
    """Where an alias points. `revision` grows with every move and rollback; no alias has one twice, deleted or not."""

    name: str
    alias: str
    version: int
    digest: str
    revision: int


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One entry of an alias's history; `undone` by a rollback. `no_gate`: why the gate's refusal did not count."""

    alias: str
    version: int
    undone: bool
    created_at: datetime
    no_gate: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One name: its versions (never empty) and where its aliases point."""

    name: str
    created_at: datetime
    versions: Mapping[int, AdapterRef]
    aliases: Mapping[str, int]

    @property
    def default(self) -> AdapterRef:
        """What the bare name means: alias `prod` where it is set, else the newest version."""
        return self.versions[self.aliases.get(DEFAULT_ALIAS, max(self.versions))]

    def select(self, selector: str | None) -> AdapterRef:
        """By version number or alias; AdapterNotFound lists what there is."""
        if selector is None:
            return self.default
        version = int(selector) if _is_number(selector) else self.aliases.get(selector)
        if version is not None and version in self.versions:
            return self.versions[version]
        if _is_number(selector):
            numbers = sorted(self.versions)
            span = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
            raise AdapterNotFound(f"adapter {self.name!r} has no version {selector}; it has {span}")
        known = ", ".join(sorted(self.aliases)) or "none"
        raise AdapterNotFound(f"adapter {self.name!r} has no alias {selector!r}; its aliases: {known}")


@dataclass(frozen=True, slots=True)
class AdapterDetail:
    """One name with everything known of it, newest version first; alias moves in order of time."""

    entry: AdapterEntry
    versions: tuple[AdapterVersion, ...]
    moves: tuple[AliasMove, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """One training job. `id` is Ray's submission id, `version` the number that it published `name` under."""

    id: str
    name: str
    recipe: TrainSpec
    status: JobStatus
    message: str
    version: int | None
    actor: str
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None

    @property
    def has_ended(self) -> bool:
        return has_ended(self.status)


@dataclass(frozen=True, slots=True)
class CatalogSnapshot:
    """All names at one moment, immutable. `counter` is the catalog's change counter then."""

    counter: int
    bases: Mapping[str, str]  # name → fingerprint
    adapters: Mapping[str, AdapterEntry]

    def resolve(self, model: str) -> AdapterRef:
        """`name`, `name@3` or `name@alias` → the version. AdapterNotFound suggests near names."""
        name, selector = split_model(model)
        entry = self.adapters.get(name)
        if entry is None:
            raise unknown_adapter(name, self.adapters, self.bases)
        return entry.select(selector)

    def models(self, base_fingerprint: str | None = None) -> tuple[AdapterEntry, ...]:
        """The names whose default version belongs to this base (None: all), sorted."""
        return tuple(
            self.adapters[name]
            for name in sorted(self.adapters)
            if base_fingerprint in (None, self.adapters[name].default.base_fingerprint)
        )


def unknown_adapter(name: str, names: Iterable[str], bases: Iterable[str]) -> AdapterNotFound:
    if name in bases:
        return AdapterNotFound(f"{name!r} is a base model, not an adapter")
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "; `loray adapters ls` lists them"
    return AdapterNotFound(f"no adapter {name!r}{hint}")


def _is_number(selector: str) -> bool:
    return selector.isascii() and selector.isdigit() and len(selector) <= 9
