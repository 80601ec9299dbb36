"""A typed client of the catalog's API, with the calls of `loray.service` over HTTP.

with CatalogClient("http://127.0.0.1:8000") as catalog:
    prod = catalog.alias("tone", "prod")
    catalog.promote("tone", "prod", 4, etag=prod.etag)  # RevisionConflict if the alias has moved meanwhile
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Unpack, cast

import httpx
from pydantic import ValidationError

from loray.client.http import HttpClient, R, given
from loray.errors import ClusterError, IntegrityError, LorayError, StoreError
from loray.files import appearing, is_plain, unpack_tar
from loray.schemas.access import (
    AuditFilter,
    AuditResource,
    KeyChange,
    KeyCreation,
    KeyResource,
    NewKeyResource,
    TenantChange,
    TenantCreation,
    TenantResource,
)
from loray.schemas.resources import (
    AdapterFilter,
    AdapterResource,
    AliasResource,
    BaseResource,
    CanaryResource,
    DownloadForm,
    DownloadResource,
    FileResource,
    JobResource,
    Page,
    PlacementResource,
    PresignedFileResource,
    Problem,
    TagResource,
    UploadResource,
    UsageFilter,
    UsageResource,
    VersionDetail,
    VersionResource,
)
from loray.spec import (
    DEFAULT_ALIAS,
    CanaryBounds,
    Duration,
    Evaluation,
    Limits,
    TrainSpec,
    UsageGroup,
    Visibility,
    split_qualified,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_LONG = httpx.Timeout(1200.0, connect=5.0)  # merging takes minutes before its first byte
_CHUNK_BYTES = 1 << 20


class CatalogClient(HttpClient):
    """A client that raises the errors which the server raised: AdapterNotFound, JobNotFound, ConflictError,
    RevisionConflict, GateRefused, SpecError with every wrong field, CatalogError if the server cannot reach its
    database, and ClusterError if the server or Ray does not answer.

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

    def adapters(self, **wanted: Unpack[AdapterFilter]) -> Iterator[AdapterResource]:
        """All adapters that exist for this key and are like this, fetched page by page."""
        tags = wanted.pop("tags", None) or {}
        tag = [key if value is None else f"{key}={value}" for key, value in tags.items()]
        return self._pages("/adapters", Page[AdapterResource], {**wanted, "tag": tag or None})

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

    # -- files --------------------------------------------------------------------------------------------------------

    def begin_upload(self, idempotency_key: str | None = None) -> UploadResource:
        """Begins an upload, or continues that of this key."""
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        return self._ask(UploadResource, "POST", "/uploads", again=idempotency_key is not None, headers=headers)

    def upload(self, id: str) -> UploadResource:
        return self._ask(UploadResource, "GET", f"/uploads/{id}")

    def put_file(self, id: str, path: Path) -> FileResource:
        """Sends one file, which is read while it is sent."""
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(path.stat().st_size)}
        url = f"/uploads/{id}/files/{path.name}"
        return self._ask(FileResource, "PUT", url, again=True, file=path, headers=headers, timeout=_LONG)

    def delete_upload(self, id: str) -> None:
        self._request("DELETE", f"/uploads/{id}")

    @contextmanager
    def download(self, name: str, version: int, form: DownloadForm = "peft") -> Iterator[BinaryIO]:
        """A tar archive of the version's folder or merged checkpoint, or its GGUF, which is read while it arrives."""
        with self._streamed("GET", _download(name, version, format=form), timeout=_LONG) as response:
            yield _body_of(response)

    def fetch(self, name: str, version: int, path: Path, form: DownloadForm = "peft") -> None:
        """Writes a version to the new folder `path`; as GGUF, to the new file `path`. It appears when it is complete.

        PEFT's files come from the store itself where that is a bucket which this machine reaches, so that their bytes
        do not pass through the server. Raises ConflictError where `path` exists, and IntegrityError where what comes
        is not what the server has.
        """
        if form == "gguf":
            with appearing(path) as made, self.download(name, version, form) as body, made.open("xb") as f:
                while chunk := body.read(_CHUNK_BYTES):
                    f.write(chunk)
        elif form == "merged":
            with self.download(name, version, form) as archive:
                unpack_tar(archive, path)
        else:
            self._fetch_folder(name, version, path)

    def _fetch_folder(self, name: str, version: int, folder: Path) -> None:
        with self._streamed("GET", _download(name, version, presigned=True), timeout=_LONG) as response:
            if response.headers["content-type"] != "application/json":
                unpack_tar(_body_of(response), folder)
                return
            found = self._read(DownloadResource, response.read())
        try:
            with appearing(folder) as made:
                made.mkdir()
                for file in found.files:
                    _read_from_store(file, made)
        except StoreError:  # a bucket that only the server reaches
            with self.download(name, version) as archive:
                unpack_tar(archive, folder)

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
        """The job's log so far. Raises JobNotFound if the job is unknown, or if Ray no longer has its log."""
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

    def usage(self, group_by: Sequence[UsageGroup] = (), **wanted: Unpack[UsageFilter]) -> Iterator[UsageResource]:
        """Sums of what requests used, fetched page by page."""
        return self._pages("/usage", Page[UsageResource], {"group_by": list(group_by), **_times(wanted)})

    # -- keys and tenants, for administrators; keys also for those of a tenant ----------------------------------------

    def create_key(self, wanted: KeyCreation) -> NewKeyResource:
        """Creates a key, which is in the answer and nowhere else."""
        body = wanted.model_dump(mode="json", exclude_unset=True)
        return self._ask(NewKeyResource, "POST", "/keys", json=body)

    def keys(self, *, tenant: str | None = None, key_alias: str | None = None) -> Iterator[KeyResource]:
        """All keys, newest first, fetched page by page."""
        return self._pages("/keys", Page[KeyResource], {"tenant": tenant, "key_alias": key_alias})

    def key(self, key_id: str = "self") -> KeyResource:
        """One key; this client's own by default."""
        return self._ask(KeyResource, "GET", f"/keys/{key_id}")

    def change_key(self, key_id: str, change: KeyChange) -> KeyResource:
        body = change.model_dump(mode="json", exclude_unset=True)
        return self._ask(KeyResource, "PATCH", f"/keys/{key_id}", json=body)

    def revoke_key(self, key_id: str, *, only_this: bool = False) -> KeyResource:
        """Revokes a key with those that it was rotated from and into, or `only_this`."""
        return self._ask(KeyResource, "DELETE", f"/keys/{key_id}", params={"only_this": True} if only_this else {})

    def rotate_key(self, key_id: str, *, grace_period: Duration | None = None) -> NewKeyResource:
        """Replaces a key, which goes on for `grace_period`, by a new one. A key may replace itself."""
        body = given({"grace_period": grace_period})
        return self._ask(NewKeyResource, "POST", f"/keys/{key_id}/rotate", json=body)

    def create_tenant(self, name: str, limits: Limits | None = None) -> TenantResource:
        fields = {} if limits is None else limits.model_dump(exclude_unset=True)
        body = TenantCreation(name=name, **fields).model_dump(mode="json", exclude_unset=True)
        return self._ask(TenantResource, "POST", "/tenants", json=body)

    def tenants(self) -> tuple[TenantResource, ...]:
        return self._ask(Page[TenantResource], "GET", "/tenants").items

    def tenant(self, name: str) -> TenantResource:
        return self._ask(TenantResource, "GET", f"/tenants/{name}")

    def change_tenant(self, name: str, change: TenantChange) -> TenantResource:
        body = change.model_dump(mode="json", exclude_unset=True)
        return self._ask(TenantResource, "PATCH", f"/tenants/{name}", json=body)

    def audit(self, **wanted: Unpack[AuditFilter]) -> Iterator[AuditResource]:
        """Entries of the audit log, newest first, fetched page by page: the own tenant's; for administrators all."""
        return self._pages("/audit", Page[AuditResource], _times(wanted))

    # -- HTTP ---------------------------------------------------------------------------------------------------------

    def _pages(self, path: str, schema: type[Page[R]], params: Mapping[str, Any]) -> Iterator[R]:
        cursor: str | None = None
        url = httpx.URL(path)  # its own query is kept
        while True:
            page = self._ask(schema, "GET", str(url.copy_merge_params(given({**params, "cursor": cursor}))))
            yield from page.items
            if (cursor := page.next) is None:
                return

    def _error_of(self, response: httpx.Response) -> LorayError:
        try:
            return Problem.model_validate_json(response.content).exception()
        except ValidationError:  # from a proxy, for instance
            return ClusterError(f"HTTP {response.status_code}: {response.text[:200]}")


