"""Results of catalog queries: versions, names with aliases, jobs."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from sys import intern
from typing import Any, NamedTuple

from loray.errors import AdapterNotFound, shown
from loray.spec import (
    DEFAULT_ALIAS,
    DEFAULT_TENANT,
    AdapterManifest,
    AdapterRef,
    Evaluation,
    JobStatus,
    Principal,
    TrainSpec,
    Visibility,
    has_ended,
)

NUM_COMPARED = 32
_LONGEST_COMPARED = 192  # characters; a name has at most 96


class ModelName(NamedTuple):
    """The parts of `name`, `name@3` or `name@alias`."""

    name: str
    selector: str | None


def split_model(model: str) -> ModelName:
    name, at, selector = model.partition("@")
    return ModelName(name, selector if at else None)


class Quarantined(NamedTuple):
    """An adapter on which replicas died. `refused_until` None: it is suspected, and not refused."""

    deaths: int
    replica: str
    died_at: datetime
    refused_until: datetime | None


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version, with its `aliases`, `later_evaluations` and `quarantine` at the time of the query."""

    name: str
    version: int
    digest: str
    manifest: AdapterManifest
    created_at: datetime
    aliases: tuple[str, ...] = ()
    later_evaluations: tuple[Evaluation, ...] = ()
    quarantine: Quarantined | None = None

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
    """One name: its versions (never empty), where its aliases point, and who sees it: its tenant and `shared_with`.

    Servers keep one for each name: tuples take less memory than dictionaries.

    refs      the versions, oldest first
    pointers  (alias, version), sorted
    """

    name: str
    created_at: datetime
    refs: tuple[AdapterRef, ...]
    pointers: tuple[tuple[str, int], ...] = ()
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
    def versions(self) -> dict[int, AdapterRef]:
        """By number, the oldest first."""
        return {ref.version: ref for ref in self.refs}

    @property
    def aliases(self) -> dict[str, int]:
        """Alias → version."""
        return dict(self.pointers)

    @property
    def default(self) -> AdapterRef:
        """The version that a name without a selector means: DEFAULT_ALIAS where it is set, else the newest version."""
        for alias, version in self.pointers:
            if alias == DEFAULT_ALIAS:
                return self._version(version) or self.refs[-1]
        return self.refs[-1]

    def find(self, selector: str | None) -> AdapterRef | None:
        """The version of this number or alias; None where there is none."""
        if selector is None:
            return self.default
        if _is_number(selector):
            return self._version(int(selector))
        for alias, version in self.pointers:
            if alias == selector:
                return self._version(version)
        return None

    def select(self, selector: str | None) -> AdapterRef:
        """The version of this number or alias. Raises AdapterNotFound, which lists those that exist."""
        ref = self.find(selector)
        if ref is not None:
            return ref
        if _is_number(selector or ""):
            first, last = self.refs[0].version, self.refs[-1].version
            span = str(first) if first == last else f"{first} to {last}"
            raise AdapterNotFound(f"adapter {self.name!r} has no version {selector}; it has {span}")
        known = ", ".join(alias for alias, _ in self.pointers) or "none"
        raise AdapterNotFound(f"adapter {self.name!r} has no alias {shown(selector or '')}; its aliases: {known}")

    def _version(self, version: int) -> AdapterRef | None:
        if self.refs[-1].version == version:
            return self.refs[-1]
        at = bisect.bisect_left(self.refs, version, key=lambda ref: ref.version)
        return self.refs[at] if at < len(self.refs) and self.refs[at].version == version else None


def make_ref(name: str, version: int, digest: str, context_length: int, nbytes: int, *words: Any) -> AdapterRef:
    """A reference; `words` are method, base_fingerprint, tool_parser and chat_template. Equal words are one string."""
    method, base_fingerprint, tool_parser, chat_template = (_word(word) for word in words)
    return AdapterRef(
        digest=digest,
        name=name,
        version=version,
        method=method,
        base_fingerprint=base_fingerprint,
        context_length=context_length,
        nbytes=nbytes,
        tool_parser=tool_parser,
        chat_template=chat_template,
    )


def _word(word: Any) -> Any:
    return word and intern(word)


def make_pointers(pointers: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """`AdapterEntry.pointers`. Equal ones are one object, because most adapters have the same few."""
    return _same(tuple(pointers))


@lru_cache(maxsize=4096)
def _same(pointers: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    return pointers


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


def unknown_adapter(name: str, near: Mapping[str, Collection[str]], bases: Collection[str]) -> AdapterNotFound:
    """The error about a name that is none of an adapter for the caller.

    `near`: catalog's name that the caller may mean → names that exist for the caller, beside it in the order of all
    names. Their beginnings are alike; NUM_COMPARED are compared in half a millisecond, which servers spend for each
    unknown name.
    """
    if name in bases:
        return AdapterNotFound(f"{name!r} is a base model, not an adapter")
    found = list(dict.fromkeys(alike for meant, beside in near.items() for alike in similar(meant, beside)))[:3]
    hint = f"; did you mean {' or '.join(repr(n) for n in found)}?" if found else "; `loray adapters ls` lists them"
    return AdapterNotFound(f"no adapter {shown(name)}{hint}")


def similar(name: str, names: Collection[str]) -> list[str]:
    """At most three of `names` that resemble `name`, the nearest first."""
    if len(name) > _LONGEST_COMPARED:
        return []
    return difflib.get_close_matches(name, names, n=3, cutoff=0.6)


def _is_number(selector: str) -> bool:
    return selector.isascii() and selector.isdigit() and len(selector) <= 9
