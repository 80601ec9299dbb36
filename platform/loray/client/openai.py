"""A typed client of the OpenAI-compatible API: models, completions, chat completions, status.

    with LorayClient("http://127.0.0.1:8000") as client:
        for chunk in client.stream_chat("tone@prod", [{"role": "user", "content": "Hello"}]):
            ...

Sampling options are the API's own fields (`temperature`, `max_tokens`, `stop`, …).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx
from pydantic import ValidationError

from loray.client.http import HttpClient, R
from loray.errors import (
    ContextLengthExceeded,
    EngineError,
    GrammarTooExpensive,
    LorayError,
    NotFoundError,
    Overloaded,
    PermissionDenied,
    RequestError,
    Unauthenticated,
)
from loray.schemas.openai import ChatCompletion, ChatCompletionChunk, Completion, Error, ErrorBody, Model, ModelList
from loray.schemas.status import Status

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


class LorayClient(HttpClient):
    """A client that raises the errors which the server raised: Unauthenticated, PermissionDenied, RequestError,
    ContextLengthExceeded, NotFoundError, Overloaded with `retry_after_s`, and EngineError if the server fails or does
    not answer.
    """

    # -- models and state ---------------------------------------------------------------------------------------------

    def models(self) -> list[Model]:
        """The base, then the adapters by name."""
        return self._ask(ModelList, "GET", "/v1/models").data

    def model(self, model: str) -> Model:
        """The base or adapter of this name, `name@alias` or `name@version`. Raises NotFoundError."""
        return self._ask(Model, "GET", f"/v1/models/{model}")

    def status(self) -> Status:
        return self._ask(Status, "GET", "/status")

    def metrics(self) -> str:
        """GET /metrics, in Prometheus' text format."""
        return self._request("GET", "/metrics").text

    def is_healthy(self) -> bool:
        """The server and at least one replica answer."""
        try:
            self._request("GET", "/health")
        except LorayError:
            return False
        return True

    # -- generation ---------------------------------------------------------------------------------------------------

    def complete(self, model: str, prompt: Prompt, **options: Any) -> Completion:
        return self._ask(Completion, "POST", "/v1/completions", json={"model": model, "prompt": prompt} | options)

    def chat(self, model: str, messages: Messages, **options: Any) -> ChatCompletion:
        return self._ask(
            ChatCompletion, "POST", "/v1/chat/completions", json={"model": model, "messages": messages} | options
        )

    def stream_complete(self, model: str, prompt: Prompt, **options: Any) -> Iterator[Completion]:
        """Chunks as they arrive. Closing the iterator cancels the request."""
        return self._stream("/v1/completions", {"model": model, "prompt": prompt} | options, Completion)

    def stream_chat(self, model: str, messages: Messages, **options: Any) -> Iterator[ChatCompletionChunk]:
        """Chunks as they arrive. Closing the iterator cancels the request."""
        body = {"model": model, "messages": messages} | options
        return self._stream("/v1/chat/completions", body, ChatCompletionChunk)

    # -- HTTP ---------------------------------------------------------------------------------------------------------

    def _stream(self, path: str, body: dict[str, Any], schema: type[R]) -> Iterator[R]:
        with self._streamed("POST", path, json=body | {"stream": True}) as response:
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data == line:
                    continue
                if data == "[DONE]":
                    return
                if data.startswith('{"error"'):
                    raise _translate(self._read(ErrorBody, data).error, status=500, retry_after=None)
                yield self._read(schema, data)
            raise EngineError("the stream ended early; send the request again")

    def _error_of(self, response: httpx.Response) -> LorayError:
        try:
            error = ErrorBody.model_validate_json(response.content).error
        except ValidationError:  # from a proxy, for instance
            error = Error(message=f"HTTP {response.status_code}: {response.text[:200]}", type="server_error")
        return _translate(error, response.status_code, response.headers.get("retry-after"))


def _translate(error: Error, status: int, retry_after: str | None) -> LorayError:
    for of_request in (ContextLengthExceeded, GrammarTooExpensive):
        if error.code == of_request.code:
            return of_request(error.message, error.param)
    for of_caller in (Unauthenticated, PermissionDenied, NotFoundError):
        if status == of_caller.status:
            return of_caller(error.message)
    if status == 429 or error.code == "overloaded":
        seconds = float(retry_after) if retry_after and retry_after.isdigit() else 1.0
        return Overloaded(error.message, seconds)
    return RequestError(error.message, error.param) if status < 500 else EngineError(error.message)
