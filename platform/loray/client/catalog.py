"""A typed client of the catalog's REST API: adapters, versions, aliases, placement and training jobs.

with CatalogClient("http://127.0.0.1:8000") as catalog:
    prod = catalog.alias("tone", "prod")
    catalog.promote("tone", "prod", 4, etag=prod.etag)  # RevisionConflict if the alias has moved meanwhile
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx
from pydantic import ValidationError

from loray.api.canaries import CanaryResource
from loray.api.resources import (
    AdapterResource,
    AliasResource,
    BaseResource,
    JobResource,
    Page,
    PlacementResource,
    Problem,
    TagResource,
    VersionDetail,
    VersionResource,
)
from loray.api.usage import UsageResource
from loray.client.access import AccessCalls
from loray.client.files import FileCalls, path_of
from loray.client.http import given
from loray.errors import ClusterError, LorayError
from loray.spec import DEFAULT_ALIAS, CanaryBounds, Evaluation, TrainSpec, UsageGroup, Visibility


class CatalogClient(AccessCalls, FileCalls):
    """Raises the errors that the server raised: AdapterNotFound, JobNotFound, ConflictError, RevisionConflict,
    GateRefused, SpecError with every wrong field, CatalogError if the server cannot reach its database, and
    ClusterError if the server or Ray does not answer.

    Reading, uploading, registering and promoting without a precondition go on when server, database or store come back
    within `retry_s`, by default 10 s.
    """

    _prefix = "/api/v1"
    _timeout = httpx.Timeout(60.0, connect=5.0)
    _retry_s = 10.0
    _failure = ClusterError

    # -- adapters -----------------------------------------------------------------------------------------------------

    def bases(self) -> tuple[BaseResource, ...]:
        return self._ask(Page[BaseResource], "GET", "/bases").items

    def adapters(
        self,
        *,
        tenant: str | None = None,
        base: str | None = None,
        method: str | None = None,
        search: str | None = None,
        tags: Mapping[str, str | None] | None = None,
    ) -> Iterator[AdapterResource]:
        """All adapters that exist for this key, or those of one tenant, fetched page by page.

        `search` is a part of the name, in any case; `tags`: key → value, None for any.
        """
        tag = [key if value is None else f"{key}={value}" for key, value in (tags or {}).items()]
        params = {"tenant": tenant, "base": base, "method": method, "search": search, "tag": tag or None}
        return self._pages("/adapters", Page[AdapterResource], params)

    def adapter(self, name: str) -> AdapterResource:
        return self._ask(AdapterResource, "GET", path_of(name))

    def share(self, name: str, visibility: Visibility, shared_with: Sequence[str] = ()) -> AdapterResource:
        """Sets who sees the adapter beside its tenant: nobody, the tenants of `shared_with`, or everybody."""
        body = {"visibility": visibility, "shared_with": list(shared_with)}
        return self._ask(AdapterResource, "PATCH", path_of(name), again=True, json=body)

    def transfer(self, name: str, tenant: str, new_name: str | None = None) -> AdapterResource:
        """Hands the adapter to another tenant; for administrators."""
        body = given({"tenant": tenant, "name": new_name})
        return self._ask(AdapterResource, "POST", path_of(name, "/transfer"), json=body)

    def tags(self, name: str) -> dict[str, str]:
        page = self._ask(Page[TagResource], "GET", path_of(name, "/tags"))
        return {tag.key: tag.value for tag in page.items}

    def set_tag(self, name: str, key: str, value: str = "") -> TagResource:
        return self._ask(TagResource, "PUT", path_of(name, f"/tags/{key}"), again=True, json={"value": value})

    def delete_tag(self, name: str, key: str) -> None:
        self._request("DELETE", path_of(name, f"/tags/{key}"))

    def versions(self, name: str) -> Iterator[VersionResource]:
        """All versions, newest first, fetched page by page."""
        return self._pages(path_of(name, "/versions"), Page[VersionResource], {})

    def version(self, name: str, version: int) -> VersionDetail:
        return self._ask(VersionDetail, "GET", path_of(name, f"/versions/{version}"))

    def register(
        self,
        name: str,
        digest: str | None = None,
        *,
        upload: str | None = None,
        aliases: Sequence[str] = (),
        version: int | None = None,
        no_gate: str | None = None,
        **described: str | None,
    ) -> VersionDetail:
        """Registers an adapter that the store has already, or an upload, as a version.

        `described`: `base`, `licence`, `description`, `tool_parser` of an upload.
        """
        body = given({"digest": digest, "upload": upload, "version": version, "no_gate": no_gate} | described)
        body |= {"aliases": list(aliases)}
        return self._ask(VersionDetail, "POST", path_of(name, "/versions"), again=True, json=body)

    def report_evaluations(self, name: str, version: int, measured: Sequence[Evaluation]) -> VersionDetail:
        """Keeps with a version what was measured of it elsewhere; the gate may not believe it."""
        body = {"evaluations": [e.model_dump(mode="json", exclude_none=True) for e in measured]}
        return self._ask(VersionDetail, "POST", path_of(name, f"{_version(version)}/evaluations"), json=body)

    def delete(self, name: str, version: int | None = None) -> None:
        """Deletes a name, or one version of it; it can be restored."""
        self._request("DELETE", path_of(name, _version(version)))

    def restore(self, name: str, version: int | None = None) -> None:
        self._request("POST", path_of(name, f"{_version(version)}/restore"))

    def release(self, name: str, version: int) -> None:
        """Lifts the quarantine of a version on which replicas have died."""
        self._request("DELETE", path_of(name, f"{_version(version)}/quarantine"))

    def placement(self, name: str) -> PlacementResource:
        return self._ask(PlacementResource, "GET", path_of(name, "/placement"))

    # -- aliases ------------------------------------------------------------------------------------------------------

    def aliases(self, name: str) -> tuple[AliasResource, ...]:
        return self._ask(Page[AliasResource], "GET", path_of(name, "/aliases")).items

    def alias(self, name: str, alias: str) -> AliasResource:
        return self._ask(AliasResource, "GET", _alias(name, alias))

    def promote(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        etag: str | None = None,
        create: bool = False,
        no_gate: str | None = None,
    ) -> AliasResource:
        """Points `alias` at `version`: with `etag`, only if it has that ETag; with `create`, only if it is not set.

        `no_gate`: the reason for moving it although LongLoRA's gate refuses.
        """
        headers = _if_match(etag) | ({"If-None-Match": "*"} if create else {})
        body = given({"version": version, "no_gate": no_gate})
        again = not headers  # else an answer that was lost would look like another caller's move
        return self._ask(AliasResource, "PUT", _alias(name, alias), again=again, json=body, headers=headers)

    def rollback(self, name: str, alias: str = DEFAULT_ALIAS, *, etag: str | None = None) -> AliasResource:
        path = path_of(name, f"/aliases/{alias}/rollback")
        return self._ask(AliasResource, "POST", path, headers=_if_match(etag))

    def canary(self, name: str, alias: str = DEFAULT_ALIAS) -> CanaryResource:
        """The canary of an alias that runs, else the last one."""
        return self._ask(CanaryResource, "GET", f"{_alias(name, alias)}/canary")

    def set_canary(
        self,
        name: str,
        alias: str,
        version: int,
        percent: int,
        *,
        bounds: CanaryBounds | None = None,
        no_gate: str | None = None,
    ) -> CanaryResource:
        """Gives a version a share of the alias's requests. `bounds` None: those that its canary has, else defaults."""
        body = given({"version": version, "percent": percent, "no_gate": no_gate})
        if bounds is not None:
            body["bounds"] = bounds.model_dump()
        return self._ask(CanaryResource, "PUT", f"{_alias(name, alias)}/canary", again=True, json=body)

    def end_canary(self, name: str, alias: str = DEFAULT_ALIAS) -> CanaryResource:
        return self._ask(CanaryResource, "DELETE", f"{_alias(name, alias)}/canary")

    def delete_alias(self, name: str, alias: str, *, etag: str | None = None) -> None:
        self._request("DELETE", _alias(name, alias), headers=_if_match(etag))

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def submit(
        self, recipe: TrainSpec | Mapping[str, Any] | str, *, id: str | None = None, resume: bool = False
    ) -> JobResource:
        """Submits a training job. `recipe` is a spec, its fields, or YAML."""
        if isinstance(recipe, str):
            body: dict[str, Any] = {"content": recipe, "headers": {"Content-Type": "application/yaml"}}
        else:
            body = {"json": recipe.model_dump(mode="json") if isinstance(recipe, TrainSpec) else dict(recipe)}
        params = given({"id": id, "resume": resume or None})
        return self._ask(JobResource, "POST", "/jobs", params=params, **body)

    def jobs(self, *, status: str | None = None, name: str | None = None) -> Iterator[JobResource]:
        """All jobs, newest first, fetched page by page."""
        return self._pages("/jobs", Page[JobResource], {"status": status, "name": name})

    def job(self, job_id: str) -> JobResource:
        return self._ask(JobResource, "GET", f"/jobs/{job_id}")

    def logs(self, job_id: str) -> str:
        """The job's log so far. JobNotFound if the job is unknown, or if Ray no longer has its log."""
        return self._request("GET", f"/jobs/{job_id}/logs").text

    def follow(self, job_id: str) -> Iterator[str]:
        """Lines of the job's log, as they are written, until the job ends."""
        timeout = httpx.Timeout(5.0, read=None)  # a job may write nothing for a long time
        params = {"follow": True}
        with self._streamed("GET", f"/jobs/{job_id}/logs", params=params, timeout=timeout) as response:
            yield from response.iter_lines()

    def stop(self, job_id: str) -> JobResource:
        """Asks the job to stop. Its status becomes stopped once its driver has ended."""
        return self._ask(JobResource, "POST", f"/jobs/{job_id}/stop")

    # -- usage --------------------------------------------------------------------------------------------------------

    def usage(self, group_by: Sequence[UsageGroup] = (), **params: Any) -> Iterator[UsageResource]:
        """What requests used, fetched page by page. `params`: `tenant`, `key_id`, `model`, `since`, `until`."""
        return self._pages("/usage", Page[UsageResource], {"group_by": list(group_by)} | params)

    # -- HTTP ---------------------------------------------------------------------------------------------------------

    def _error_of(self, response: httpx.Response) -> LorayError:
        try:
            return Problem.model_validate_json(response.content).exception()
        except ValidationError:  # from a proxy, for instance
            return ClusterError(f"HTTP {response.status_code}: {response.text[:200]}")


def _version(version: int | None) -> str:
    return "" if version is None else f"/versions/{version}"


def _alias(name: str, alias: str) -> str:
    return path_of(name, f"/aliases/{alias}")


def _if_match(etag: str | None) -> dict[str, str]:
    return {} if etag is None else {"If-Match": etag}
