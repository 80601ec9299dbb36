"""The routes, each with its permission, its body and its answers.

A model is served as soon as the catalog has it, and replicas load and evict adapters by themselves. So the routes that
load and unload an adapter say whether the name can be requested, and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
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
from loray.errors import RequestError, ResponseNotFound, shown
from loray.policy.auth import check
from loray.schemas.anthropic import (
    CountTokensRequest,
    ErrorAnswer,
    MessagesRequest,
    TokenCount,
    model_info,
)
from loray.schemas.anthropic import chat_request as chat_of_message
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
from loray.schemas.openai.embeddings import EmbeddingList, EmbeddingRequest
from loray.schemas.openai.fields import Body, UnknownFields, reading
from loray.schemas.openai.responses_api import NOT_STORED, ResponsesRequest, chat_request
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
from serve_apps.gateway import anthropic
from serve_apps.gateway.answers.headers import RequestHeaders, is_strict, tell_ignored
from serve_apps.gateway.gateway import Gateway
from serve_apps.http import extend_openapi, parse_json, read, schema_reference

B = TypeVar("B", bound=Body)
M = TypeVar("M", bound=CountTokensRequest)
T = TypeVar("T")
E = TypeVar("E", bound=Callable[..., object])

_ANSWERS = "loray_answers"
_IGNORED = "ignored_fields"  # of a request's state
_ANTHROPIC_PAGE = 20  # models, unless its clients ask for another number
_TOKENIZING = 0.25  # of these tokens count as tokens a minute: no engine computes them

JSON, BINARY = "application/json", "application/octet-stream"
_JSON, _TEXT, _EVENTS = JSON, "text/plain", "text/event-stream"
_WITH_KEY = (401, 403, 500, 503)
_ABOUT_MODEL = (400, 404, *_WITH_KEY)
_WITH_BODY = (408, 413, *_ABOUT_MODEL)
_TOKENIZES = (429, *_WITH_BODY)
_GENERATES = (501, 504, *_TOKENIZES)
_COUNTS = (402, 529, *(status for status in _TOKENIZES if status != 503))  # in Anthropic's form
_WRITES = (501, 504, *_COUNTS)
_HEALTH = (500, 503)
ABOUT_OWN = (429, *_ABOUT_MODEL)  # what a tenant keeps here
WITH_FORM = (429, *_WITH_BODY)


@dataclass(frozen=True, slots=True)
class Answers:
    """What the OpenAPI document says of an endpoint, which this stands over, below its route's decorator.

    errors   the statuses of refusals and failures
    content  media type → its model; None: text, or an object without a model of ours
    body     the model of the request's body, or one of several
    limited  whether limits of keys apply, which headers tell
    error    the model of errors
    """

    errors: tuple[int, ...]
    content: Mapping[str, type[BaseModel] | None]
    body: type[Body] | tuple[type[Body], ...] = ()
    limited: bool = False
    error: type[BaseModel] = ErrorBody

    def __call__(self, endpoint: E) -> E:
        setattr(endpoint, _ANSWERS, self)
        return endpoint


def create_routes(gateway: Gateway) -> list[BaseRoute]:
    """Make the routes of one gateway."""
    router = APIRouter(route_class=GatewayRoute)

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

    @router.post("/v1/messages")
    @may("infer")
    @Answers(_WRITES, {_JSON: None, _EVENTS: None}, MessagesRequest, limited=True, error=ErrorAnswer)
    async def messages(request: Request) -> Response:
        """Anthropic's Messages API, as another form of a chat completion; streamed as its events."""
        headers = RequestHeaders.of(request)
        return await gateway.messages(*await parsed(request, partial(_with_chat, MessagesRequest)), headers)

    @router.post("/v1/messages/count_tokens")
    @may("infer")
    @Answers(_COUNTS, {_JSON: TokenCount}, CountTokensRequest, error=ErrorAnswer)
    async def count_tokens(request: Request) -> Response:
        """Anthropic's: the number of tokens of a message's prompt."""
        body, chat = await parsed(request, partial(_with_chat, CountTokensRequest))
        principal = principal_of(request)
        target = await gateway.model(body.model, principal)
        num_tokens = len(await gateway.chat_prompt(chat, target, principal.tenant))
        gateway.accounts.charge(principal, _TOKENIZING * num_tokens)
        return Response(TokenCount(input_tokens=num_tokens).to_json(), media_type=_JSON)

    @router.post("/v1/embeddings")
    @may("infer")
    @Answers(_GENERATES, {_JSON: EmbeddingList}, EmbeddingRequest, limited=True)
    async def embeddings(request: Request) -> Response:
        """OpenAI's embeddings of texts or token ids, with vLLM's further fields, for bases that pool."""
        headers = RequestHeaders.of(request)
        return await gateway.embeddings(await parsed(request, partial(parse, EmbeddingRequest)), headers)

    @router.get("/v1/responses/{id}")
    @router.delete("/v1/responses/{id}")
    @router.post("/v1/responses/{id}/cancel")
    @router.get("/v1/responses/{id}/input_items")
    @may("infer")
    @Answers((404, *_WITH_KEY), {_JSON: None})
    async def stored_response(id: str) -> Response:
        """Always 404: no response is stored."""
        raise ResponseNotFound(f"there is no response {shown(id)}: {NOT_STORED}")

    @router.post("/invocations")
    @may("infer")
    @Answers(
        _GENERATES,
        {_JSON: None, _EVENTS: None},
        (ChatCompletionRequest, CompletionRequest, ResponsesRequest, EmbeddingRequest),
        limited=True,
    )
    async def invocations(request: Request) -> Response:
        """SageMaker's one path for all: `messages` are a chat completion, `prompt` a completion, `input`
        embeddings of a base that pools, else a response.
        """
        forms = {"messages": chat_completions, "prompt": completions, "input": responses}

        def form_and_model(body: object) -> tuple[str, object]:
            given = [name for name in forms if isinstance(body, dict) and body.get(name) is not None]
            if not isinstance(body, dict) or len(given) != 1:
                raise RequestError("give one of messages (a chat), prompt (a completion) and input", "messages")
            return given[0], body.get("model")

        form, model = await _converted_body(request, form_and_model)
        if form == "input" and isinstance(model, str):
            target = await gateway.model(model, principal_of(request))
            if target.base.pooling is not None:
                return await embeddings(request)
        return await forms[form](request)

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
            ids = await gateway.chat_prompt(chat, target, tenant)
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
        """The base and the adapters that the caller sees, in pages; 60 a minute for a key. To clients that send
        anthropic-version in Anthropic's form, whose pages begin with `after_id`.
        """
        principal = principal_of(request)
        gateway.models.count_list(principal)
        if anthropic.is_spoken(request.scope):
            if "before_id" in request.query_params:
                raise RequestError("before_id is not supported; go through the pages with after_id", "before_id")
            after = request.query_params.get("after_id", after)
            page = gateway.models.page(principal, after, limit or _ANTHROPIC_PAGE, form=model_info)
        else:
            page = gateway.models.page(principal, after, limit)
        return StreamingResponse(page, media_type=_JSON)

    @router.get("/v1/models/{model:path}")
    @may("read")
    @Answers(_ABOUT_MODEL, {_JSON: Model})
    async def model(request: Request, model: str) -> Response:
        """One model, by `name`, `name@alias` or `name@version`."""
        card = await gateway.models.card(model, principal_of(request))
        form = model_info(card) if anthropic.is_spoken(request.scope) else card
        return Response(form.to_json(), media_type=_JSON)

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