def _times(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Write the times of what is asked as the API has them."""
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in wanted.items()}


def _version(version: int | None) -> str:
    return "" if version is None else f"/versions/{version}"


def _alias(name: str, alias: str) -> str:
    return path_of(name, f"/aliases/{alias}")


def _if_match(etag: str | None) -> dict[str, str]:
    return {} if etag is None else {"If-Match": etag}


def _read_from_store(file: PresignedFileResource, folder: Path) -> None:
    """Write the file to `folder`. Raises StoreError where the store has it not, IntegrityError where it differs."""
    if not is_plain(file.name):
        raise IntegrityError(f"the adapter has a file {file.name!r}, which is not a plain one")
    digest = hashlib.sha256()
    try:  # without the server's key, which is no concern of the store
        with httpx.stream("GET", file.url, timeout=_LONG) as response, (folder / file.name).open("xb") as f:
            if not response.is_success:
                raise StoreError(f"the store refuses {file.name} (HTTP {response.status_code})")
            for chunk in response.iter_bytes(_CHUNK_BYTES):
                digest.update(chunk)
                f.write(chunk)
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        raise StoreError(f"the store does not answer: {e}") from e
    if digest.hexdigest() != file.sha256:
        raise IntegrityError(f"{file.name} differs from its SHA-256; download it again")


class _Body(io.RawIOBase):
    """The body of a response as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        while not self._rest:
            try:
                self._rest = next(self._chunks)
            except StopIteration:
                return 0
        taken, self._rest = self._rest[: len(view)], self._rest[len(view) :]
        view[: len(taken)] = taken
        return len(taken)


def _body_of(response: httpx.Response) -> BinaryIO:
    return cast("BinaryIO", io.BufferedReader(_Body(response.iter_bytes())))


def path_of(name: str, below: str = "") -> str:
    """The path of the adapter `name` or `tenant/name`, or one below it."""
    tenant, bare = split_qualified(name)
    return f"/adapters/{bare}{below}" + ("" if tenant is None else f"?tenant={tenant}")


def _download(name: str, version: int, **params: str | bool) -> str:
    path = httpx.URL(path_of(name, f"/versions/{version}/download"))
    return str(path.copy_merge_params(params))  # its own query is kept
