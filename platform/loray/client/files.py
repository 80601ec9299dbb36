"""The calls of uploads and downloads: files are sent one by one, and come as one archive or from the store."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import httpx

from loray.api.uploads import DownloadForm, DownloadResource, FileResource, PresignedFileResource, UploadResource
from loray.client.http import HttpClient
from loray.errors import IntegrityError, StoreError
from loray.files import appearing, is_plain, unpack_tar
from loray.spec import split_qualified

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_LONG = httpx.Timeout(1200.0, connect=5.0)  # merging takes minutes before its first byte
_CHUNK_BYTES = 1 << 20


class FileCalls(HttpClient):
    """A part of CatalogClient."""

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


def _read_from_store(file: PresignedFileResource, folder: Path) -> None:
    """Raises StoreError where the store does not give the file, IntegrityError where it is another one."""
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
    """Of `name` or `tenant/name`."""
    tenant, bare = split_qualified(name)
    return f"/adapters/{bare}{below}" + ("" if tenant is None else f"?tenant={tenant}")


def _download(name: str, version: int, **params: str | bool) -> str:
    path = httpx.URL(path_of(name, f"/versions/{version}/download"))
    return str(path.copy_merge_params(params))  # its own query is kept
