"""Results of catalog queries: versions, names with aliases, jobs, and snapshots, which resolve names in memory."""

from __future__ import annotations

import bisect
import difflib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from loray.errors import AdapterNotFound, shown
from loray.spec import (
    DEFAULT_ALIAS,
    DEFAULT_TENANT,
    OPERATOR,
    AdapterManifest,
    AdapterRef,
    Evaluation,
    JobStatus,
    Principal,
    TrainSpec,
    Visibility,
    has_ended,
    meanings,
)

_COMPARED = 64
_LONGEST_COMPARED = 192  # characters; a name has at most 96


class ModelName(NamedTuple):
    """The parts of `name`, `name@3` or `name@alias`."""

    name: str
    selector: str | None


def split_model(model: str) -> ModelName:
    name, at, selector = model.partition("@")
    return ModelName(name, selector if at else None)


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version, with its `aliases` and `later_evaluations` at the time of the query."""

    name: str
    version: int
    digest: str
    manifest: AdapterManifest
    created_at: datetime
    aliases: tuple[str, ...] = ()
    later_evaluations: tuple[Evaluation, ...] = ()

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """All evaluations, the oldest first: those of the manifest, and those recorded later."""
        return self.manifest.evaluations + self.later_evaluations

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def ref(self) -> AdapterRef:
        return self.manifest.ref(self.digest, self.name, self.version)


@dataclass(frozen=True, slots=True)
class AliasState:
    """The version that an alias points at. `revision` grows with every move and rollback, and is never used again, also
    after the alias is deleted.
    """

    name: str
    alias: str
    version: int
    digest: str
    revision: int


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One move of an alias; a rollback marks it as `undone`. `no_gate` is the reason to override the gate's refusal."""

    alias: str
    version: int
    undone: bool
    created_at: datetime
    no_gate: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One name: its versions (never empty), where its aliases point, and who sees it: its tenant and `shared_with`."""

    name: str
    created_at: datetime
    versions: Mapping[int, AdapterRef]
    aliases: Mapping[str, int]
    tenant: str = DEFAULT_TENANT
    visibility: Visibility = "private"
    shared_with: frozenset[str] = frozenset()

    def exists_for(self, principal: Principal) -> bool:
        """What `queries.visible` is in SQL."""
        return (
            self.tenant == principal.tenant
            or self.visibility == "public"
            or (self.visibility == "shared" and principal.tenant in self.shared_with)
            or principal.is_admin
        )

    @property
    def default(self) -> AdapterRef:
        """The version that a name without a selector means: DEFAULT_ALIAS where it is set, else the newest version."""
        return self.versions[self.aliases.get(DEFAULT_ALIAS, max(self.versions))]

    def select(self, selector: str | None) -> AdapterRef:
        """The version of this number or alias. Raises AdapterNotFound, which lists those that exist."""
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
        raise AdapterNotFound(f"adapter {self.name!r} has no alias {shown(selector)}; its aliases: {known}")


@dataclass(frozen=True, slots=True)
class AdapterDetail:
    """One name with all its data: the newest version first, alias moves in order of time."""

    entry: AdapterEntry
    versions: tuple[AdapterVersion, ...]
    moves: tuple[AliasMove, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """One training job. `id` is Ray's submission id, `version` the version of `name` that it published."""

    id: str
    name: str
    tenant: str
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
    """All names at one moment, immutable. `counter` is the catalog's change counter then.

    names      all, sorted
    templates  SHA-256 → text of the chat templates that adapters have of their own
    """

    counter: int
    bases: Mapping[str, str]  # name → fingerprint
    adapters: Mapping[str, AdapterEntry]
    templates: Mapping[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(sorted(self.adapters)))

    def resolve(self, model: str, principal: Principal = OPERATOR) -> AdapterRef:
        """`name`, `name@3` or `name@alias` → the version. Raises AdapterNotFound, which suggests similar names."""
        name, selector = split_model(model)
        return self.entry(name, principal).select(selector)

    def entry(self, name: str, principal: Principal = OPERATOR) -> AdapterEntry:
        """What `name` means for this caller. An adapter that does not exist for the caller is as unknown as any."""
        for meant in meanings(name, principal.tenant):
            entry = self.adapters.get(meant)
            if entry is not None and entry.exists_for(principal):
                return entry
        raise unknown_adapter(
            name, self.names, self.bases, principal.tenant, lambda name: self.adapters[name].exists_for(principal)
        )

    def models(self, base_fingerprint: str | None = None, principal: Principal = OPERATOR) -> tuple[AdapterEntry, ...]:
        """The names of the caller whose default version belongs to this base (None: all), sorted."""
        entries = map(self.adapters.__getitem__, self.names)
        return tuple(
            entry
            for entry in entries
            if base_fingerprint in (None, entry.default.base_fingerprint) and entry.exists_for(principal)
        )


def unknown_adapter(
    name: str,
    names: Sequence[str],
    bases: Collection[str],
    tenant: str = DEFAULT_TENANT,
    exists: Callable[[str], bool] = lambda name: True,
) -> AdapterNotFound:
    """`names`: of all adapters, sorted; only those that `exists` says exist for the caller are suggested."""
    if name in bases:
        return AdapterNotFound(f"{name!r} is a base model, not an adapter")
    found = (similar(meant, names, exists) for meant in meanings(name, tenant))
    near = list(dict.fromkeys(itertools.chain.from_iterable(found)))[:3]
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "; `loray adapters ls` lists them"
    return AdapterNotFound(f"no adapter {shown(name)}{hint}")


def similar(name: str, names: Sequence[str], exists: Callable[[str], bool] = lambda name: True) -> list[str]:
    """At most three of the sorted `names` that exist and resemble `name`, the nearest first.

    Of many it compares only those beside it in the order, whose beginnings are alike: about a millisecond at most,
    however many there are, because servers call it for every unknown name.
    """
    if len(name) > _LONGEST_COMPARED:
        return []
    if len(names) > _COMPARED:
        middle = bisect.bisect_left(names, name)
        start = min(max(0, middle - _COMPARED // 2), len(names) - _COMPARED)
        names = names[start : start + _COMPARED]
    return difflib.get_close_matches(name, list(filter(exists, names)), n=3, cutoff=0.6)


def _is_number(selector: str) -> bool:
    return selector.isascii() and selector.isdigit() and len(selector) <= 9
