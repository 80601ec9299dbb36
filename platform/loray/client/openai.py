"""Typed client of the HTTP API: models, completions, chat completions, status.

    with LorayClient("http://127.0.0.1:8000") as client:
        for chunk in client.stream_chat("tone@prod", [{"role": "user", "content": "Hello"}]):
            ...

Sampling options are the API's own fields (`temperature`, `max_tokens`, `stop`, …).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from loray.api.openai import ChatCompletion, ChatCompletionChunk, Completion, Error, ErrorBody, Model, ModelList
from loray.api.status import Status
from loray.errors import ContextLengthExceeded, EngineError, LorayError, NotFoundError, Overloaded, RequestError

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]

R = TypeVar("R", bound=BaseModel)


class HttpClient:
    """The connection of a typed client; closed at the end of a `with` block. `timeout` None: the class's own."""

    _prefix = ""
    _timeout = httpx.Timeout(600.0, connect=5.0)

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: httpx.Timeout | float | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/") + self._prefix
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        timeout = self._timeout if timeout is None else timeout
        self._http = httpx.Client(base_url=self.base_url, headers=headers, timeout=timeout, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()


class LorayClient(HttpClient):
    """Errors come back as those that were raised: RequestError, ContextLengthExceeded, NotFoundError, Overloaded with
    `retry_after_s`, and EngineError where the server fails or does not answer.
    """

    # -- models and state ---------------------------------------------------------------------------------------------

    def models(self) -> list[Model]:
        """The base first, then adapters by name."""
        return self._get("/v1/models", ModelList).data

    def model(self, model: str) -> Model:
        """By `name`, `name@alias` or `name@version`. Raises NotFoundError."""
        return self._get(f"/v1/models/{model}", Model)

    def status(self) -> Status:
        return self._get("/status", Status)

    def is_healthy(self) -> bool:
        """Whether the server answers, and a replica behind it."""
        try:
            self._request("GET", "/health")
        except LorayError:
            return False
        return True

    # -- generation ---------------------------------------------------------------------------------------------------

    def complete(self, model: str, prompt: Prompt, **options: Any) -> Completion:
        return self._post("/v1/completions", {"model": model, "prompt": prompt} | options, Completion)

    def chat(self, model: str, messages: Messages, **options: Any) -> ChatCompletion:
        return self._post("/v1/chat/completions", {"model": model, "messages": messages} | options, ChatCompletion)

    def stream_complete(self, model: str, prompt: Prompt, **options: Any) -> Iterator[Completion]:
        """Chunks as they come. Closing the iterator cancels the request."""
        return self._stream("/v1/completions", {"model": model, "prompt": prompt} | options, Completion)

    def stream_chat(self, model: str, messages: Messages, **options: Any) -> Iterator[ChatCompletionChunk]:
        """Chunks as they come. Closing the iterator cancels the request."""
        body = {"model": model, "messages": messages} | options
        return self._stream("/v1/chat/completions", body, ChatCompletionChunk)

    # -- HTTP ---------------------------------------------------------------------------------------------------------

    def _get(self, path: str, schema: type[R]) -> R:
        return _read(schema, self._request("GET", path).content)

    def _post(self, path: str, body: dict[str, Any], schema: type[R]) -> R:
        return _read(schema, self._request("POST", path, json=body).content)

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as e:
            raise self._unreachable(e) from e
        if not response.is_success:
            raise _error_of(response)
        return response

    def _stream(self, path: str, body: dict[str, Any], schema: type[R]) -> Iterator[R]:
        try:
            with self._http.stream("POST", path, json=body | {"stream": True}) as response:
                if not response.is_success:
                    response.read()
                    raise _error_of(response)
                for line in response.iter_lines():
                    data = line.removeprefix("data: ")
                    if data == line:
                        continue
                    if data == "[DONE]":
                        return
                    if data.startswith('{"error"'):
                        raise _translate(_read(ErrorBody, data).error, status=500, retry_after=None)
                    yield _read(schema, data)
                raise EngineError("the stream ended early; send the request again")
        except httpx.HTTPError as e:
            raise self._unreachable(e) from e

    def _unreachable(self, error: httpx.HTTPError) -> EngineError:
        reason = str(error) or type(error).__name__
        return EngineError(f"no answer from {self.base_url} ({reason}); `loray status` says what is being served")


def _read(schema: type[R], data: str | bytes) -> R:
    try:
        return schema.model_validate_json(data)
    except ValidationError as e:
        raise EngineError(f"the server's answer is not a {schema.__name__}: {data[:200]!r}") from e


def _error_of(response: httpx.Response) -> LorayError:
    try:
        error = ErrorBody.model_validate_json(response.content).error
    except ValidationError:  # a proxy in between, for instance
        error = Error(message=f"HTTP {response.status_code}: {response.text[:200]}", type="server_error")
    return _translate(error, response.status_code, response.headers.get("retry-after"))


def _translate(error: Error, status: int, retry_after: str | None) -> LorayError:
    if error.code == "context_length_exceeded":
        return ContextLengthExceeded(error.message, error.param)
    if status == 404:
        return NotFoundError(error.message)
    if status == 429 or error.code == "overloaded":
        seconds = float(retry_after) if retry_after and retry_after.isdigit() else 1.0
        return Overloaded(error.message, seconds)
    if status < 500:
        return RequestError(error.message, error.param)
    return EngineError(error.message)
