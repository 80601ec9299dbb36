"""A served base: its engines (`EngineClient`), its prompts (`PromptEncoder`), its limits and its health.

The protocols here stand between the gateway, which knows no Ray, and those who have engines.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from prometheus_client.core import Metric as Family

from loray import __version__
from loray.bases.registry import BaseModel, read_pooling
from loray.engine.memory.limits import max_model_len, pool_geometry, tokens_of_a_request
from loray.errors import ContextLengthExceeded, EngineError, ModelNotSupported, RequestError, SpecError
from loray.schemas.openai import ChatCompletionRequest, Prompt
from loray.schemas.openai.embeddings import MAX_INPUT_TOKENS, EmbeddingRequest
from loray.schemas.openai.requests import for_template
from loray.schemas.status import AutoscalingStatus, BaseStatus, ReplicaStatus
from loray.spec import (
    AdapterRef,
    Constraint,
    GenerateRequest,
    PoolingParams,
    ReasoningParserName,
    ServeSpec,
    TokenDelta,
    ToolParserName,
)
from loray.text.chat import Dialect, Dialects
from loray.text.grammar import GrammarChecker
from loray.text.templates import ChatTemplates
from loray.text.tokenizer import Tokenizer, bad_word_ids
from serve_apps.gateway.metrics import BaseMetrics
from serve_apps.places import MostPlaces, Places

T = TypeVar("T")

LONG = 4096  # characters of one request; they take about 2 ms, for which the event loop may be blocked
VERY_LONG = 131_072  # about 60 ms
LONG_TEXTS = MostPlaces(total=1, of_tenant=1, wait_s=30.0, waiting=None)  # very long texts that are encoded
OWN_TEMPLATES = MostPlaces(total=2, of_tenant=1, wait_s=2.0, waiting=None)  # renderings of adapters, each in a process
_PIECE = 8192  # tokens that are decoded at once; then other threads run
_MESSAGE_OVERHEAD = 32  # characters per message, whose rendering takes time too
MIN_BODY_BYTES, MAX_BODY_BYTES = 1 << 20, 64 << 20
BYTES_PER_TOKEN = 64  # of a body; JSON takes 12 bytes for a character at most
FRESH_S = 1.0  # for which what replicas have said of their health is said again


class EngineClient(Protocol):
    """The replicas of one base, or the one engine of this process."""

    def running(self, late: Callable[[float], None]) -> AbstractAsyncContextManager[None]:
        """Work beside requests, while the gateway runs. `late` is told how late tokens come from another process, by
        what they may be (`max_token_lateness`), as often as they come.
        """

    def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        """Yield deltas as they arrive; those that arrive between two reads are one. Raises LorayError.

        Closing the generator before its last delta ends the request in the engine. `fit`: max_tokens is an upper bound,
        which the replica lowers to what fits into its pool.
        """

    async def healthy(self) -> bool:
        """Tell whether a replica answers and its engine runs."""

    def is_cold(self) -> bool:
        """Tell whether no replica runs, and the next request starts one."""

    def start_failed(self) -> bool:
        """Tell whether no replica runs because the last one that a request started was not ready in time."""

    async def stats(self) -> list[ReplicaStatus]:
        """Ask for the status of every replica that answers."""

    async def retire(self, digests: Collection[str]) -> None:
        """Drop ephemeral adapters on every replica, when the requests that use them have ended. Nobody waits for that,
        and a replica that does not answer drops them by age.
        """

    async def autoscaling(self) -> AutoscalingStatus | None:
        """Ask for the autoscaler's last decisions; None if there are none."""

    async def metrics(self) -> list[list[Family] | None]:
        """Ask for the Prometheus families of every replica; None for one that does not answer in time."""

    def routing_decisions(self) -> Mapping[str, int]:
        """Count the requests that were routed, by reason (`loray.policy.routing.Reason`). Empty without replicas."""

    def resumes(self) -> Mapping[str, int]:
        """Count the begun answers that went on at another replica: "lost" and "moved" ones. Empty without replicas."""


class Gateways(Protocol):
    """The gateways of a deployment. Each has the HTTP requests that came to it, and no other's."""

    @property
    def name(self) -> str:
        """The name of the gateway in this process."""

    async def metrics(self) -> list[list[Family] | None]:
        """Ask for the families of every gateway, this one included; None for one that does not answer in time."""


