"""A gateway's answers: completions, chat completions, responses and embeddings; its health, status and metrics."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from fastapi.responses import Response
from prometheus_client.core import Metric as Family

from loray.engine.memory.limits import check_length
from loray.errors import ContextLengthExceeded, RequestError
from loray.policy.auth import share_of
from loray.policy.canary import session_of
from loray.policy.quotas import allowed_priority
from loray.schemas.anthropic import MessageBuilder, MessagesRequest
from loray.schemas.openai import ChatCompletionRequest, ChatFormat, CompletionFormat, CompletionRequest
from loray.schemas.openai.embeddings import MAX_INPUT_TOKENS, EmbeddingRequest
from loray.schemas.openai.formats import NO_EXTRAS, Extras
from loray.schemas.openai.requests import GenerationRequest
from loray.schemas.openai.responses_api import ResponseBuilder, ResponsesRequest, renamed
from loray.schemas.openai.structured import RequestedConstraint
from loray.schemas.status import CatalogStatus, Status, total
from loray.spec import BATCH_PRIORITY, GenerateRequest, Principal, SamplingParams, Thinking, TokenDelta, cache_salt
from loray.text.chat import Dialect
from loray.text.detokenizer import RequestText
from serve_apps.accounting.accounts import TenantTurns, UsageMeter
from serve_apps.exposition import encode
from serve_apps.gateway.answers.answer import AnswerResponse, ChoiceStream, Deadline, DeltaText
from serve_apps.gateway.answers.headers import ADAPTER, PRIORITY, RequestHeaders, ignored_fields
from serve_apps.gateway.answers.writers import (
    AnswerWriter,
    Echo,
    EmbeddingText,
    WholeEmbeddings,
    message_writer,
    response_writer,
    writer_of,
)
from serve_apps.gateway.bases import Gateways, Health, ServedBase, ServedModel
from serve_apps.gateway.canaries import CanaryCounters, CanaryMeter
from serve_apps.gateway.directory import ModelCards, ModelResolver, ResolvedModel
from serve_apps.gateway.metrics import GatewayMetrics, together

_NOTHING_MORE = SamplingParams(max_tokens=0)

Q = TypeVar("Q", GenerationRequest, EmbeddingRequest)


class _Asked(NamedTuple, Generic[Q]):
    """A request, with its headers and its model. `meter` measures it where its alias has a canary."""

    request: Q
    headers: RequestHeaders
    target: ServedModel
    meter: CanaryMeter | None


class Gateway:
    """Checks and tokenises requests, resolves their models, and builds OpenAI's responses from the engines' deltas."""

    def __init__(
        self,
        bases: Sequence[ServedBase],
        directory: ModelResolver,
        gateways: Gateways | None = None,
        accounts: UsageMeter | None = None,
        *,
        refuses_unknown_fields: bool = False,
    ) -> None:
        """`bases`: those of `directory`. `gateways` None: this is the only one. `accounts` None: what requests use is
        recorded nowhere. Unknown fields of bodies are ignored, unless it refuses them.
        """
        self.bases = {base.name: base for base in bases}
        self.directory, self._gateways = directory, gateways
        self.refuses_unknown_fields = refuses_unknown_fields
        self.models = ModelCards(directory, lambda base, length: self.bases[base.name].limit(length))
        self.accounts, self.turns = accounts or UsageMeter(), TenantTurns()
        self.counted = GatewayMetrics("local" if gateways is None else gateways.name)
        self.canaries = CanaryCounters(directory.follower.ask, self.counted)
        self._health = Health(bases)

    # -- generation ---------------------------------------------------------------------------------------------------

    async def completions(self, request: CompletionRequest, headers: RequestHeaders) -> Response:
        asked = await self._asked(request, headers)
        encoder, limit = asked.target.base.prompts, asked.target.limit
        prompts = await encoder.texts(
            request.prompt,
            limit,
            headers.principal.tenant,
            special=request.add_special_tokens,
            keep=_num_kept(request, limit),
        )
        answer = CompletionFormat(_new_id("cmpl"), *_about(asked, prompts))
        requests, told = await self._requests(asked, prompts, answer.id, "prompt", request.constraint)
        writer = writer_of(answer, len(requests), request)
        texts = [RequestText(encoder.tokenizer, r, tokens_as_ids=request.return_tokens_as_token_ids) for r in requests]
        if not request.echo:
            return self._answer(asked, requests, texts, writer, answer.id, told)
        echoed = request.prompt if request.truncate_prompt_tokens is None else prompts
        echoes = [partial(encoder.echo, prompt) for prompt in echoed for _ in range(request.n)]
        echoing = [Echo(text, echo, request) for text, echo in zip(texts, echoes, strict=True)]
        return self._answer(asked, requests, echoing, writer, answer.id, told)

    async def responses(
        self, request: ResponsesRequest, chat: ChatCompletionRequest, headers: RequestHeaders
    ) -> Response:
        """Answer a request of the Responses API, which stands for the chat request `chat`."""
        builder = ResponseBuilder(request)
        try:
            return await self.chat_completions(
                chat, headers, response_writer(builder, stream=request.stream), builder.id
            )
        except RequestError as e:
            raise renamed(e) from e

    async def messages(
        self, request: MessagesRequest, chat: ChatCompletionRequest, headers: RequestHeaders
    ) -> Response:
        """Answer a request of Anthropic's Messages API, which stands for the chat request `chat`."""
        builder = MessageBuilder(request)
        return await self.chat_completions(chat, headers, message_writer(builder, stream=request.stream), builder.id)

    async def chat_prompt(self, request: ChatCompletionRequest, target: ServedModel, tenant: str) -> tuple[int, ...]:
        """Encode a chat that is not to be answered, however long it is."""
        return await target.base.prompts.chat(request, await self.dialect(request, target, tenant), None, tenant)

    async def chat_completions(
        self,
        request: ChatCompletionRequest,
        headers: RequestHeaders,
        writer: AnswerWriter | None = None,
        answer_id: str | None = None,
    ) -> Response:
        """Answer a chat. `writer` None: as a chat completion."""
        asked = await self._asked(request, headers)
        target, tenant = asked.target, headers.principal.tenant
        dialect = await self.dialect(request, target, tenant)
        keep = _num_kept(request, target.limit)
        prompt = await target.base.prompts.chat(request, dialect, target.limit, tenant, keep=keep)
        given, use = request.constraint, request.tool_use
        constraint = await target.base.prompts.constraint(request, dialect, tenant)
        if use is not None:
            given = None if constraint is None else RequestedConstraint("tools", constraint)
        answer = ChatFormat(answer_id or _new_id("chatcmpl"), *_about(asked, [prompt]))
        thinking = dialect.thinking(prompt, request.thinking_budget)
        unused = request.thinking_fields if thinking is None else []
        requests, told = await self._requests(asked, [prompt], answer.id, "messages", given, thinking, unused)
        writer = writer or writer_of(answer, len(requests), request)
        texts = [
            dialect.text_of(
                r,
                use,
                thinking=thinking,
                include_reasoning=request.include_reasoning is not False,
                tokens_as_ids=request.return_tokens_as_token_ids,
            )
            for r in requests
        ]
        return self._answer(asked, requests, texts, writer, answer.id, told)

    async def embeddings(self, request: EmbeddingRequest, headers: RequestHeaders) -> Response:
        """Embed each input by a request of its own to the engines, as many of them at once as the replicas run."""
        asked = await self._asked(request, headers)
        base, limit, principal = asked.target.base, asked.target.limit, headers.principal
        pooling = base.pooling_of(request)
        for i, given in enumerate(request.input):
            if not given:
                raise RequestError(f"input {i} is empty; give at least one token, or leave it out", f"input.{i}")
        keep = limit if request.truncate_prompt_tokens == -1 else request.truncate_prompt_tokens
        special = request.add_special_tokens
        prompts = await base.prompts.inputs(request.input, limit, principal.tenant, special=special, keep=keep)
        with self.accounts.charged_if_refused(principal, sum(map(len, prompts))):
            _check_inputs(prompts, limit, base.base.config.vocab_size)
        answer_id = _new_id("embd")
        requests = [
            _engine_request(asked, f"{answer_id}-{i}", prompt, _NOTHING_MORE, pooling=pooling)
            for i, prompt in enumerate(prompts)
        ]
        texts = [EmbeddingText(r, request.encoding_format) for r in requests]
        writer = WholeEmbeddings(request.model, len(requests))
        places = asyncio.Semaphore(base.num_at_once)
        return self._answer(asked, requests, texts, writer, answer_id, {}, places)

    async def dialect(self, request: ChatCompletionRequest, target: ServedModel, tenant: str) -> Dialect:
        """Find how the model of a chat is spoken to; `tenant` is who asks."""
        template, with_tools = self.directory.template(target.adapter), request.tool_use is not None
        return await target.base.prompts.dialect(target.adapter, template, tenant, with_tools=with_tools)

    async def model(self, name: str | None, principal: Principal) -> ServedModel:
        """Find the model of this name for the caller. None: the base, if there is one alone; else RequestError. Raises
        PermissionDenied where its key is for other models.
        """
        if name is None and len(self.bases) > 1:
            names = self.directory.base_names(principal)
            raise RequestError(
                f"name the model{names and f': {names}'}; GET /v1/models lists those of this key", "model"
            )
        return self._target(await self.directory.resolve(name or next(iter(self.bases)), principal))

    def _target(self, found: ResolvedModel) -> ServedModel:
        served = self.bases[found.base.name]
        return ServedModel(served, found.adapter, served.limit_of(found.adapter))

    async def _asked(self, request: Q, headers: RequestHeaders) -> _Asked[Q]:
        """Find the request's model. Nothing measures a canary while its base has no replica: the wait for one says
        nothing of a version.
        """
        session = session_of(headers.principal, headers.session_id, request.user)
        found, arm = await self.directory.choose(request.model, headers.principal, session)
        target, own = self._target(found), headers.timeout_s
        has_own = own is not None and own <= (target.base.spec.request_timeout_s or own)
        arm = None if target.base.engines.is_cold() else arm
        meter = self.canaries.meter(arm, headers.received_at, has_timeout=has_own)
        return _Asked(request, headers, target, meter)

    async def _requests(
        self,
        asked: _Asked[Any],
        prompts: Sequence[tuple[int, ...]],
        answer_id: str,
        param: str,
        given: RequestedConstraint | None,
        thinking: Thinking | None = None,
        unused: Sequence[str] = (),
    ) -> tuple[list[GenerateRequest], dict[str, str]]:
        """Make the engine's requests, one for each choice, and the answer's headers that say what is ignored: of a
        constraint, and the fields `unused`. Their ids begin with the client's, and are unique.

        `given`: what the answers must match; `thinking`: the thought before it. What was tokenised for a request that
        is refused is charged.
        """
        request, headers, target, _ = asked
        principal = headers.principal
        with self.accounts.charged_if_refused(principal, sum(map(len, prompts))):
            ignored = () if given is None else await target.base.grammars.check(given.constraint, given.param)
            bad_words = await target.base.prompts.bad_words(request.bad_words, principal.tenant)
            requests = [
                _engine_request(
                    asked,
                    f"{answer_id}-{i * request.n + choice}",
                    prompt,
                    request.sampling(
                        max_tokens=_max_tokens(request, len(prompt), target.limit, param),
                        choice=choice,
                        bad_words=bad_words,
                        structured=None if given is None else given.constraint,
                        thinking=thinking,
                    ),
                    request.cache_salt,
                    ttft_slo_s=request.ttft_slo_s,
                )
                for i, prompt in enumerate(prompts)
                for choice in range(request.n)
            ]
        return requests, ignored_fields([*ignored, *unused])

    def _answer(
        self,
        asked: _Asked[Any],
        requests: Sequence[GenerateRequest],
        texts: Sequence[DeltaText],
        writer: AnswerWriter,
        answer_id: str,
        told: dict[str, str],
        places: asyncio.Semaphore | None = None,
    ) -> AnswerResponse:
        """`told`: headers that the answer has beside others. `places`: of requests that are with engines; None: all."""
        request, headers, (base, adapter, _), meter = asked
        if headers.trace is not None:
            headers.trace.asked(request.model, requests, answer_id, stream=bool(writer.heartbeat))
        fit = request.requested_max_tokens is None
        account = self.accounts.open(
            headers.principal,
            requests,
            answer_id=answer_id,
            base=base.name,
            num_choices=request.n,
            received_at=headers.received_at,
            open_ended=fit,
        )
        if adapter is not None:
            told[ADAPTER] = adapter.label
        if requests[0].priority or request.priority:
            told[PRIORITY] = str(requests[0].priority)
        timeout_s = None if headers.is_batch else base.spec.request_timeout_s
        streams = [base.engines.generate(r, fit=fit) for r in requests]
        if places is not None:
            streams = [_in_turn(places, stream) for stream in streams]
        return AnswerResponse(
            [ChoiceStream(stream, text) for stream, text in zip(streams, texts, strict=True)],
            writer,
            request_id=headers.request_id or answer_id,
            account=account,
            deadline=Deadline.earliest(headers.received_at, headers.timeout_s, timeout_s),
            heartbeat_s=base.spec.sse_heartbeat_s or None,
            headers=told,
            meter=meter,
        )

    def max_body_bytes(self) -> int:
        """Limit a request's body, which is read before its model is known: the spec's limit, else what the longest
        context of all bases needs.
        """
        return max(b.max_body_bytes(self.directory.longest_context(b.base)) for b in self.bases.values())

    # -- health, status, metrics --------------------------------------------------------------------------------------

    async def health(self) -> Response:
        """Answer 200 while any base can be asked, with the number of the others, to all. Raises EngineError."""
        return Response(await self._health.found(), media_type="application/json")

    async def status(self) -> Status:
        """Ask all replicas."""
        counts = self.directory.num_adapters_of
        reports = await asyncio.gather(*(b.status(counts(b.base)) for b in self.bases.values()))
        found = [replica for report in reports for replica in report.replicas]
        fields = ("adapters_in_pool", "adapters_on_host", "adapters_loading")
        labels = await self.directory.labels({d for r in found for field in fields for d in getattr(r, field)})
        replicas = []
        for replica in found:
            named = {
                field: tuple(labels.get(digest, digest[:12]) for digest in getattr(replica, field)) for field in fields
            }
            replicas.append(replica.model_copy(update=named))
        healthy = all(r.status.status != "degraded" for r in reports) and self.directory.follower.failure is None
        return Status(
            status="ok" if healthy else "degraded",
            bases=tuple(report.status for report in reports),
            catalog=CatalogStatus(num_adapters=self.directory.num_adapters, failure=self.directory.follower.failure),
            replicas=tuple(replicas),
            totals=total(tuple(replicas)),
        )

    async def metrics(self, accept: str) -> Response:
        reports, gateways = await asyncio.gather(
            asyncio.gather(*(base.metrics() for base in self.bases.values())), self._all_gateways()
        )
        body, content_type = encode(together(gateways, dict(zip(self.bases, reports, strict=True))), accept)
        return Response(body, media_type=content_type)

    async def _all_gateways(self) -> list[list[Family] | None]:
        return [self.own_families()] if self._gateways is None else await self._gateways.metrics()

    def own_families(self) -> list[Family]:
        """Collect the metrics of this gateway alone."""
        decisions = {name: base.engines.routing_decisions() for name, base in self.bases.items()}
        resumes = {name: base.engines.resumes() for name, base in self.bases.items()}
        status = self.accounts.usage_status
        return self.counted.families(self.directory, decisions, resumes, self.turns.num_waiting, status)


