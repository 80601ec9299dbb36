"""The HTTP API: OpenAI's completions, chat completions and models; health, status and metrics."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from loray import __version__
from loray.api.openai import ChatCompletionRequest, ChatFormat, CompletionFormat, CompletionRequest, parse
from loray.api.openai.formats import Choice, ResponseFormat, usage_of
from loray.api.openai.requests import GenerationRequest
from loray.api.status import CatalogStatus, ReplicaStatus, Status, total
from loray.engine.pool.pool import cut_pool
from loray.errors import ContextLengthExceeded, EngineError, RequestError
from loray.spec import AdapterRef, GenerateRequest, ServeSpec
from serve_apps.exposition import CountRequests, GatewayMetrics, encode
from serve_apps.gateway.directory import ModelDirectory
from serve_apps.gateway.echo import echoed
from serve_apps.gateway.engines import Engines, Part, merge
from serve_apps.gateway.gateway import errors
from serve_apps.gateway.openapi import describe_bodies
from serve_apps.gateway.prompts import PromptEncoder

_TENANT_HEADER = "x-tenant-id"  # for a proxy that knows who is calling; it overrides what the body says
_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Gateway:
    """Checks and tokenises a request, resolves its model once, and turns deltas into OpenAI's answers."""

    def __init__(self, spec: ServeSpec, directory: ModelDirectory, prompts: PromptEncoder, engines: Engines) -> None:
        self.spec, self.directory = spec, directory
        self._prompts, self._engines = prompts, engines
        _, num_blocks = cut_pool(spec, directory.base.config)
        self._pool_tokens = num_blocks * spec.block_tokens
        self.counted = GatewayMetrics()

    @property
    def _fingerprint(self) -> str:
        return f"loray-{__version__}-{self.directory.base.fingerprint[:12]}"

    # -- generation ---------------------------------------------------------------------------------------------------

    async def completions(self, body: object, tenant: str | None = None) -> Response:
        request = parse(CompletionRequest, body)
        adapter = await self.directory.resolve(request.model)
        prompts = await self._prompts.texts(request.prompt)
        answer = CompletionFormat(
            _new_id("cmpl"), int(time.time()), request.model, self._fingerprint, request.include_usage
        )
        return await self._answer(request, adapter, prompts, answer, "prompt", tenant)

    async def chat_completions(self, body: object, tenant: str | None = None) -> Response:
        request = parse(ChatCompletionRequest, body)
        adapter = await self.directory.resolve(request.model)
        prompt = await self._prompts.chat(request.messages)
        answer = ChatFormat(
            _new_id("chatcmpl"), int(time.time()), request.model, self._fingerprint, request.include_usage
        )
        return await self._answer(request, adapter, [prompt], answer, "messages", tenant)

    async def _answer(
        self,
        request: GenerationRequest,
        adapter: AdapterRef | None,
        prompts: Sequence[tuple[int, ...]],
        answer: CompletionFormat | ChatFormat,
        param: str,
        tenant: str | None,
    ) -> Response:
        config = self.directory.base.config
        limit = self.limit(config.max_position_embeddings if adapter is None else adapter.context_length)
        jobs = [
            GenerateRequest(
                request_id=f"{answer.id}-{i * request.n + choice}",
                prompt_ids=prompt,
                params=request.sampling(max_tokens=_max_tokens(request, len(prompt), limit, param), choice=choice),
                adapter=adapter,
                tenant=tenant or request.user or "",
                priority=request.priority,
                ttft_slo_s=request.ttft_slo_s,
            )
            for i, prompt in enumerate(prompts)
            for choice in range(request.n)
        ]
        streams = [self._engines.generate(job, fit=request.asked_max_tokens is None) for job in jobs]
        if isinstance(request, CompletionRequest) and request.echo:
            echoes = [partial(self._prompts.echo, prompt) for prompt in request.prompt for _ in range(request.n)]
            streams = [echoed(stream, echo, request) for stream, echo in zip(streams, echoes, strict=True)]
        parts = merge(streams)
        headers = {"X-Request-Id": answer.id}
        choices = [Choice() for _ in jobs]
        if request.stream:
            try:
                first = await anext(parts)  # before the status is sent: what goes wrong until here still has its own
            except BaseException:
                await parts.aclose()
                raise
            events = _events(first, parts, choices, answer, request)
            return EventStream(events, parts, headers=headers | _SSE_HEADERS)
        async with aclosing(parts):
            async for index, delta in parts:
                choices[index].add(delta)
        body = answer.whole(choices, usage_of(choices, request.n))
        return Response(body.to_json(), media_type="application/json", headers=headers)

    def limit(self, context_length: int) -> int:
        """Tokens of prompt and answer that can be served: the model's context, the spec's and the pool's limit.

        An adapter takes its share of the pool too; how much, its replica knows, and has the last word.
        """
        return min(filter(None, (context_length, self.spec.max_model_len, self._pool_tokens)))

    # -- looking in ---------------------------------------------------------------------------------------------------

    async def health(self) -> Response:
        if not await self._engines.healthy():
            raise EngineError("no replica answers; `loray status` says more")
        return Response('{"status":"ok"}', media_type="application/json")

    async def status(self) -> Status:
        labels = self.directory.labels()
        replicas = []
        for stats in await self._engines.stats():
            named = {
                field: tuple(labels.get(digest, digest[:12]) for digest in stats[field])
                for field in ("adapters_in_pool", "adapters_on_host")
            }
            replicas.append(ReplicaStatus.model_validate(stats | named))
        scaling = None if self.spec.autoscaling is None else await self._engines.autoscaling()
        wanted = self.spec.min_replicas if scaling is None else scaling.target
        healthy = len(replicas) >= wanted and self.directory.failure is None
        return Status(
            status="ok" if healthy else "degraded",
            model=self.directory.base.name,
            spec=self.spec,
            catalog=CatalogStatus(num_adapters=self.directory.num_adapters, failure=self.directory.failure),
            replicas=tuple(replicas),
            totals=total(tuple(replicas)),
            autoscaling=scaling,
        )

    async def metrics(self, accept: str) -> Response:
        replicas = await self._engines.metrics()
        families = self.counted.families(self.directory, replicas)
        body, content_type = encode(families, accept)
        return Response(body, media_type=content_type)


