"""vLLM's /tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from loray.api.openai import ChatCompletionRequest, parse
from loray.api.openai.body import Body
from loray.api.openai.vllm.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from serve_apps.access import may, principal_of
from serve_apps.gateway.gateway import Gateway
from serve_apps.gateway.routes.bodies import body_of, converted_body

_PART = 0.25  # of these tokens count as tokens a minute: no engine computes them

BODIES: dict[str, type[Body]] = {"/tokenize": TokenizeRequest, "/detokenize": DetokenizeRequest}


def create_router(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    def tokenize_and_chat(given: object) -> tuple[TokenizeRequest, ChatCompletionRequest | None]:
        body = parse(TokenizeRequest, given)
        model = body.model or next(iter(gateway.bases))
        return body, None if body.messages is None else parse(ChatCompletionRequest, body.chat_body(model))

    @router.post("/tokenize")
    @may("infer")
    async def tokenize(request: Request) -> Response:
        """vLLM's: a text or a chat as token ids."""
        body, chat = await converted_body(request, tokenize_and_chat)
        principal = principal_of(request)
        target, tenant = await gateway.model(body.model, principal), principal.tenant
        prompts = target.base.prompts
        if chat is not None:
            ids = await prompts.chat(chat, await gateway.dialect(chat, target, tenant), None, tenant)
        else:
            special = body.add_special_tokens is not False
            (ids,) = await prompts.texts((body.prompt or "",), None, tenant, special=special)
        # Without a check of what may be hundreds of thousands of tokens.
        answer = TokenizeResponse.model_construct(count=len(ids), max_model_len=target.limit, tokens=list(ids))
        if body.return_token_strs:
            answer = answer.model_copy(update={"token_strs": await prompts.token_strings(ids, tenant)})
        gateway.accounts.charge(principal, _PART * len(ids))
        return Response(answer.to_json(), media_type="application/json")

    @router.post("/detokenize")
    @may("infer")
    async def detokenize(request: Request) -> Response:
        """vLLM's: token ids as a text."""
        body = await body_of(request, DetokenizeRequest)
        principal = principal_of(request)
        target = await gateway.model(body.model, principal)
        answer = DetokenizeResponse(prompt=await target.base.prompts.decode(body.tokens, principal.tenant))
        gateway.accounts.charge(principal, _PART * len(body.tokens))
        return Response(answer.to_json(), media_type="application/json")

    return router
