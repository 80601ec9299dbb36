"""The connection of the typed clients: requests, retries, errors."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from loray.errors import EngineError, LorayError
from loray.telemetry import get_logger

R = TypeVar("R", bound=BaseModel)

_log = get_logger(__name__)

_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_BROKEN = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError, httpx.ProxyError)
_PASSING = frozenset({502, 503, 504})
_RATE_LIMITED = 429  # nothing was done
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0


class RetryPolicy:
    """The attempts at one request, for up to `seconds` after the first. The pauses grow, and differ between clients, so
    that they do not all come at the moment when the server is back.
    """

    def __init__(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + seconds
        self._pause_s = _FIRST_PAUSE_S

    def wait(self, retry_after: str | None = None) -> bool:
        """Wait before the next attempt, at least as long as the header Retry-After says. False: the time is over."""
        pause_s = self._pause_s * random.uniform(0.5, 1.0)
        if retry_after is not None and retry_after.isdigit():
            pause_s += float(retry_after)
        if time.monotonic() + pause_s > self._ends_at:
            return False
        time.sleep(pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return True


class HttpClient:
    """The connection of a typed client, closed at the end of a `with` block.

    api_key  None: LORAY_API_KEY of the environment, if it is set
    timeout  None: the class's default
    retry_s  seconds for which a request is sent again while the server cannot be reached; and, if sending it twice does
             what sending it once does, also where the answer was lost or is 502, 503 or 504; and after 429 in any case.
             None: the class's default
    """

    _prefix = ""
    _timeout = httpx.Timeout(600.0, connect=5.0)
    _retry_s = 0.0
    _failure: type[LorayError] = EngineError  # raised if the server fails or does not answer

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: httpx.Timeout | float | None = None,
        retry_s: float | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/") + self._prefix
        api_key = api_key or os.environ.get("LORAY_API_KEY")
        headers = {} if not api_key else {"Authorization": f"Bearer {api_key}"}
        timeout = self._timeout if timeout is None else timeout
        if retry_s is not None:
            self._retry_s = retry_s
        self._http = httpx.Client(base_url=self.base_url, headers=headers, timeout=timeout, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _ask(self, schema: type[R], method: str, path: str, **options: Any) -> R:
        return self._read(schema, self._request(method, path, **options).content)

    def _request(
        self, method: str, path: str, *, again: bool = False, file: Path | None = None, **options: Any
    ) -> httpx.Response:
        """The response to a request that succeeded.

        again  whether it may be sent twice; those that only read always may
        file   the body, which is read while it is sent
        """
        if method == "POST" and not options.keys() & {"json", "content", "files", "data"}:
            # What no form of a web page sends.
            options["headers"] = {"Content-Type": "application/json", **options.get("headers", {})}

        def send() -> httpx.Response:
            if file is None:
                return self._http.request(method, path, **options)
            with file.open("rb") as f:
                return self._http.request(method, path, content=f, **options)

        return self._attempts(send, again=again or method == "GET")

    @contextmanager
    def _streamed(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        """Yields the response before its body has arrived. Leaving the block ends the request."""

        def send() -> httpx.Response:
            return self._http.send(self._http.build_request(method, path, **options), stream=True)

        response = self._attempts(send, again=method == "GET")
        try:
            yield response
        except httpx.HTTPError as e:
            raise self._unreachable(e) from e
        finally:
            response.close()

    def _attempts(self, send: Callable[[], httpx.Response], *, again: bool) -> httpx.Response:
        policy = RetryPolicy(self._retry_s)
        while True:
            try:
                response = send()
                if response.is_success:
                    return response
                response.read()
            except httpx.HTTPError as e:
                passes = isinstance(e, _NEVER_SENT) or (again and isinstance(e, _BROKEN))
                if not (passes and policy.wait()):
                    raise self._unreachable(e) from e
                _log.warning("no answer from %s (%r): trying again", self.base_url, e)
            else:
                passes = response.status_code == _RATE_LIMITED or (again and response.status_code in _PASSING)
                if not (passes and policy.wait(response.headers.get("retry-after"))):
                    raise self._error_of(response)
                _log.warning("%s answers %d: trying again", self.base_url, response.status_code)

    def _read(self, schema: type[R], data: str | bytes) -> R:
        try:
            return schema.model_validate_json(data)
        except ValidationError as e:
            raise self._failure(f"the server's answer is not of this API: {data[:200]!r}") from e

    def _unreachable(self, error: httpx.HTTPError) -> LorayError:
        reason = str(error) or type(error).__name__
        return self._failure(f"no answer from {self.base_url} ({reason}); `loray status` says what is being served")

    def _error_of(self, response: httpx.Response) -> LorayError:
        """The error that the server raised, from its response."""
        raise NotImplementedError


def given(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that are not None."""
    return {name: value for name, value in params.items() if value is not None}
