"""Builds the REST API's resources from the catalog's entries, and pages with links."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import urlencode

from fastapi import Request, Response

from loray.api.resources import (
    AdapterResource,
    AliasResource,
    BaseResource,
    JobResource,
    Page,
    ProjectionResource,
    QuarantineResource,
    ReplicaAdapter,
    VersionDetail,
    VersionResource,
)
from loray.api.status import AdapterPlacement
from loray.catalog import AdapterEntry, AdapterVersion, AliasState, Job, VersionSummary
from loray.catalog.projections import canonical_digests
from loray.spec import AdapterManifest, Projection

T = TypeVar("T")


def adapter(entry: AdapterEntry, bases: Mapping[str, str]) -> AdapterResource:
    """An adapter. `bases`: fingerprint → name."""
    ref = entry.default
    return AdapterResource(
        name=entry.name,
        created_at=entry.created_at,
        version=ref.version,
        digest=ref.digest,
        method=ref.method,
        base=bases.get(ref.base_fingerprint),
        base_fingerprint=ref.base_fingerprint,
        context_length=ref.context_length,
        nbytes=ref.nbytes,
        versions=tuple(sorted(entry.versions, reverse=True)),
        aliases=dict(entry.aliases),
        weights=entry.weights,
        tenant=entry.tenant,
        visibility=entry.visibility,
        shared_with=tuple(sorted(entry.shared_with)),
    )


def base(name: str, fingerprint: str, projections: tuple[Projection, ...]) -> BaseResource:
    """A base. `projections`: all its VeRA pairs, in the catalog's order."""
    first = canonical_digests(projections)
    shown = (ProjectionResource(**p.model_dump(), canonical=p.sha256 in first) for p in projections)
    return BaseResource(name=name, fingerprint=fingerprint, projections=tuple(shown))


def version(v: VersionSummary) -> VersionResource:
    return VersionResource(**_fields(v, v))


def detail(v: AdapterVersion) -> VersionDetail:
    return VersionDetail(**_fields(v, v.manifest), manifest=v.manifest)


def _fields(v: VersionSummary | AdapterVersion, made: VersionSummary | AdapterManifest) -> dict[str, Any]:
    """The fields of a version in a list, and of one by itself. `made` has those of the manifest."""
    return {
        "name": v.name,
        "version": v.version,
        "digest": v.digest,
        "created_at": v.created_at,
        "aliases": v.aliases,
        "method": made.method,
        "base_fingerprint": made.base_fingerprint,
        "context_length": made.context_length,
        "nbytes": made.nbytes,
        "evaluations": v.evaluations,
        "quarantine": None if v.quarantine is None else QuarantineResource.model_validate(v.quarantine._asdict()),
    }


def alias(state: AliasState) -> AliasResource:
    return AliasResource(
        name=state.name,
        alias=state.alias,
        version=state.version,
        digest=state.digest,
        revision=state.revision,
        weights=state.weights,
    )


def placement(found: AdapterPlacement, version: int, *, with_use: bool) -> ReplicaAdapter:
    """An adapter in a replica. `version`: that of the requested name; the same bytes may have other names."""
    last_used_at = datetime.fromtimestamp(found.last_used_at, UTC) if with_use and found.last_used_at else None
    shown = found.model_dump(include={"replica", "node", "digest", "nbytes", "tier"})
    uses = found.uses if with_use else None
    return ReplicaAdapter(version=version, uses=uses, last_used_at=last_used_at, **shown)


def job(job: Job) -> JobResource:
    return JobResource(
        id=job.id,
        name=job.name,
        tenant=job.tenant,
        status=job.status,
        message=job.message,
        version=job.version,
        actor=job.actor,
        created_at=job.created_at,
        started_at=job.started_at,
        ended_at=job.ended_at,
        recipe=job.recipe,
    )


def page(items: tuple[T, ...], cursor: str | None, request: Request, response: Response) -> Page[T]:
    """A page, with a Link header to the next one if there is one."""
    if cursor is not None:
        others = [(name, value) for name, value in request.query_params.multi_items() if name != "cursor"]
        query = urlencode([*others, ("cursor", cursor)])
        response.headers["Link"] = f'<{request.url.path}?{query}>; rel="next"'
    return Page[T](items=items, next=cursor)
