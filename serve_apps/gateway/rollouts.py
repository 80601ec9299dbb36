"""Rollouts: calls from inside the cluster that sample token ids with log-probabilities, as `GatewayReplica.sample`.

They are requests of a tenant as those over HTTP are, with its limits, its turns and its usage. What differs is that the
caller names an adapter by its reference, which over HTTP nobody can: an ephemeral one is in no catalog.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import NamedTuple

from loray.engine.memory.limits import check_length
from loray.errors import BaseNotFound, RequestError
from loray.policy.auth import share_of
from loray.policy.quotas import allowed_priority
from loray.spec import (
    Delta,
    FinishReason,
    GenerateRequest,
    Principal,
    SampleCall,
    SampledSequence,
    SampleResult,
    TokenLogprobs,
    cache_salt,
)
from loray.text.detokenizer import Detokenizer
from serve_apps.accounting.accounts import RequestUsage
from serve_apps.auth import Authenticator
from serve_apps.gateway.bases import ServedBase
from serve_apps.gateway.errors import failure_of
from serve_apps.gateway.gateway import Gateway

MAX_SAMPLES = 1024  # of one call


class _Answer:
    """One answer as it comes."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
        self.reason: FinishReason | None = None
        self.num_cached_tokens = 0
        self.has_begun = asyncio.Event()

    @property
    def delta(self) -> Delta | None:
        """Say what its account is charged with; None: nothing came."""
        if not self.has_begun.is_set():
            return None
        num_prompt, num_output = len(self.request.prompt_ids), len(self.token_ids)
        return Delta("", (), None, self.reason, num_prompt, num_output, self.num_cached_tokens)

    @property
    def sequence(self) -> SampledSequence:
        assert self.reason is not None
        logprobs = tuple(token.logprob for token in self.logprobs)
        top = tuple(token.top for token in self.logprobs) if self.request.params.logprobs else ()
        return SampledSequence(
            tuple(self.token_ids),
            logprobs,
            "length" if self.reason == "length" else "stop",
            self.num_cached_tokens,
            top,
        )


class _Asked(NamedTuple):
    base: ServedBase
    principal: Principal
    answers: Sequence[_Answer]


