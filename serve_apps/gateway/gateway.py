"""The gateway's operations: OpenAI's completions and chat completions; health, status and metrics."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from functools import partial

from fastapi.responses import Response
from prometheus_client.core import Metric as Family

from loray import __version__
from loray.api.openai import ChatCompletionRequest, ChatFormat, CompletionFormat, CompletionRequest
from loray.api.openai.extras import Extras
from loray.api.openai.requests import GenerationRequest
from loray.api.openai.responses_api import ResponseBuilder, ResponsesRequest, renamed
from loray.api.openai.structured import Given
from loray.api.status import CatalogStatus, Status, total
from loray.engine.memory.limits import max_model_len, pool_geometry
from loray.errors import EngineError, RequestError
from loray.serving.access import share_of
from loray.serving.canary import session_of
from loray.serving.quotas import allowed_priority
from loray.spec import AdapterRef, GenerateRequest, Principal, ServeSpec, cache_salt
from loray.text.bad_words import bad_word_ids
from loray.text.chat import Dialect
from loray.text.deltas import RequestText
from loray.text.grammar import GrammarChecker
from serve_apps.accounting.account import Accounts
from serve_apps.exposition import encode
from serve_apps.gateway.answers.answer import Answer, ChoiceStream, Deadline, DeltaText
from serve_apps.gateway.answers.echo import Echo
from serve_apps.gateway.answers.headers import ADAPTER, RequestHeaders
from serve_apps.gateway.answers.responses import response_writer
from serve_apps.gateway.answers.writers import Writer, writer_of
from serve_apps.gateway.canaries import Canaries, Meter
from serve_apps.gateway.directory import ModelDirectory
from serve_apps.gateway.engines import Engines, Gateways
from serve_apps.gateway.lengths import extras, max_tokens, num_kept
from serve_apps.gateway.metrics import GatewayMetrics, together
from serve_apps.gateway.models import ModelCards
from serve_apps.gateway.prompts import PromptEncoder

_MIN_BODY_BYTES = 1 << 20
_BYTES_PER_TOKEN = 64  # of a body; JSON takes 12 bytes for a character at most


class Gateway:
    """Checks and tokenises requests, resolves their models, and builds OpenAI's responses from the engines' deltas."""

    def __init__(
        self,
        spec: ServeSpec,
        directory: ModelDirectory,
        prompts: PromptEncoder,
        engines: Engines,
        gateways: Gateways | None = None,
        accounts: Accounts | None = None,
    ) -> None:
        """`gateways` None: this is the only one. `accounts` None: what requests use is recorded nowhere."""
        self.spec, self.directory = spec, directory
        self.prompts, self.engines, self._gateways = prompts, engines, gateways
        self._grammars = GrammarChecker(directory.base)
        self._pool_tokens = pool_geometry(spec, directory.base.config).num_tokens
        self.models = ModelCards(directory, self.limit)
        self.accounts = accounts or Accounts()
        self.counted = GatewayMetrics("local" if gateways is None else gateways.name)
        self.canaries = Canaries(directory.ask, self.counted)

    @property
    def _fingerprint(self) -> str:
        return f"loray-{__version__}-{self.directory.base.fingerprint[:12]}"

    # -- generation ---------------------------------------------------------------------------------------------------

    async def completions(self, request: CompletionRequest, headers: RequestHeaders) -> Response:
        adapter, limit, meter = await self._chosen(request, headers)
        prompts = await self.prompts.texts(
            request.prompt, limit, special=request.add_special_tokens, keep=num_kept(request, limit)
        )
        answer = CompletionFormat(
            _new_id("cmpl"),
            int(time.time()),
            request.model,
            self._fingerprint,
            request.include_usage,
            extras(request, prompts),
        )
        given = request.constraint
        requests = await self._requests(request, adapter, limit, prompts, answer.id, "prompt", headers, given)
        writer = writer_of(answer, len(requests), request)
        texts = [
            RequestText(self.prompts.tokenizer, r, tokens_as_ids=request.return_tokens_as_token_ids) for r in requests
        ]
        if not request.echo:
            return self._answer(request, requests, texts, writer, answer.id, headers, meter)
        echoed = request.prompt if request.truncate_prompt_tokens is None else prompts
        echoes = [partial(self.prompts.echo, prompt) for prompt in echoed for _ in range(request.n)]
        echoing = [Echo(text, echo, request) for text, echo in zip(texts, echoes, strict=True)]
        return self._answer(request, requests, echoing, writer, answer.id, headers, meter)

    async def responses(
        self, request: ResponsesRequest, chat: ChatCompletionRequest, headers: RequestHeaders
    ) -> Response:
        """`chat` is the chat request that `request` stands for."""
        builder = ResponseBuilder(request)
        try:
            return await self.chat_completions(
                chat, headers, response_writer(builder, stream=request.stream), builder.id
            )
        except RequestError as e:
            raise renamed(e) from e

    async def chat_completions(
        self,
        request: ChatCompletionRequest,
        headers: RequestHeaders,
        writer: Writer | None = None,
        answer_id: str | None = None,
    ) -> Response:
        """`writer` None: a chat completion."""
        adapter, limit, meter = await self._chosen(request, headers)
        dialect = await self.dialect(request, adapter)
        prompt = await self.prompts.chat(request, dialect, limit, keep=num_kept(request, limit))
        given, use = request.constraint, request.tool_use
        constraint = dialect.constraint(use, None if given is None else given.constraint)
        if use is not None:
            given = None if constraint is None else Given("tools", constraint)
        answer = ChatFormat(answer_id or _new_id("chatcmpl"), *self._about(request, [prompt]))
        requests = await self._requests(request, adapter, limit, [prompt], answer.id, "messages", headers, given)
        writer = writer or writer_of(answer, len(requests), request)
        texts = [dialect.text_of(r, use, tokens_as_ids=request.return_tokens_as_token_ids) for r in requests]
        return self._answer(request, requests, texts, writer, answer.id, headers, meter)

    async def dialect(self, request: ChatCompletionRequest, adapter: AdapterRef | None) -> Dialect:
        """How the model of a chat is spoken to."""
        with_tools = request.tool_use is not None
        return await self.prompts.dialect(adapter, self.directory.template(adapter), with_tools=with_tools)

    def _about(
        self, request: GenerationRequest, prompts: Sequence[tuple[int, ...]]
    ) -> tuple[int, str, str, bool, Extras]:
        """What each format begins with, after the id."""
        return int(time.time()), request.model, self._fingerprint, request.include_usage, extras(request, prompts)

    async def model(self, name: str, principal: Principal) -> tuple[AdapterRef | None, int]:
        """What a name means for this caller: the adapter, or None for the base; and the largest number of tokens of a
        request for it. Raises PermissionDenied where its key is for other models.
        """
        adapter = await self.directory.resolve(name, principal)
        return adapter, self._limit_of(adapter)

    def _limit_of(self, adapter: AdapterRef | None) -> int:
        config = self.directory.base.config
        return self.limit(config.max_position_embeddings if adapter is None else adapter.context_length)

    async def _chosen(
        self, request: GenerationRequest, headers: RequestHeaders
    ) -> tuple[AdapterRef | None, int, Meter | None]:
        """As `model`, with what measures the request if its alias has a canary."""
        session = session_of(headers.principal, headers.session_id, request.user)
        adapter, arm = await self.directory.choose(request.model, headers.principal, session)
        own = headers.timeout_s is not None and headers.timeout_s <= (self.spec.request_timeout_s or headers.timeout_s)
        meter = self.canaries.meter(arm, headers.received_at, has_timeout=own)
        return adapter, self._limit_of(adapter), meter

    async def _requests(
        self,
        request: GenerationRequest,
        adapter: AdapterRef | None,
        limit: int,
        prompts: Sequence[tuple[int, ...]],
        answer_id: str,
        param: str,
        headers: RequestHeaders,
        given: Given | None,
    ) -> list[GenerateRequest]:
        """The engine's requests, one for each choice. Their ids begin with the client's, and are unique.

        `given`: what the answers must match.
        """
        if given is not None:
            await self._grammars.check(given.constraint, given.param)
        bad_words = bad_word_ids(self.prompts.tokenizer, request.bad_words)
        prefix = answer_id if headers.request_id is None else f"{headers.request_id}-{answer_id}"
        return [
            GenerateRequest(
                request_id=f"{prefix}-{i * request.n + choice}",
                prompt_ids=prompt,
                params=request.sampling(
                    max_tokens=max_tokens(request, len(prompt), limit, param),
                    choice=choice,
                    bad_words=bad_words,
                    structured=None if given is None else given.constraint,
                ),
                adapter=adapter,
                tenant=share_of(headers.principal, request.user),
                priority=allowed_priority(headers.principal, request.priority),
                ttft_slo_s=request.ttft_slo_s,
                cache_salt=cache_salt(headers.principal.tenant, request.cache_salt),
                traceparent=None if headers.trace is None else headers.trace.traceparent,
            )
            for i, prompt in enumerate(prompts)
            for choice in range(request.n)
        ]

    def _answer(
        self,
        request: GenerationRequest,
        requests: Sequence[GenerateRequest],
        texts: Sequence[DeltaText],
        writer: Writer,
        answer_id: str,
        headers: RequestHeaders,
        meter: Meter | None,
    ) -> Answer:
        if headers.trace is not None:
            headers.trace.asked(request, requests, answer_id)
        fit = request.requested_max_tokens is None
        account = self.accounts.open(
            headers.principal,
            requests,
            answer_id=answer_id,
            base=self.directory.base.name,
            num_choices=request.n,
            received_at=headers.received_at,
            open_ended=fit,
        )
        streams = [self.engines.generate(r, fit=fit) for r in requests]
        return Answer(
            [ChoiceStream(stream, text) for stream, text in zip(streams, texts, strict=True)],
            writer,
            request_id=headers.request_id or answer_id,
            account=account,
            deadline=Deadline.earliest(headers.received_at, headers.timeout_s, self.spec.request_timeout_s),
            heartbeat_s=self.spec.sse_heartbeat_s or None,
            headers=None if (adapter := requests[0].adapter) is None else {ADAPTER: adapter.label},
            meter=meter,
        )

    def limit(self, context_length: int) -> int:
        """The largest number of prompt and output tokens: the minimum of the model's, the spec's and the pool's limit.

        The adapter takes space in the pool too. Only its replica knows how much, and applies its own limit.
        """
        return max_model_len(self.spec, context_length, self._pool_tokens)

    def max_body_bytes(self) -> int:
        """The largest request body: the spec's, else what a prompt as long as the longest context may take."""
        if self.spec.max_body_bytes is not None:
            return self.spec.max_body_bytes
        return max(_MIN_BODY_BYTES, _BYTES_PER_TOKEN * self.limit(self.directory.longest_context))

    # -- health, status, metrics --------------------------------------------------------------------------------------

    async def health(self) -> Response:
        if not await self.engines.healthy():
            raise EngineError("no replica answers; `loray status` says more")
        return Response('{"status":"ok"}', media_type="application/json")

    async def status(self) -> Status:
        found = await self.engines.stats()
        fields = ("adapters_in_pool", "adapters_on_host", "adapters_loading")
        labels = await self.directory.labels({d for r in found for field in fields for d in getattr(r, field)})
        replicas = []
        for replica in found:
            named = {
                field: tuple(labels.get(digest, digest[:12]) for digest in getattr(replica, field)) for field in fields
            }
            replicas.append(replica.model_copy(update=named))
        scaling = None if self.spec.autoscaling is None else await self.engines.autoscaling()
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
        replicas, gateways = await asyncio.gather(self.engines.metrics(), self._all_gateways())
        body, content_type = encode(together(gateways, replicas), accept)
        return Response(body, media_type=content_type)

    async def _all_gateways(self) -> list[list[Family] | None]:
        return [self.own_families()] if self._gateways is None else await self._gateways.metrics()

    def own_families(self) -> list[Family]:
        """The metrics of this gateway alone."""
        return self.counted.families(self.directory, self.engines.routing_decisions(), self.engines.resumes())


def _new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
