"""The routes, each with its permission, its body and its answers.

A model is served as soon as the catalog has it, and replicas load and evict adapters by themselves. So the routes that
load and unload an adapter say whether the name can be requested, and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode
from starlette.routing import BaseRoute

from loray import __version__
from loray.errors import RequestError, shown
from loray.policy.auth import check
from loray.schemas.openai import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    Model,
    ModelList,
    parse,
)
from loray.schemas.openai.fields import Body
from loray.schemas.openai.responses_api import ResponsesRequest, chat_request
from loray.schemas.openai.vllm import (
    DetokenizeRequest,
    DetokenizeResponse,
    LoadLoraRequest,
    TokenizeRequest,
    TokenizeResponse,
    UnloadLoraRequest,
)
from loray.schemas.status import Status
from serve_apps.auth import Permissions, describe_keys, may, principal_of
from serve_apps.deployment import CATALOG_PREFIX
from serve_apps.gateway.answers.headers import RequestHeaders
from serve_apps.gateway.gateway import Gateway
from serve_apps.http import extend_openapi, parse_json, read, schema_reference

B = TypeVar("B", bound=Body)
T = TypeVar("T")
E = TypeVar("E", bound=Callable[..., object])

_ANSWERS = "loray_answers"
_TOKENIZING = 0.25  # of these tokens count as tokens a minute: no engine computes them

JSON, BINARY = "application/json", "application/octet-stream"
_JSON, _TEXT, _EVENTS = JSON, "text/plain", "text/event-stream"
_WITH_KEY = (401, 403, 500, 503)
_ABOUT_MODEL = (400, 404, *_WITH_KEY)
_WITH_BODY = (408, 413, *_ABOUT_MODEL)
_TOKENIZES = (429, *_WITH_BODY)
_GENERATES = (501, 504, *_TOKENIZES)
_HEALTH = (500, 503)
ABOUT_OWN = (429, *_ABOUT_MODEL)  # what a tenant keeps here
WITH_FORM = (429, *_WITH_BODY)


@dataclass(frozen=True, slots=True)
class Answers:
    """What the OpenAPI document says of an endpoint, which this stands over, below its route's decorator.

    errors   the statuses of refusals and failures
    content  media type → its model; None: text, or an object without a model of ours
    body     the model of the request's body
    limited  whether limits of keys apply, which headers tell
    """

    errors: tuple[int, ...]
    content: Mapping[str, type[BaseModel] | None]
    body: type[Body] | None = None
    limited: bool = False

    def __call__(self, endpoint: E) -> E:
        setattr(endpoint, _ANSWERS, self)
        return endpoint


def create_routes(gateway: Gateway) -> list[BaseRoute]:
    """Make the routes of one gateway."""
    router = APIRouter()

    async def parsed(request: Request, convert: Callable[[object], T]) -> T:
        try:
            return await _converted_body(request, convert)
        except RequestError as e:
            if e.param != "model":
                raise
            names = gateway.directory.base_names(principal_of(request))
            raise RequestError(f"{e}: {names and f'{names}, or '}an adapter; GET /v1/models lists them", "model") from e

    @router.post("/v1/completions")
    @may("infer")
    @Answers(_GENERATES, {_JSON: Completion, _EVENTS: None}, CompletionRequest, limited=True)
    async def completions(request: Request) -> Response:
        """OpenAI's completions of texts or token ids, with vLLM's further fields; streamed as server-sent events."""
        headers = RequestHeaders.of(request)
        return await gateway.completions(await parsed(request, partial(parse, CompletionRequest)), headers)

    @router.post("/v1/chat/completions")
    @may("infer")
    @Answers(_GENERATES, {_JSON: ChatCompletion, _EVENTS: None}, ChatCompletionRequest, limited=True)
    async def chat_completions(request: Request) -> Response:
        """OpenAI's chat completions with tools and structured output; streamed as server-sent events."""
        headers = RequestHeaders.of(request)
        return await gateway.chat_completions(await parsed(request, partial(parse, ChatCompletionRequest)), headers)

    @router.post("/v1/responses")
    @may("infer")
    @Answers(_GENERATES, {_JSON: None, _EVENTS: None}, ResponsesRequest, limited=True)
    async def responses(request: Request) -> Response:
        """OpenAI's Responses API, as another form of a chat completion; nothing is stored."""
        headers = RequestHeaders.of(request)
        return await gateway.responses(*await parsed(request, _response_and_chat), headers)

    def tokenize_and_chat(given: object) -> tuple[TokenizeRequest, ChatCompletionRequest | None]:
        body = parse(TokenizeRequest, given)
        model = body.model or next(iter(gateway.bases))
        return body, None if body.messages is None else parse(ChatCompletionRequest, body.chat_body(model))

    @router.post("/tokenize")
    @may("infer")
    @Answers(_TOKENIZES, {_JSON: TokenizeResponse}, TokenizeRequest)
    async def tokenize(request: Request) -> Response:
        """vLLM's: a text or a chat as token ids."""
        body, chat = await _converted_body(request, tokenize_and_chat)
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
        gateway.accounts.charge(principal, _TOKENIZING * len(ids))
        return Response(answer.to_json(), media_type="application/json")

    @router.post("/detokenize")
    @may("infer")
    @Answers(_TOKENIZES, {_JSON: DetokenizeResponse}, DetokenizeRequest)
    async def detokenize(request: Request) -> Response:
        """vLLM's: token ids as a text."""
        body = await parsed_body(request, DetokenizeRequest)
        principal = principal_of(request)
        target = await gateway.model(body.model, principal)
        answer = DetokenizeResponse(prompt=await target.base.prompts.decode(body.tokens, principal.tenant))
        gateway.accounts.charge(principal, _TOKENIZING * len(body.tokens))
        return Response(answer.to_json(), media_type="application/json")

    async def check_own(request: Request, name: str) -> None:
        principal = principal_of(request)
        adapter = (await gateway.model(name, principal)).adapter
        if adapter is None:
            raise RequestError(f"{name!r} is a base model, not an adapter", "lora_name")
        check(principal, "publish", gateway.directory.entry(adapter).tenant)

    @router.post("/v1/load_lora_adapter")
    @may("publish")
    @Answers(_WITH_BODY, {_TEXT: None}, LoadLoraRequest)
    async def load_lora_adapter(request: Request) -> Response:
        """vLLM's, for deployment tools: 200 where the catalog has the adapter; a path is refused."""
        body = await parsed_body(request, LoadLoraRequest)
        if body.lora_path not in (None, "", body.lora_name):
            raise RequestError(
                f"lora_path {shown(body.lora_path)}: adapters come from the catalog alone; publish the folder with "
                f"`loray adapters import FOLDER --name {body.lora_name[:96]}`, then request it by that name",
                "lora_path",
            )
        await check_own(request, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' can be requested.")

    @router.post("/v1/unload_lora_adapter")
    @may("publish")
    @Answers(_WITH_BODY, {_TEXT: None}, UnloadLoraRequest)
    async def unload_lora_adapter(request: Request) -> Response:
        """vLLM's, for deployment tools: 200 where the catalog has the adapter, which stays."""
        body = await parsed_body(request, UnloadLoraRequest)
        await check_own(request, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' is evicted when its memory is needed.")

    @router.get("/v1/models", response_class=JSONResponse)
    @may("read")
    @Answers((400, 429, *_WITH_KEY), {_JSON: ModelList})
    async def models(
        request: Request,
        after: Annotated[str | None, Query(description="only models after this one")] = None,
        limit: Annotated[int | None, Query(ge=1, description="at most as many models (and 10,000)")] = None,
    ) -> Response:
        """The base and the adapters that the caller sees, in pages; 60 a minute for a key."""
        principal = principal_of(request)
        gateway.models.count_list(principal)
        return StreamingResponse(gateway.models.page(principal, after, limit), media_type="application/json")

    @router.get("/v1/models/{model:path}")
    @may("read")
    @Answers(_ABOUT_MODEL, {_JSON: Model})
    async def model(request: Request, model: str) -> Response:
        """One model, by `name`, `name@alias` or `name@version`."""
        card = await gateway.models.card(model, principal_of(request))
        return Response(card.to_json(), media_type="application/json")

    @router.get("/health")
    @router.get("/ping")
    @router.post("/ping")
    @may("open")
    @Answers(_HEALTH, {_JSON: None})
    async def health() -> Response:
        """200 if a replica of any base answers that its engine runs, or a base is asleep and the next request starts
        one.
        """
        return await gateway.health()

    @router.get("/console", include_in_schema=False)
    @may("open")
    async def console() -> Response:
        return RedirectResponse(f"{CATALOG_PREFIX}/console")

    @router.get("/version")
    @may("open")
    @Answers((500,), {_JSON: None})
    async def version() -> Response:
        """The server's version."""
        return JSONResponse({"version": __version__})

    @router.get("/status")
    @may("observe")
    @Answers(_WITH_KEY, {_JSON: Status})
    async def status() -> Status:
        """Tell what is served: replicas, adapters in memory, queues, autoscaling, the catalog's snapshot."""
        return await gateway.status()

    @router.get("/metrics")
    @may("observe")
    @Answers(_WITH_KEY, {_TEXT: None, "application/openmetrics-text": None})
    async def metrics(request: Request) -> Response:
        """Metrics of all gateways and replicas, for Prometheus."""
        return await gateway.metrics(request.headers.get("accept", ""))

    return router.routes


async def parsed_body(request: Request, schema: type[B]) -> B:
    """Return the body of a request. Raises RequestError."""
    return await _converted_body(request, partial(parse, schema))


async def _converted_body(request: Request, convert: Callable[[object], T]) -> T:
    """Return what `convert` makes of the decoded JSON, in a thread if the body is long."""
    return await read(request, partial(_convert, convert))


def _convert(convert: Callable[[object], T], raw: bytes) -> T:
    try:
        body = parse_json(raw)
    except ValueError as e:
        raise RequestError(f"the request body is not valid JSON: {e}") from e
    return convert(body)


def _response_and_chat(body: object) -> tuple[ResponsesRequest, ChatCompletionRequest]:
    request = parse(ResponsesRequest, body)
    return request, chat_request(request)


# -- The OpenAPI document --

_EVENT = {  # of a stream of server-sent events
    "type": "object",
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
    "required": ["data"],
}
_RETRY = {
    "Retry-After": "seconds until it is worth while to ask again",
    "Retry-After-Ms": "the same in milliseconds",
}
_HEADERS = {401: {"WWW-Authenticate": "`Bearer`"}, 429: _RETRY, 503: _RETRY}
_OF_LIMITS = {
    f"x-ratelimit-{what}-{kind}": f"{meaning} of {kind}, where the key or its tenant has one"
    for kind in ("requests", "tokens")
    for what, meaning in (("limit", "the limit"), ("remaining", "what is left"), ("reset", "time to the full limit"))
}


def describe(app: FastAPI, permissions: Permissions) -> None:
    """Give each operation its answers and the schema of its body, and say whether it needs a key."""
    shown = [route for route in app.routes if isinstance(route, APIRoute) and route.include_in_schema]
    answers: dict[tuple[str, str], Answers] = {
        (route.path_format, method.lower()): getattr(route.endpoint, _ANSWERS)
        for route in shown
        for method in route.methods or ()
    }
    bodies = {at: about.body for at, about in answers.items() if about.body is not None}
    models: set[type[BaseModel]] = {ErrorBody}
    for about in answers.values():
        models.update(model for model in about.content.values() if model is not None)

    def edit(document: dict[str, Any]) -> None:
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                operation["responses"] = _responses(answers[path, method])
        for (path, method), body in bodies.items():
            document["paths"][path][method]["requestBody"] = {
                "required": True,
                "content": {_JSON: {"schema": schema_reference(body.__name__)}},
            }
        for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's form of errors
            document["components"]["schemas"].pop(unused, None)
        describe_keys(document, permissions)

    schemas: list[tuple[type[BaseModel], JsonSchemaMode]] = [(body, "validation") for body in bodies.values()]
    schemas += [(m, "serialization") for m in sorted(models, key=lambda model: model.__name__)]
    extend_openapi(app, schemas, edit)


def _responses(about: Answers) -> dict[str, Any]:
    content = {kind: _media_type(kind, model) for kind, model in about.content.items()}
    described = {"200": _response(HTTPStatus.OK, content, _OF_LIMITS if about.limited else {})}
    error = {_JSON: {"schema": schema_reference(ErrorBody.__name__)}}
    for status in sorted(about.errors):
        headers = _HEADERS.get(status, {}) | (_OF_LIMITS if about.limited and status == 429 else {})
        described[str(status)] = _response(HTTPStatus(status), error, headers)
    return described


def _media_type(kind: str, model: type[BaseModel] | None) -> dict[str, Any]:
    if model is not None:
        return {"schema": schema_reference(model.__name__)}
    if kind == _EVENTS:
        return {"itemSchema": _EVENT}  # of OpenAPI 3.2, in documents of 3.1 as FastAPI has it
    return {"schema": {"type": "object" if kind == _JSON else "string"}}


def _response(status: HTTPStatus, content: dict[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
    described: dict[str, Any] = {"description": status.phrase, "content": content}
    if headers:
        described["headers"] = {
            name: {"description": meaning, "schema": {"type": "string"}} for name, meaning in headers.items()
        }
    return described
