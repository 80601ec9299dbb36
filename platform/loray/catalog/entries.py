"""Results of the catalog's operations, as names with versions and aliases, and the rules of names."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from sys import intern
from typing import Any, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from loray.errors import AdapterNotFound, SpecError, shown
from loray.schemas.resources import JobResource, QuarantineResource, VersionDetail, VersionResource
from loray.spec import (
    DEFAULT_ALIAS,
    DEFAULT_TENANT,
    AdapterManifest,
    AdapterRef,
    Alias,
    JobId,
    Name,
    Principal,
    QualifiedName,
    Scope,
    TagKey,
    TagValue,
    TenantName,
    Visibility,
    split_qualified,
)

_MAKERS: frozenset[Scope] = frozenset({"publish", "promote", "train"})
# Fields of a manifest, as they are shown to those who may only ask the adapter.
_HOW_IT_WAS_MADE = dict.fromkeys(
    ("recipe", "dtype_reason", "sweep", "job_id", "parent", "derived_from", "data_fingerprint")
)


class ModelName(NamedTuple):
    """The parts of `name`, `name@3` or `name@alias`."""

    name: str
    selector: str | None


def split_model(model: str) -> ModelName:
    name, at, selector = model.partition("@")
    return ModelName(name, selector if at else None)


class Quarantined(QuarantineResource):
    """An adapter on which replicas died, the last of them `replica`."""

    replica: str


class Canary(NamedTuple):
    """A version that gets `percent` of an alias's requests now, instead of the one that the alias points at."""

    alias: str
    version: int
    percent: int
    id: int


class AdapterVersion(VersionDetail):
    """One immutable version, with its aliases, all its evaluations and its quarantine at the time of the query."""

    @property
    def tenant(self) -> str:
        return _tenant_of(self.name)

    @property
    def ref(self) -> AdapterRef:
        return self.manifest.ref(self.digest, self.name, self.version)

    def shown_to(self, principal: Principal) -> AdapterVersion:
        """The version as the caller may know it: those of its own tenant who may make others know how it was made."""
        if _may_know(self.name, principal):
            return self
        return self.model_copy(update={"manifest": without_making(self.manifest)})


class VersionSummary(VersionResource):
    """A version as lists show it: without its manifest, of which it has what is here.

    run  the job that trained it, else the sweep
    """

    rank: int
    data_fingerprint: str | None
    run: str | None

    def shown_to(self, principal: Principal) -> VersionSummary:
        """The summary as the caller may know it, by the rule of `AdapterVersion.shown_to`."""
        if _may_know(self.name, principal):
            return self
        return self.model_copy(update={"data_fingerprint": None, "run": None})


def without_making(manifest: AdapterManifest) -> AdapterManifest:
    """The manifest without how the adapter was made."""
    return manifest.model_copy(update=_HOW_IT_WAS_MADE)


def _may_know(name: str, principal: Principal) -> bool:
    """The caller may know how an adapter's versions were made."""
    return principal.is_admin or bool(_tenant_of(name) == principal.tenant and principal.scopes & _MAKERS)


def _tenant_of(name: str) -> str:
    return split_qualified(name).tenant or DEFAULT_TENANT


def weights_of(stable: int, canary: Canary | None) -> dict[int, int]:
    return {stable: 100} if canary is None else {stable: 100 - canary.percent, canary.version: canary.percent}


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
    canaries  those that run, by alias
    """

    name: str
    created_at: datetime
    refs: tuple[AdapterRef, ...]
    pointers: tuple[tuple[str, int], ...] = ()
    tenant: str = DEFAULT_TENANT
    visibility: Visibility = "private"
    shared_with: frozenset[str] = frozenset()
    canaries: tuple[Canary, ...] = ()

    def exists_for(self, principal: Principal) -> bool:
        """The name exists for this caller; `queries.visible` says the same in SQL."""
        is_seen = (
            self.tenant == principal.tenant
            or self.visibility == "public"
            or (self.visibility == "shared" and principal.tenant in self.shared_with)
            or principal.is_admin
        )
        return is_seen and (principal.names is None or self.name in principal.names)

    @property
    def versions(self) -> dict[int, AdapterRef]:
        """The versions by number, the oldest first."""
        return {ref.version: ref for ref in self.refs}

    @property
    def aliases(self) -> dict[str, int]:
        """Alias → version."""
        return dict(self.pointers)

    @property
    def weights(self) -> dict[str, dict[int, int]]:
        """Alias → version → percent of its requests, of the aliases that have a canary."""
        return {canary.alias: weights_of(self.aliases[canary.alias], canary) for canary in self.canaries}

    def canary(self, selector: str | None) -> Canary | None:
        """The canary of the alias that the selector names, None for DEFAULT_ALIAS; None where none runs."""
        alias = DEFAULT_ALIAS if selector is None else selector
        return next((canary for canary in self.canaries if canary.alias == alias), None)

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


def make_ref(
    name: str, version: int, digest: str, context_length: int, nbytes: int, *words: Any, invoked_by: Any = None
) -> AdapterRef:
    """A reference; `words` are method, base_fingerprint, tool_parser and chat_template. Equal words are one string.
    `invoked_by`: the tokens of its invocation.
    """
    interned: list[Any] = [word and intern(word) for word in words]
    method, base_fingerprint, tool_parser, chat_template = interned
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
        invocation_tokens=None if invoked_by is None else tuple(invoked_by),
    )


def make_pointers(pointers: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """`AdapterEntry.pointers`. Equal ones are one object, because most adapters have the same few."""
    return _same(tuple(pointers))


@lru_cache(maxsize=4096)
def _same(pointers: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    return pointers


class Job(JobResource):
    """A training job. `cluster`: the Ray cluster to which an API server submitted it."""

    cluster: str | None = Field(default=None, exclude=True)


def _is_number(selector: str) -> bool:
    return selector.isascii() and selector.isdigit() and len(selector) <= 9


# -- rules of names ---------------------------------------------------------------------------------------------------

NUM_COMPARED = 32
_LONGEST_COMPARED = 192  # characters; a name has at most 96


def check_name(name: str, what: str = "adapter name") -> None:
    _check(Name, name, what, "letters, digits, '.', '_' and '-', at most 96")


def check_qualified(name: str) -> None:
    _check(QualifiedName, name, "adapter name", "tenant/name, of letters, digits, '.', '_' and '-', at most 96")


def check_tenant(name: str) -> None:
    _check(TenantName, name, "tenant's name", "letters, digits, '.', '_' and '-', at most 32")


def check_alias(alias: str) -> None:
    _check(Alias, alias, "alias", "a letter, then letters, digits, '_', '-'")


def check_job_id(job_id: str) -> None:
    _check(JobId, job_id, "job id", "letters, digits, '.', '_' and '-', at most 128")


def check_tag(key: str, value: str) -> None:
    _check(TagKey, key, "tag's key", "letters, digits, '.', '_', '-' and ':', at most 96")
    _check(TagValue, value, "tag's value", "at most 5000 characters, without control characters")


def parse_tags(given: Sequence[str]) -> dict[str, str | None]:
    """`KEY=VALUE` → the value; `KEY` → None, which is any value. Raises SpecError."""
    tags = {key: value if equals else None for key, equals, value in (tag.partition("=") for tag in given)}
    if "" in tags:
        raise SpecError("a tag is KEY or KEY=VALUE, and its key is not empty")
    return tags


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


def _check(kind: Any, value: str, what: str, rule: str) -> None:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as e:
        raise SpecError(f"{shown(value)} is not a valid {what}: {rule}") from e
