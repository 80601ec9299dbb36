"""Routes that generate."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from loray.api.openai import ChatCompletionRequest, CompletionRequest, parse
from loray.api.openai.body import Body
from loray.api.openai.responses_api import ResponsesRequest, chat_request
from serve_apps.gateway.answers.headers import RequestHeaders
from serve_apps.gateway.gateway import Gateway
from serve_apps.gateway.routes.bodies import body_of, converted_body

BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/responses": ResponsesRequest,
}


def create_router(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    def heard(request: Request) -> RequestHeaders:
        headers = RequestHeaders.of(request)
        gateway.accounts.check(headers.principal)  # before the body is read
        return headers

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """OpenAI's completions of texts or token ids, with vLLM's further fields; streamed as server-sent events."""
        headers = heard(request)
        return await gateway.completions(await body_of(request, CompletionRequest), headers)

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """OpenAI's chat completions with tools and structured output; streamed as server-sent events."""
        headers = heard(request)
        return await gateway.chat_completions(await body_of(request, ChatCompletionRequest), headers)

    @router.post("/v1/responses")
    async def responses(request: Request) -> Response:
        """OpenAI's Responses API, as another form of a chat completion; nothing is stored."""
        headers = heard(request)
        return await gateway.responses(*await converted_body(request, _response_and_chat), headers)

    return router


def _response_and_chat(body: object) -> tuple[ResponsesRequest, ChatCompletionRequest]:
    request = parse(ResponsesRequest, body)
    return request, chat_request(request)