class Rollouts:
    """Samples with the engines of a gateway. Used from one event loop."""

    def __init__(self, gateway: Gateway, access: Authenticator) -> None:
        self._gateway, self._access = gateway, access
        self._places: dict[str, asyncio.Semaphore] = {}  # of each base, for all calls

    async def sample(self, call: SampleCall) -> SampleResult:
        """Answer a call. Cancelling it cancels its requests. A call whose gateway is lost is sent again by the caller:
        with a seed it has the same answers.

        Raises BaseNotFound, BaseMismatch, RequestError, ContextLengthExceeded, AdapterGone, PermissionDenied,
        RateLimited, Overloaded, EngineError.
        """
        received_at = asyncio.get_running_loop().time()
        gateway, access = self._gateway, self._access
        if call.key_id is None:
            principal = await access.of_tenant(call.tenant)
        else:
            principal = await access.of_account(call.key_id, call.tenant)
        gateway.accounts.enter(principal)
        await gateway.turns.enter(principal.tenant)
        try:
            asked = self._asked(call, principal)
            requests = [answer.request for answer in asked.answers]
            account = gateway.accounts.open(
                principal,
                requests,
                answer_id=requests[0].request_id,
                base=asked.base.name,
                num_choices=len(requests),
                received_at=received_at,
                open_ended=False,
            )
            outcome = "cancelled"
            try:
                await self._run(asked, account)
                outcome = "ok"
            except Exception as e:
                outcome = failure_of(e).error.code or "error"
                raise
            finally:
                account.close(outcome, [answer.delta for answer in asked.answers])
        finally:
            gateway.turns.leave(principal.tenant)
        first = asked.answers[0]
        return SampleResult(
            tuple(answer.sequence for answer in asked.answers),
            None if first.prompt_logprobs is None else tuple(token.logprob for token in first.prompt_logprobs),
            tuple(t.top for t in first.prompt_logprobs or ()) if first.request.params.prompt_logprobs else (),
        )

    async def retire(self, digests: Collection[str]) -> None:
        """Drop ephemeral adapters and all that was computed with them, on every replica. Requests that still use them
        end as they began.
        """
        await asyncio.gather(*(base.engines.retire(digests) for base in self._gateway.bases.values()))

    def _asked(self, call: SampleCall, principal: Principal) -> _Asked:
        """Check the call, and make its requests."""
        base, adapter, params = self._gateway.bases.get(call.base), call.adapter, call.params
        if base is None:
            known = ", ".join(sorted(self._gateway.bases))
            raise BaseNotFound(f"base {call.base!r} is not served here, but {known}; name one of these, or serve it")
        if not 1 <= call.num_samples <= MAX_SAMPLES:
            raise RequestError(f"num_samples is {call.num_samples}; ask for 1 to {MAX_SAMPLES}", "num_samples")
        if not call.prompt_ids:
            raise RequestError("the prompt is empty; give at least one token", "prompt_ids")
        if adapter is not None:
            adapter.check_base(base.name, base.base.fingerprint, base.base.of)
            adapter = replace(adapter, holders=tuple(dict.fromkeys((*adapter.holders, *call.holders))))
        check_length(base.limit_of(adapter), len(call.prompt_ids), params.max_tokens, param="prompt_ids")
        name, logprobs = f"sample-{uuid.uuid4().hex}", params.logprobs or 0
        prompt_ids = tuple(call.prompt_ids)
        answers = []
        for i in range(call.num_samples):
            own = {
                "seed": None if params.seed is None else params.seed + i,
                "logprobs": logprobs if params.max_tokens else None,
                "prompt_logprobs": params.prompt_logprobs if i == 0 else None,  # they need all of the prompt
            }
            answers.append(
                _Answer(
                    GenerateRequest(
                        request_id=f"{name}-{i}",
                        prompt_ids=prompt_ids,
                        params=params.model_copy(update=own),
                        adapter=adapter,
                        tenant=share_of(principal, None),
                        priority=allowed_priority(principal, call.priority),
                        cache_salt=cache_salt(principal.tenant, call.salt),
                        output_kind="delta" if params.stop else "final",  # the gateway finds stop strings
                    )
                )
            )
        return _Asked(base, principal, answers)

    async def _run(self, asked: _Asked, account: RequestUsage) -> None:
        """Let the first sample go ahead: the others follow its first token, when routers know who has their prompt."""
        first, *others = asked.answers
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._collect(asked.base, account, 0, first))
                if others:
                    await first.has_begun.wait()
                for i, answer in enumerate(others, 1):
                    group.create_task(self._collect(asked.base, account, i, answer))
        except ExceptionGroup as e:
            raise e.exceptions[0] from None  # the first error; it ended the others

    async def _collect(self, base: ServedBase, account: RequestUsage, index: int, answer: _Answer) -> None:
        request, asked_at = answer.request, 0
        text = Detokenizer(base.prompts.tokenizer, request.params, request.prompt_ids) if request.params.stop else None
        # As many as the replicas run: however many are asked for, people's requests find room to wait.
        places = self._places.setdefault(base.name, asyncio.Semaphore(base.num_at_once))
        async with places, aclosing(base.engines.generate(request, fit=False)) as deltas:
            async for delta in deltas:
                token_ids, answer.reason = delta.token_ids, delta.finish_reason
                if text is not None:
                    _, num_tokens, stop = text.push(token_ids, delta.finish_reason)
                    if stop is not None:
                        token_ids, answer.reason = token_ids[:num_tokens], "stop"
                answer.token_ids += token_ids
                answer.logprobs += (delta.logprobs or ())[: len(token_ids)]
                answer.prompt_logprobs = answer.prompt_logprobs or delta.prompt_logprobs
                answer.num_cached_tokens = delta.num_cached_tokens
                answer.has_begun.set()
                if answer.reason is not None:
                    return
                if len(answer.token_ids) >= asked_at:
                    asked_at = account.asked_again_at(index, len(answer.token_ids))
