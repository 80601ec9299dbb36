"""vLLM's /tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from loray.api.openai import ChatCompletionRequest, parse
from loray.api.openai.body import Body
from loray.api.openai.vllm.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from serve_apps.gateway.gateway import Gateway
from serve_apps.gateway.routes.bodies import body_of

BODIES: dict[str, type[Body]] = {"/tokenize": TokenizeRequest, "/detokenize": DetokenizeRequest}


def create_router(gateway: Gateway) -> APIRouter:
    router = APIRouter()
    prompts = gateway.prompts

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await body_of(request, TokenizeRequest)
        model = body.model or gateway.directory.base.name
        _, limit = await gateway.model(model)
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            (ids,) = await prompts.texts((body.prompt,), None, special=special)
        else:
            chat = parse(ChatCompletionRequest, body.chat_body(model))
            ids = await prompts.chat(chat.messages, None, special=chat.add_special_tokens)
        answer = TokenizeResponse(count=len(ids), max_model_len=limit, tokens=list(ids))
        if body.return_token_strs:
            answer = answer.model_copy(update={"token_strs": await prompts.token_strings(ids)})
        return Response(answer.to_json(), media_type="application/json")

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await body_of(request, DetokenizeRequest)
        await gateway.model(body.model or gateway.directory.base.name)
        answer = DetokenizeResponse(prompt=await prompts.decode(body.tokens))
        return Response(answer.to_json(), media_type="application/json")

    return router