def create_app(gateway: Gateway) -> FastAPI:
    """The ASGI application; it follows the catalog while it runs."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.directory.refresh()
        watcher = asyncio.create_task(gateway.directory.watch())
        yield
        watcher.cancel()
        gateway.directory.close()

    app = FastAPI(title="loray", version=__version__, lifespan=lifespan)
    errors.install(app)
    app.add_middleware(CountRequests, metrics=gateway.counted)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await gateway.completions(await _json(request), request.headers.get(_TENANT_HEADER))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await gateway.chat_completions(await _json(request), request.headers.get(_TENANT_HEADER))

    @app.get("/v1/models")
    async def models() -> Response:
        return Response(gateway.directory.models(gateway.limit).to_json(), media_type="application/json")

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        card = await gateway.directory.model(model, gateway.limit)
        return Response(card.to_json(), media_type="application/json")

    @app.get("/health")
    async def health() -> Response:
        return await gateway.health()

    @app.get("/status")
    async def status() -> Status:
        return await gateway.status()

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return await gateway.metrics(request.headers.get("accept", ""))

    describe_bodies(app, {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatCompletionRequest})
    return app


class EventStream(StreamingResponse):
    """Closes the engine's streams when the client goes away, at once and not when the garbage collector finds them."""

    def __init__(self, events: AsyncGenerator[str, None], parts: AsyncGenerator[Part, None], **options: Any) -> None:
        super().__init__(events, media_type="text/event-stream", **options)
        self._events, self._parts = events, parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._parts.aclose()


async def _events(
    first: Part,
    parts: AsyncGenerator[Part, None],
    choices: Sequence[Choice],
    answer: ResponseFormat,
    request: GenerationRequest,
) -> AsyncGenerator[str, None]:
    """Server-sent events. A failure after the first delta is an event, as the status has long been sent."""
    opened: set[int] = set()
    try:
        async for index, delta in _chain(first, parts):
            choices[index].count(delta)
            if index not in opened and (opening := answer.opening(index)):
                yield _event(opening.to_json())
            opened.add(index)
            if delta.text or delta.finish_reason or delta.logprobs:
                yield _event(answer.chunk(index, delta).to_json())
    except Exception as e:  # noqa: BLE001 - failure_of logs what nobody foresaw; the stream must end with a reason
        yield _event(errors.failure_of(e).body)
        return
    if request.include_usage:
        yield _event(answer.usage_chunk(usage_of(choices, request.n)).to_json())
    yield _event("[DONE]")


async def _chain(first: Part, rest: AsyncGenerator[Part, None]) -> AsyncGenerator[Part, None]:
    yield first
    async for part in rest:
        yield part


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def _max_tokens(request: GenerationRequest, num_prompt_tokens: int, limit: int, param: str) -> int:
    left = limit - num_prompt_tokens
    asked = request.asked_max_tokens
    if left < (asked != 0):
        raise ContextLengthExceeded(
            f"this model's maximum context length is {limit} tokens, but the prompt has {num_prompt_tokens}; "
            "shorten it, and leave room for the answer",
            param,
        )
    if asked is not None and asked > left:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {limit} tokens, but {num_prompt_tokens + asked} were asked for "
            f"({num_prompt_tokens} in the prompt, {asked} to generate); shorten the prompt, or generate at most {left}",
            param,
        )
    return min(left, request.default_max_tokens or left) if asked is None else asked


async def _json(request: Request) -> Any:
    raw = await request.body()
    try:
        text = raw.decode(json.detect_encoding(raw))
        body = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():  # half a surrogate pair is JSON, but no text
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:
        raise RequestError(f"the request body is not valid JSON: {e}") from e
    return body


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