async def _in_turn(
    places: asyncio.Semaphore, stream: AsyncGenerator[TokenDelta, None]
) -> AsyncGenerator[TokenDelta, None]:
    await places.acquire()
    async with aclosing(stream):
        async for delta in stream:
            if delta.finish_reason is not None:  # after a failure, which ends the others, none of them begins
                places.release()
            yield delta


def _check_inputs(prompts: Sequence[tuple[int, ...]], limit: int, vocab_size: int) -> None:
    """Raise ContextLengthExceeded or RequestError for an input that could not be embedded, or too much of them."""
    for i, ids in enumerate(prompts):
        param = f"input.{i}"
        if not ids:
            raise RequestError(f"input {i} has no tokens; give at least one", param)
        if len(ids) > limit:
            raise ContextLengthExceeded(
                f"this model's maximum context length is {limit} tokens, but input {i} has {len(ids)}; shorten it, or "
                "have it cut with truncate_prompt_tokens",
                param,
            )
        if max(ids) >= vocab_size:
            raise RequestError(f"input {i}: a token id is outside the vocabulary of {vocab_size}", param)
    if (total := sum(map(len, prompts))) > MAX_INPUT_TOKENS:
        raise RequestError(
            f"the inputs have {total:,} tokens; at most {MAX_INPUT_TOKENS:,} are embedded in one request", "input"
        )


