"""Routes that generate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from loray.api.openai import ChatCompletionRequest, CompletionRequest, parse
from loray.api.openai.body import Body
from loray.api.openai.responses_api import ResponsesRequest, chat_request
from loray.errors import RequestError
from serve_apps.access import may, principal_of
from serve_apps.gateway.answers.headers import RequestHeaders
from serve_apps.gateway.gateway import Gateway
from serve_apps.gateway.routes.bodies import converted_body

T = TypeVar("T")

BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/responses": ResponsesRequest,
}


def create_router(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    async def parsed(request: Request, convert: Callable[[object], T]) -> T:
        try:
            return await converted_body(request, convert)
        except RequestError as e:
            if e.param != "model":
                raise
            names = gateway.directory.base_names(principal_of(request))
            raise RequestError(f"{e}: {names and f'{names}, or '}an adapter; GET /v1/models lists them", "model") from e

    @router.post("/v1/completions")
    @may("infer")
    async def completions(request: Request) -> Response:
        """OpenAI's completions of texts or token ids, with vLLM's further fields; streamed as server-sent events."""
        headers = RequestHeaders.of(request)
        return await gateway.completions(await parsed(request, partial(parse, CompletionRequest)), headers)

    @router.post("/v1/chat/completions")
    @may("infer")
    async def chat_completions(request: Request) -> Response:
        """OpenAI's chat completions with tools and structured output; streamed as server-sent events."""
        headers = RequestHeaders.of(request)
        return await gateway.chat_completions(await parsed(request, partial(parse, ChatCompletionRequest)), headers)

    @router.post("/v1/responses")
    @may("infer")
    async def responses(request: Request) -> Response:
        """OpenAI's Responses API, as another form of a chat completion; nothing is stored."""
        headers = RequestHeaders.of(request)
        return await gateway.responses(*await parsed(request, _response_and_chat), headers)

    return router


def _response_and_chat(body: object) -> tuple[ResponsesRequest, ChatCompletionRequest]:
    request = parse(ResponsesRequest, body)
    return request, chat_request(request)