class PromptEncoder:
    """Encodes texts, the short ones at once, and others in threads, so that they do not delay other requests.

    Very long ones have a thread of their own, and adapters' own templates have others: however many come, they delay
    only each other. Tenants use these threads in turn. `tenant` is who asks; a call that has waited for its turn for
    too long raises Overloaded.
    """

    def __init__(
        self,
        base: BaseModel,
        tokenizer: Tokenizer,
        templates: ChatTemplates,
        form: ToolParserName | None = None,
        reasoning_parser: ReasoningParserName | None = None,
    ) -> None:
        """`form`: how the base writes tool calls; `reasoning_parser`: how it thinks. None: detected."""
        self.tokenizer = tokenizer
        self._dialects = Dialects(base.name, templates, tokenizer, form, reasoning_parser)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenizer")
        self._long_texts = Places("very long texts", LONG_TEXTS)
        self._own_templates = Places("renderings of adapters' templates", OWN_TEMPLATES)

    @classmethod
    def load(
        cls, base: BaseModel, form: ToolParserName | None = None, reasoning_parser: ReasoningParserName | None = None
    ) -> PromptEncoder:
        return cls(base, Tokenizer.load(base.path), ChatTemplates.load(base.path), form, reasoning_parser)

    def close(self) -> None:
        self._long_texts.close()
        self._own_templates.close()
        self._dialects.close()

    async def texts(
        self,
        prompts: Sequence[Prompt],
        limit: int | None,
        tenant: str,
        *,
        special: bool = True,
        keep: int | None = None,
    ) -> list[tuple[int, ...]]:
        """Encode texts, with the tokenizer's special tokens if `special`. Token ids are returned unchanged.

        `limit` is the model's context length: a text that is certainly longer raises ContextLengthExceeded before it is
        encoded. `keep`: of longer prompts the last so many tokens are taken instead.
        """
        if limit is not None:
            most = limit * self.tokenizer.max_token_characters
            if keep is not None:
                prompts = [p[-most:] if isinstance(p, str) else p for p in prompts]
            _check_characters(max((len(p) for p in prompts if isinstance(p, str)), default=0), most, limit, "prompt")

        def encode() -> list[tuple[int, ...]]:
            ids = [self.tokenizer.encode(p, special=special) if isinstance(p, str) else p for p in prompts]
            return ids if keep is None else [self.tokenizer.cut(i, keep) for i in ids]

        return await self._run(tenant, encode, sum(len(p) for p in prompts if isinstance(p, str)))

    async def inputs(
        self, inputs: Sequence[Prompt], limit: int, tenant: str, *, special: bool, keep: int | None
    ) -> list[tuple[int, ...]]:
        """Encode what is to be embedded. As `texts`, but `keep` takes the first tokens, and errors name the input."""
        most = limit * self.tokenizer.max_token_characters
        if keep is not None:
            inputs = [given[:most] if isinstance(given, str) else given for given in inputs]
        for i, given in enumerate(inputs):
            if isinstance(given, str):
                _check_characters(len(given), most, limit, f"input.{i}")

        def encode() -> list[tuple[int, ...]]:
            ids = [self.tokenizer.encode(i, special=special) if isinstance(i, str) else i for i in inputs]
            return ids if keep is None else [self.tokenizer.head(i, keep) for i in ids]

        return await self._run(tenant, encode, sum(len(i) for i in inputs if isinstance(i, str)))

    def echo(self, prompt: Prompt) -> str:
        """Return the text of a prompt; token ids are decoded."""
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    async def dialect(
        self, adapter: AdapterRef | None, template: str | None, tenant: str, *, with_tools: bool
    ) -> Dialect:
        """Find how the model is spoken to; `template` is the adapter's own.

        Raises RequestError if there is no template.
        """
        form = None if adapter is None else adapter.tool_parser
        find = partial(self._dialects.find, form, template, with_tools=with_tools)
        return find() if template is None else await self._own_templates.run(tenant, find)

    async def chat(
        self,
        request: ChatCompletionRequest,
        dialect: Dialect,
        limit: int | None,
        tenant: str,
        *,
        keep: int | None = None,
    ) -> tuple[int, ...]:
        """Encode the messages by the chat template, up to the beginning of the assistant's turn. As `texts`."""
        use = request.tool_use
        begins = (
            not request.continue_final_message
            if request.add_generation_prompt is None
            else request.add_generation_prompt
        )

        def render() -> str:
            return dialect.render(
                for_template(request.messages),
                use,
                add_generation_prompt=begins,
                continue_final_message=request.continue_final_message,
                variables=request.template_variables if dialect.thinks else request.chat_template_kwargs,
            )

        def encode(prompt: str) -> tuple[int, ...]:
            ids = self.tokenizer.encode(prompt, special=request.add_special_tokens)
            return ids if keep is None else self.tokenizer.cut(ids, keep)

        most = None if keep is not None or limit is None else limit * self.tokenizer.max_token_characters
        if most is not None and limit is not None:
            if len(request.messages) > limit:  # no template writes a message in less than one token
                raise ContextLengthExceeded(
                    f"this model's maximum context length is {limit} tokens, but the chat has "
                    f"{len(request.messages):,} messages; send fewer",
                    "messages",
                )
            _check_characters(request.num_characters, most, limit, "messages")
        if dialect.own is None:
            characters = request.num_characters + _MESSAGE_OVERHEAD * len(request.messages)
            return await self._run(tenant, lambda: encode(render()), characters)
        prompt = await self._own_templates.run(tenant, render)
        if most is not None and limit is not None:
            _check_characters(len(prompt), most, limit, "messages")
        return await self._run(tenant, partial(encode, prompt), len(prompt))

    async def constraint(self, request: ChatCompletionRequest, dialect: Dialect, tenant: str) -> Constraint | None:
        """Find what the answer must match, of which the tools are a part: see `Dialect.constraint`."""
        answer = None if request.constraint is None else request.constraint.constraint
        if request.tool_use is None:
            return answer
        return await self._run(tenant, partial(dialect.constraint, request.tool_use, answer), request.num_characters)

    async def bad_words(self, words: Sequence[str], tenant: str) -> tuple[tuple[int, ...], ...]:
        """Return the words' token ids: see `bad_word_ids`."""
        return await self._run(tenant, partial(bad_word_ids, self.tokenizer, words), 2 * sum(map(len, words)))

    async def decode(self, ids: Sequence[int], tenant: str) -> str:
        """Return the text of token ids, special tokens included. Raises RequestError for ids outside the vocabulary."""
        if max(ids, default=0) >= self.tokenizer.num_tokens:
            raise RequestError(f"a token id is outside the vocabulary of {self.tokenizer.num_tokens}", "tokens")

        def decode() -> str:
            decoder = self.tokenizer.decoder()
            pieces = [decoder.push(ids[i : i + _PIECE]) for i in range(0, len(ids), _PIECE)]
            return "".join(pieces) + decoder.flush()

        return await self._run(tenant, decode, len(ids))

    async def token_strings(self, ids: Sequence[int], tenant: str) -> list[str]:
        """Return each token as it stands in the vocabulary."""
        return await self._run(tenant, partial(self.tokenizer.tokens, ids), len(ids))

    async def _run(self, tenant: str, encode: Callable[[], T], num_characters: int) -> T:
        """Call `encode` at once, or in a thread if the text is long."""
        if num_characters <= LONG:
            return encode()
        if num_characters > VERY_LONG:
            return await self._long_texts.run(tenant, encode)
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)