class GatewayRoute(APIRoute):
    """A route whose answer names the fields of its body that were ignored."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            response = await handle(request)
            if (ignored := getattr(request.state, _IGNORED, None)) is not None:
                tell_ignored(response.headers, ignored)
            return response

        return answer


async def parsed_body(request: Request, schema: type[B]) -> B:
    """Return the body of a request. Raises RequestError."""
    return await _converted_body(request, partial(parse, schema))


async def _converted_body(request: Request, convert: Callable[[object], T]) -> T:
    """Return what `convert` makes of the decoded JSON, in a thread if the body is long. Unknown fields are ignored,
    unless the request or the deployment has them refused.
    """
    gateway: Gateway = request.app.state.gateway
    unknown = UnknownFields(refuse=gateway.refuses_unknown_fields or is_strict(request.headers))
    converted = await read(request, partial(_convert, convert, unknown))
    if unknown.ignored:
        setattr(request.state, _IGNORED, unknown.ignored)
        gateway.counted.ignored(unknown.ignored)
    return converted


def _convert(convert: Callable[[object], T], unknown: UnknownFields, raw: bytes) -> T:
    try:
        body = parse_json(raw)
    except ValueError as e:
        raise RequestError(f"the request body is not valid JSON: {e}") from e
    with reading(unknown):
        return convert(body)


def _with_chat(schema: type[M], body: object) -> tuple[M, ChatCompletionRequest]:
    request = parse(schema, body)
    return request, chat_of_message(request)


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
_NO_RETRY = {"x-should-retry": "`false` where the same request is refused for long, as by a budget that is used up"}
_HEADERS = {401: {"WWW-Authenticate": "`Bearer`"}, 429: _RETRY | _NO_RETRY, 503: _RETRY}
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
    bodies = {at: about.body if isinstance(about.body, tuple) else (about.body,) for at, about in answers.items()}
    models: set[type[BaseModel]] = {about.error for about in answers.values()}
    for about in answers.values():
        models.update(model for model in about.content.values() if model is not None)

    def edit(document: dict[str, Any]) -> None:
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                operation["responses"] = _responses(answers[path, method])
        for (path, method), of_path in bodies.items():
            forms = [schema_reference(body.__name__) for body in of_path]
            if forms:
                schema = forms[0] if len(forms) == 1 else {"anyOf": forms}
                document["paths"][path][method]["requestBody"] = {
                    "required": True,
                    "content": {_JSON: {"schema": schema}},
                }
        for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's form of errors
            document["components"]["schemas"].pop(unused, None)
        describe_keys(document, permissions)

    schemas: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (body, "validation") for body in dict.fromkeys(body for of_path in bodies.values() for body in of_path)
    ]
    schemas += [(m, "serialization") for m in sorted(models, key=lambda model: model.__name__)]
    extend_openapi(app, schemas, edit)


def _responses(about: Answers) -> dict[str, Any]:
    content = {kind: _media_type(kind, model) for kind, model in about.content.items()}
    described = {"200": _response(200, content, _OF_LIMITS if about.limited else {})}
    error = {_JSON: {"schema": schema_reference(about.error.__name__)}}
    for status in sorted(about.errors):
        headers = _HEADERS.get(status, {}) | (_OF_LIMITS if about.limited and status == 429 else {})
        described[str(status)] = _response(status, error, headers)
    return described


def _media_type(kind: str, model: type[BaseModel] | None) -> dict[str, Any]:
    if model is not None:
        return {"schema": schema_reference(model.__name__)}
    if kind == _EVENTS:
        return {"itemSchema": _EVENT}  # of OpenAPI 3.2, in documents of 3.1 as FastAPI has it
    return {"schema": {"type": "object" if kind == _JSON else "string"}}


def _response(status: int, content: dict[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
    phrase = "Overloaded" if status == anthropic.OVERLOADED else HTTPStatus(status).phrase
    described: dict[str, Any] = {"description": phrase, "content": content}
    if headers:
        described["headers"] = {
            name: {"description": meaning, "schema": {"type": "string"}} for name, meaning in headers.items()
        }
    return described
