"""Sampling sessions, and samples from them by the gateways."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

from loray.errors import ClusterError, EngineError, LorayError, NotFoundError, RequestError
from loray.schemas.tinker.paths import CheckpointPath, RequestId, sampler_id_of
from loray.schemas.tinker.requests import CreateSamplingSessionRequest, SampleRequest
from loray.schemas.tinker.results import sample_bytes
from loray.spec import Principal, SampleCall, SampleResult
from loray.spec.tinker import TinkerSampler
from serve_apps.tinker.futures import MOST_OPEN, Answer, Future, Futures
from serve_apps.tinker.sessions import Records, ServedNames

_TRIES = 4
_RETRY_S = 1.0


class Gateways(Protocol):
    """What samples: any gateway of the deployment (`jobs.sampling.Sampler`)."""

    async def sample(self, call: SampleCall) -> SampleResult: ...

    async def retire(self, digests: list[str]) -> None: ...


class SampleGone(NotFoundError):
    """The front that had the sample was restarted; the client sends it anew."""

    status = 410


@dataclass
class Sampling:
    """Samples, each of which is a call of a gateway."""

    names: ServedNames
    records: Records
    futures: Futures
    gateways: Gateways

    async def create(self, principal: Principal, asked: CreateSamplingSessionRequest) -> dict[str, Any]:
        """Begin a sampling session on a base, or on published weights."""
        await self.records.open_session(principal, asked.session_id)
        sampler_id = sampler_id_of(asked.session_id, asked.sampling_session_seq_id)
        if asked.model_path is not None:
            sampler = await self._of_path(principal, asked.session_id, sampler_id, asked.model_path)
        else:
            served = await self.names.find(asked.base_model or "")
            sampler = TinkerSampler(
                id=sampler_id,
                session_id=asked.session_id,
                tenant=principal.tenant,
                base=served.base.name,
                base_model=served.name,
            )
        known: TinkerSampler = await self.records.ask(principal, lambda catalog: catalog.tinker.add_sampler(sampler))
        if (known.base, known.path, known.model_id) != (sampler.base, sampler.path, sampler.model_id):
            raise RequestError(f"sampling session {sampler_id} was begun before on another model", "model_path")
        self.records.put(known)
        return {"type": "create_sampling_session", "sampling_session_id": sampler_id}

    async def _of_path(self, principal: Principal, session_id: str, sampler_id: str, path: str) -> TinkerSampler:
        parsed = CheckpointPath.parse(path)
        if parsed.kind != "sampler":
            raise RequestError(
                f"{path} is a training checkpoint: sample from what save_weights_for_sampler has saved "
                "(tinker://MODEL/sampler_weights/NAME)",
                "model_path",
            )
        checkpoint = await self.records.ask(
            principal, lambda catalog: catalog.tinker.checkpoint(parsed.model_id, parsed.kind, parsed.name)
        )
        model = await self.records.model(principal, parsed.model_id)
        adapter = await self.records.ask(principal, lambda catalog: catalog.adapters.resolve(checkpoint.version or ""))
        return TinkerSampler(
            id=sampler_id,
            session_id=session_id,
            tenant=principal.tenant,
            base=model.base,
            base_model=model.base_model,
            path=path,
            adapter=adapter,
        )

    async def join(self, principal: Principal, sampler_id: str) -> dict[str, Any]:
        """Give a copy of the client a number of its own, so that its requests have others than the first one's."""
        await self.records.sampler(principal, sampler_id)
        number: int = await self.records.ask(principal, lambda catalog: catalog.tinker.join_sampler(sampler_id))
        return {"type": "join_sampling_session", "client_counter": number}

    async def info(self, principal: Principal, sampler_id: str) -> dict[str, Any]:
        sampler = await self.records.sampler(principal, sampler_id)
        return {"sampler_id": sampler.id, "base_model": sampler.base_model, "model_path": sampler.path}

    async def sample(self, principal: Principal, asked: SampleRequest) -> dict[str, Any]:
        """Begin a sample. Raises RequestError, and Overloaded where the tenant has too many."""
        sampler = await self.records.sampler(principal, asked.sampling_session_id)
        session = await self.records.open_session(principal, sampler.session_id)
        if not sampler.is_ready:
            raise RequestError(f"the weights of {sampler.id} are not saved yet", "sampling_session_id")
        served = await self.names.find(sampler.base_model)
        prompt = asked.prompt.token_ids
        if max(prompt) >= served.base.config.vocab_size:
            raise RequestError(f"a token of the prompt is outside of the vocabulary of {served.name}", "prompt")
        params = asked.params(served.context_length)
        request_id = RequestId(sampler.id, False, asked.seq_id)

        async def work(future: Future) -> Answer:
            now = await self._newest(sampler)  # of an in-flight session, when the request starts
            call = SampleCall(
                base=sampler.base,
                adapter=now.adapter,
                prompt_ids=prompt,
                params=params,
                num_samples=asked.num_samples,
                tenant=principal.tenant,
                key_id=principal.key_id,
                priority=session.priority,
                holders=now.holders,
            )
            result = await self._asked(call)
            tops = asked.topk_prompt_logprobs, asked.topk_sample_logprobs
            return sample_bytes(result, len(prompt), asked.prompt_logprobs_last_n, *tops)

        body = hashlib.sha256(asked.model_dump_json().encode()).digest()
        self.futures.start(str(request_id), principal.tenant, body, work, MOST_OPEN)
        ids = [f"{request_id}.{i}" for i in range(asked.num_samples)]
        return {"request_id": str(request_id), "sample_sequence_ids": ids}

    async def _newest(self, sampler: TinkerSampler) -> TinkerSampler:
        if not sampler.inflight:
            return sampler
        newest = await self.records.ask_all(lambda catalog: catalog.tinker.inflight(sampler.model_id or ""))
        return newest or sampler

    async def _asked(self, call: SampleCall) -> SampleResult:
        """Ask a gateway, and another one where it has died. Raises LorayError."""
        for left in reversed(range(_TRIES)):
            try:
                return await self.gateways.sample(call)
            except LorayError as e:
                if not isinstance(e, EngineError | ClusterError) or not left:
                    raise
            except Exception as e:
                if not left:
                    raise EngineError(f"no gateway has answered: {e}") from e
            await asyncio.sleep(_RETRY_S)
        raise AssertionError

    async def result(self, principal: Principal, request_id: RequestId) -> Answer | None:
        """Raises SampleGone where this process does not know the sample."""
        await self.records.sampler(principal, request_id.of)
        raise SampleGone(f"the sample {request_id} is not here any more; send it again")

    async def retire(self, principal: Principal, session_id: str) -> None:
        """Forget the weights of a session's sampling sessions that have no path."""
        samplers = await self.records.ask(principal, lambda catalog: catalog.tinker.samplers(session_id))
        digests = [s.adapter.digest for s in samplers if s.adapter is not None and s.path is None]
        if digests:
            await self.gateways.retire(digests)