def _check_characters(num: int, most: int, limit: int, param: str) -> None:
    if num > most:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {limit} tokens, which have {most:,} characters at most, but the "
            f"prompt has {num:,}; shorten it",
            param,
        )


OpenEngines = Callable[[ServeSpec], EngineClient]


class ServedBase:
    """One base of a deployment. `spec` is its own, `engines` have its replicas."""

    def __init__(self, spec: ServeSpec, base: BaseModel, prompts: PromptEncoder, engines: EngineClient) -> None:
        self.spec, self.base = spec, base
        self.prompts, self.engines = prompts, engines
        self.grammars = GrammarChecker(base)
        self.pooling = read_pooling(base.path)
        if spec.pooling is not None:
            self.pooling = PoolingParams(kind=spec.pooling, normalize=self.pooling is None or self.pooling.normalize)
        size = base.config.hidden_size
        if max(spec.matryoshka, default=0) > size:
            raise SpecError(f"matryoshka has {max(spec.matryoshka)}, but embeddings of {base.name} have {size} numbers")
        self.system_fingerprint = f"loray-{__version__}-{base.fingerprint[:12]}"
        is_known = spec.fixed_pool_bytes is not None  # else only its replicas know it
        # Inputs of one request for embeddings that are with the engines: what they run, and no queue before others.
        self.num_at_once = min(spec.max_num_seqs, spec.max_queued) * max(spec.min_replicas, 1)
        self._pool_tokens: int | None = None
        if is_known:
            geometry = pool_geometry(spec, base.config)
            self._pool_tokens = tokens_of_a_request(base.config, geometry, geometry.num_blocks)

    @classmethod
    def open(cls, spec: ServeSpec, base: BaseModel, engines: EngineClient) -> ServedBase:
        """Read the base's tokenizer and templates. Raises SpecError where they are not those of the spec's parsers."""
        return cls(spec, base, PromptEncoder.load(base, spec.tool_parser, spec.reasoning_parser), engines)

    @property
    def name(self) -> str:
        return self.base.name

    def pooling_of(self, request: EmbeddingRequest) -> PoolingParams:
        """Say how the embeddings of a request are made. Raises ModelNotSupported, RequestError."""
        pooling, size, given = self.pooling, self.base.config.hidden_size, request.dimensions
        if pooling is None:
            raise ModelNotSupported(
                f"{self.name} is not served for embeddings: it does not say how it pools them. Serve it with "
                "`pooling: last` or `pooling: mean` in its spec",
                "model",
            )
        if given not in (None, size, *self.spec.matryoshka):
            known = ", ".join(map(str, sorted({*self.spec.matryoshka, size})))
            raise RequestError(
                f"embeddings of {self.name} are not cut to {given} numbers; ask for {known}", "dimensions"
            )
        is_scaled = pooling.normalize if request.normalize is None else request.normalize
        return PoolingParams(kind=pooling.kind, dimensions=given, normalize=is_scaled)

    def limit(self, context_length: int) -> int:
        """Return the most prompt and output tokens: the minimum of the model's, the spec's and the pool's limit.

        The adapter takes space in the pool too. Only its replica knows how much, and applies its own limit.
        """
        return max_model_len(self.spec, context_length, self._pool_tokens)

    def limit_of(self, adapter: AdapterRef | None) -> int:
        """Return the `limit` of an adapter, or of the base itself."""
        return self.limit(self.base.config.max_position_embeddings if adapter is None else adapter.context_length)

    def max_body_bytes(self, longest_context: int) -> int:
        """Limit a request's body: the spec's limit, else what the longest context's prompt may take, or the texts that
        are embedded together, at most 64 MiB.
        """
        if self.spec.max_body_bytes is not None:
            return self.spec.max_body_bytes
        num_tokens = max(self.limit(longest_context), 0 if self.pooling is None else MAX_INPUT_TOKENS)
        return min(max(MIN_BODY_BYTES, BYTES_PER_TOKEN * num_tokens), MAX_BODY_BYTES)

    async def healthy(self) -> bool:
        """Tell whether the base can be asked: a replica answers, or the next request starts one. Not where a replica is
        wanted and the last one did not become ready.
        """
        if not self.engines.is_cold():
            return await self.engines.healthy()
        return not (self.engines.start_failed() and await self.num_wanted())

    async def metrics(self) -> BaseMetrics:
        num_wanted, replicas = await asyncio.gather(self.num_wanted(), self.engines.metrics())
        return BaseMetrics(num_wanted, replicas)

    async def num_wanted(self) -> int:
        """Return the number of replicas that the spec or the autoscaler wants."""
        return self._target(await self._scaling())

    async def _scaling(self) -> AutoscalingStatus | None:
        return None if self.spec.autoscaling is None else await self.engines.autoscaling()

    def _target(self, scaling: AutoscalingStatus | None) -> int:
        return self.spec.min_replicas if scaling is None else scaling.target

    async def status(self, num_adapters: int) -> BaseReport:
        """Ask the base's replicas. `num_adapters`: those of the base in the catalog."""
        replicas = [r.model_copy(update={"base": self.name}) for r in await self.engines.stats()]
        scaling = await self._scaling()
        target = self._target(scaling)
        status = BaseStatus(
            base=self.name,
            status="degraded" if len(replicas) < target else "ok" if target or replicas else "asleep",
            num_replicas=len(replicas),
            target=target,
            num_adapters=num_adapters,
            spec=self.spec,
            autoscaling=scaling,
        )
        return BaseReport(status, replicas)


