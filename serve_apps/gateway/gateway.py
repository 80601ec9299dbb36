"""The gateway's operations: OpenAI's completions and chat completions; health, status and metrics."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial

from fastapi.responses import Response

from loray import __version__
from loray.api.openai import ChatCompletionRequest, ChatFormat, CompletionFormat, CompletionRequest, parse
from loray.api.openai.formats import Choice, usage_of
from loray.api.openai.requests import GenerationRequest
from loray.api.status import CatalogStatus, Status, total
from loray.engine.memory.limits import check_length, max_model_len, pool_geometry
from loray.errors import EngineError
from loray.spec import AdapterRef, GenerateRequest, ServeSpec
from loray.text.deltas import texts
from serve_apps.exposition import encode
from serve_apps.gateway.directory import ModelDirectory
from serve_apps.gateway.echo import echoed
from serve_apps.gateway.engines import Engines, merge
from serve_apps.gateway.events import SSE_HEADERS, EventStream, stream_events
from serve_apps.gateway.metrics import GatewayMetrics
from serve_apps.gateway.prompts import PromptEncoder


class Gateway:
    """Checks and tokenises requests, resolves their models, and builds OpenAI's responses from the engines' deltas."""

    def __init__(self, spec: ServeSpec, directory: ModelDirectory, prompts: PromptEncoder, engines: Engines) -> None:
        self.spec, self.directory = spec, directory
        self._prompts, self._engines = prompts, engines
        self._pool_tokens = pool_geometry(spec, directory.base.config).num_tokens
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
        requests = [
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
        fit = request.requested_max_tokens is None
        streams = [texts(self._prompts.tokenizer, r, self._engines.generate(r, fit=fit)) for r in requests]
        if isinstance(request, CompletionRequest) and request.echo:
            echoes = [partial(self._prompts.echo, prompt) for prompt in request.prompt for _ in range(request.n)]
            streams = [echoed(stream, echo, request) for stream, echo in zip(streams, echoes, strict=True)]
        deltas = merge(streams)
        headers = {"X-Request-Id": answer.id}
        choices = [Choice() for _ in requests]
        if request.stream:
            try:
                first = await anext(deltas)  # before the status is sent, so that an error until here has its own status
            except BaseException:
                await deltas.aclose()
                raise
            events = stream_events(first, deltas, choices, answer, request)
            return EventStream(events, deltas, headers=headers | SSE_HEADERS)
        async with aclosing(deltas):
            async for index, delta in deltas:
                choices[index].add(delta)
        body = answer.whole(choices, usage_of(choices, request.n))
        return Response(body.to_json(), media_type="application/json", headers=headers)

    def limit(self, context_length: int) -> int:
        """The largest number of prompt and output tokens: the minimum of the model's, the spec's and the pool's limit.

        The adapter takes space in the pool too. Only its replica knows how much, and applies its own limit.
        """
        return max_model_len(self.spec, context_length, self._pool_tokens)

    # -- health, status, metrics --------------------------------------------------------------------------------------

    async def health(self) -> Response:
        if not await self._engines.healthy():
            raise EngineError("no replica answers; `loray status` says more")
        return Response('{"status":"ok"}', media_type="application/json")

    async def status(self) -> Status:
        labels = self.directory.labels()
        replicas = []
        for replica in await self._engines.stats():
            named = {
                field: tuple(labels.get(digest, digest[:12]) for digest in getattr(replica, field))
                for field in ("adapters_in_pool", "adapters_on_host")
            }
            replicas.append(replica.model_copy(update=named))
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


def _max_tokens(request: GenerationRequest, num_prompt_tokens: int, limit: int, param: str) -> int:
    """The requested limit, else the API's default, at most what fits into the context. Raises ContextLengthExceeded."""
    requested = request.requested_max_tokens
    check_length(limit, num_prompt_tokens, 1 if requested is None else requested, param=param)
    left = limit - num_prompt_tokens
    return min(left, request.default_max_tokens or left) if requested is None else requested


def _new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
