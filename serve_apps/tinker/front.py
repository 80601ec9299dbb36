"""The front as a whole: its parts, what they share, and what it looks after by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from loray.bases.registry import get_base
from loray.catalog import Catalog
from loray.errors import LimitExceeded, LorayError, NotFoundError, RequestError
from loray.policy.auth import check
from loray.publishing.publish import Destination
from loray.schemas.tinker.paths import RequestId
from loray.schemas.tinker.requests import CreateModelRequest, LoadWeightsRequest
from loray.settings import Settings
from loray.spec import AnyDType, Principal, UsageEvent
from loray.spec.tinker import TinkerSession
from loray.store import AdapterStore, open_store
from loray.telemetry import get_logger
from serve_apps.accounting.usage import UsageWriter
from serve_apps.tinker.checkpoints import Checkpoints, Publisher, publish_files
from serve_apps.tinker.futures import POLL_S, Answer, Futures
from serve_apps.tinker.sampling import Gateways, Sampling
from serve_apps.tinker.sessions import SESSION_IDLE_S, SOON_IDLE_S, Records, ServedName, ServedNames, Sessions
from serve_apps.tinker.trainers import TrainerAway, Trainers
from serve_apps.tinker.training import Training

_log = get_logger(__name__)

WATCH_S = 30.0


class Usage(Protocol):
    """Takes what passes use, and has written it down when it is closed."""

    def add(self, event: UsageEvent) -> None: ...

    def close(self) -> None: ...


class Front:
    """All operations of the protocol."""

    def __init__(
        self,
        names: ServedNames,
        records: Records,
        trainers: Trainers,
        gateways: Gateways,
        publish: Publisher,
        usage: Usage,
    ) -> None:
        """`usage` is closed with the front."""
        self.names, self.records, self.trainers = names, records, trainers
        self.futures = Futures()
        self.sessions = Sessions(records)
        self.training = Training(names, records, self.futures, trainers, usage.add)
        self.sampling = Sampling(names, records, self.futures, gateways)
        self.checkpoints = Checkpoints(self.training, publish)
        self._usage = usage
        self._has_looked = False

    async def result(self, principal: Principal, request_id: RequestId) -> Answer | None:
        """Wait for the result of a request; None: it has not come yet. Raises LorayError."""
        check(principal, "train" if request_id.is_training else "infer")
        if request_id.is_training:
            return await self.checkpoints.result(principal, request_id)
        future = self.futures.find(str(request_id), principal.tenant)
        if future is None:
            return await self.sampling.result(principal, request_id)
        return await future.wait(POLL_S)

    def waits_for(self, request_id: str, principal: Principal) -> tuple[str, str | None]:
        """Return the state of a request that has no result yet, and the reason."""
        future = self.futures.find(request_id, principal.tenant)
        return ("active", None) if future is None else (future.state, future.reason)

    async def session(self, principal: Principal, session_id: str) -> dict[str, Any]:
        session = await self.records.session(principal, session_id)

        def read(catalog: Catalog) -> tuple[list[str], list[str]]:
            models, _ = catalog.tinker.models(limit=1000, session_id=session_id)
            return [model.id for model in models], [sampler.id for sampler in catalog.tinker.samplers(session_id)]

        models, samplers = await self.records.ask(principal, read)
        return {
            "training_run_ids": models,
            "sampler_ids": samplers,
            "user_metadata": dict(session.metadata),
            "display_name": session.display_name,
        }

    async def begin_model(self, principal: Principal, asked: CreateModelRequest | LoadWeightsRequest) -> dict[str, Any]:
        """Begin a model, as `Training.create` and `create_from` do. Where the tenant has as many as it may, those of
        clients that are not heard of any more end before.
        """

        async def begin() -> dict[str, Any]:
            if isinstance(asked, CreateModelRequest):
                return await self.training.create(principal, asked)
            return await self.training.create_from(principal, asked)

        try:
            return await begin()
        except LimitExceeded:
            left = await self.sessions.idle(SOON_IDLE_S, training_of=principal.tenant)
            if not left:
                raise
            await self._end_idle(left)
            return await begin()

    async def end_session(self, principal: Principal, session_id: str, end: str) -> None:
        """End a session: its models give back their slots, and are saved before unless the client is content."""
        session = await self.records.session(principal, session_id)
        if session.end is not None:
            return
        await self.sessions.end(principal, session, end)
        await self._end_left_models()
        await self._forget(principal, session_id)

    async def _end_idle(self, idle: Sequence[TinkerSession]) -> None:
        for session in idle:
            await self.end_session(Principal(tenant=session.tenant), session.id, "idle")

    async def _forget(self, principal: Principal, session_id: str) -> None:
        await self.sampling.retire(principal, session_id)
        self.records.forget(session_id)

    async def _end_left_models(self) -> None:
        """Give back the slots of models whose sessions have ended. One that cannot be ended now is looked at again."""
        for model, end in await self.records.ask_all(lambda catalog: catalog.tinker.left_models()):
            try:
                if end != "success":
                    await self.checkpoints.autosave(Principal(tenant=model.tenant), model)
                await self.training.end(model)
            except NotFoundError:  # the trainer had no model of this id any more
                await self.records.ask_all(partial(_end, model.id))
            except LorayError as e:
                _log.warning("model %s keeps its slot for now: %s", model.id, e)

    # -- by itself ----------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Look after sessions whose clients have gone, checkpoints whose time is over, and what the console shows."""
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                await self.look()
            except LorayError as e:
                _log.warning("sessions of Tinker's protocol are not looked after: %s", e)
            except Exception:  # noqa: BLE001 - the next look may succeed
                _log.exception("sessions of Tinker's protocol are not looked after")

    async def look(self) -> None:
        bases = set(self.trainers.bases)
        if not self._has_looked:  # another process of this kind may have begun them
            bases |= await self.records.ask_all(lambda catalog: catalog.tinker.live_bases())
            self._has_looked = True
        for base in bases:
            with suppress(TrainerAway, RequestError):  # RequestError: it is not served any more
                status: Mapping[str, Any] = await self.trainers.ask(base, "status")
                await self.records.ask_all(partial(_note, status["models"]))
        await self._end_idle(await self.sessions.idle(SESSION_IDLE_S))
        await self._end_left_models()
        open_ids = self.records.open_sessions()
        for session in await self.records.ask_all(lambda catalog: catalog.tinker.ended_sessions(open_ids)):
            await self._forget(Principal(tenant=session.tenant), session.id)
        await self.checkpoints.delete_expired()

    async def close(self) -> None:
        self.futures.close()
        await asyncio.to_thread(self._usage.close)


def _end(model_id: str, catalog: Catalog) -> None:
    catalog.tinker.end_model(model_id)


def _note(models: Mapping[str, Any], catalog: Catalog) -> None:
    catalog.tinker.note_progress(models)


def open_front(settings: Settings) -> Front:
    """Open the front of the deployment in this Ray cluster, on its catalog and store."""
    from jobs.sampling import Sampler
    from jobs.trainer import TrainerClient, trainer_of

    catalog = Catalog.of(settings, actor="tinker")
    store, sampler = AdapterStore(open_store(settings.store)), Sampler()

    def publish(
        principal: Principal, name: str, served: ServedName, files: Mapping[str, bytes]
    ) -> tuple[str, str, int]:
        return publish_files(Destination(name, store, catalog.view(principal)), served, files)

    def find(base: str, dtype: AnyDType) -> TrainerClient:
        return TrainerClient(trainer_of(base, dtype))

    names = ServedNames(sampler.bases, partial(get_base, settings.home), settings.tinker_names)
    usage = UsageWriter.of(settings)
    return Front(names, Records(catalog), Trainers(names, find), sampler, publish, usage)