class BaseReport(NamedTuple):
    status: BaseStatus
    replicas: list[ReplicaStatus]


class ServedModel(NamedTuple):
    """A request's model. `adapter`: None for the base itself. `limit`: the largest number of tokens."""

    base: ServedBase
    adapter: AdapterRef | None
    limit: int


class Health:
    """Tells whether the bases can be asked. The replicas are asked at most once in FRESH_S, however many callers, who
    need no key, there are. Used from one event loop.
    """

    def __init__(self, bases: Sequence[ServedBase]) -> None:
        self._bases = bases
        self._asked: asyncio.Future[list[bool]] | None = None
        self._asked_at = 0.0

    async def found(self) -> str:
        """Return JSON with the number of the bases that cannot be asked. Raises EngineError if that are all of them."""
        asked, now = self._asked, asyncio.get_running_loop().time()
        if asked is None or (asked.done() and now >= self._asked_at + FRESH_S):
            asked = self._asked = asyncio.gather(*(base.healthy() for base in self._bases))
            self._asked_at = now
        num_silent = (await asyncio.shield(asked)).count(False)
        if num_silent == len(self._bases):
            raise EngineError("no replica answers; `loray status` says more")
        found = {"status": "degraded", "num_unavailable": num_silent} if num_silent else {"status": "ok"}
        return json.dumps(found, separators=(",", ":"))
