"""The HTTP part of both typed clients: one connection, responses checked against their schema, errors raised."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from loray.api.resources import Page
from loray.errors import EngineError, LorayError

R = TypeVar("R", bound=BaseModel)


class HttpClient:
    """The connection of a typed client, closed at the end of a `with` block.

    api_key  None: LORAY_API_KEY of the environment, if it is set
    timeout  None: the class's default
    """

    _prefix = ""
    _timeout = httpx.Timeout(600.0, connect=5.0)
    _failure: type[LorayError] = EngineError  # raised if the server fails or does not answer

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: httpx.Timeout | float | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/") + self._prefix
        api_key = api_key or os.environ.get("LORAY_API_KEY")
        headers = {} if not api_key else {"Authorization": f"Bearer {api_key}"}
        timeout = self._timeout if timeout is None else timeout
        self._http = httpx.Client(base_url=self.base_url, headers=headers, timeout=timeout, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _ask(self, schema: type[R], method: str, path: str, **options: Any) -> R:
        return self._read(schema, self._request(method, path, **options).content)

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        if method == "POST" and not options.keys() & {"json", "content", "files", "data"}:
            # What no form of a web page sends.
            options["headers"] = {"Content-Type": "application/json", **options.get("headers", {})}
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as e:
            raise self._unreachable(e) from e
        if not response.is_success:
            raise self._error_of(response)
        return response

    @contextmanager
    def _streamed(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        """Yields the response before its body has arrived. Leaving the block ends the request."""
        try:
            with self._http.stream(method, path, **options) as response:
                if not response.is_success:
                    response.read()
                    raise self._error_of(response)
                yield response
        except httpx.HTTPError as e:
            raise self._unreachable(e) from e

    def _read(self, schema: type[R], data: str | bytes) -> R:
        try:
            return schema.model_validate_json(data)
        except ValidationError as e:
            raise self._failure(f"the server's answer is not a {schema.__name__}: {data[:200]!r}") from e

    def _unreachable(self, error: httpx.HTTPError) -> LorayError:
        reason = str(error) or type(error).__name__
        return self._failure(f"no answer from {self.base_url} ({reason}); `loray status` says what is being served")

    def _error_of(self, response: httpx.Response) -> LorayError:
        """The error that the server raised, from its response."""
        raise NotImplementedError


class PagedClient(HttpClient):
    """A client of an API that lists in pages."""

    def _pages(self, path: str, schema: type[Page[R]], params: dict[str, Any]) -> Iterator[R]:
        cursor: str | None = None
        url = httpx.URL(path)  # its own query is kept
        while True:
            page = self._ask(schema, "GET", str(url.copy_merge_params(given(params | {"cursor": cursor}))))
            yield from page.items
            cursor = page.next
            if cursor is None:
                return


def given(params: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are None."""
    return {name: value for name, value in params.items() if value is not None}