def _engine_request(
    asked: _Asked[Any],
    name: str,
    prompt: tuple[int, ...],
    params: SamplingParams,
    salt: str | None = None,
    **others: Any,
) -> GenerateRequest:
    """Make one of the engines' requests, whose id is `name` after the client's. `salt`: the client's; `others`: fields
    that not all kinds of requests have.
    """
    request, headers, target, _ = asked
    principal = headers.principal
    return GenerateRequest(
        request_id=name if headers.request_id is None else f"{headers.request_id}-{name}",
        prompt_ids=prompt,
        params=params,
        adapter=target.adapter,
        tenant=share_of(principal, request.user),
        priority=BATCH_PRIORITY if headers.is_batch else allowed_priority(principal, request.priority),
        cache_salt=cache_salt(principal.tenant, salt),
        traceparent=None if headers.trace is None else headers.trace.traceparent,
        **others,
    )


def _about(asked: _Asked[GenerationRequest], prompts: Sequence[tuple[int, ...]]) -> tuple[int, str, str, bool, Extras]:
    """Each format begins with these, after the id."""
    request, fingerprint = asked.request, asked.target.base.system_fingerprint
    return int(time.time()), request.model, fingerprint, request.include_usage, _extras(request, prompts)


def _max_tokens(request: GenerationRequest, num_prompt_tokens: int, limit: int, param: str) -> int:
    """Return the requested limit, else the API's default, at most what fits into the context.

    Raises RequestError for an empty prompt, and ContextLengthExceeded.
    """
    if not num_prompt_tokens:
        raise RequestError("the prompt is empty; give at least one token", param)
    requested = request.requested_max_tokens
    check_length(limit, num_prompt_tokens, 1 if requested is None else requested, param=param)
    left = limit - num_prompt_tokens
    return min(left, request.default_max_tokens or left) if requested is None else requested


def _extras(request: GenerationRequest, prompts: Sequence[tuple[int, ...]]) -> Extras:
    usage = request.stream_options is not None and request.stream_options.continuous_usage_stats
    if not (usage or request.return_token_ids):
        return NO_EXTRAS
    of_choices = [prompt for prompt in prompts for _ in range(request.n)]
    return Extras(of_choices, request.return_token_ids, usage)


def _num_kept(request: GenerationRequest, limit: int) -> int | None:
    """Return how many tokens of a longer prompt are taken (`truncate_prompt_tokens`); None: it may not be longer."""
    given = request.truncate_prompt_tokens
    if given != -1:
        return given
    requested = request.requested_max_tokens
    return max(1, limit - ((request.default_max_tokens or 1) if requested is None else requested))


def _new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
