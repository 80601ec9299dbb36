"""Checkpoints: training state in the run's folder, sampler weights as versions of the catalog, and their lists."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Protocol

from loray.catalog import Catalog
from loray.errors import AdapterNotFound, ConflictError, LorayError, NotFoundError, RequestError
from loray.files import scratch_folder
from loray.publishing.publish import Destination, import_folder
from loray.schemas.tinker import results
from loray.schemas.tinker.paths import CheckpointPath, RequestId, check_checkpoint_name, sampler_id_of
from loray.schemas.tinker.requests import SaveWeightsForSamplerRequest, SaveWeightsRequest, as_texts
from loray.spec import AdapterRef, Principal
from loray.spec.datums import Publish, SaveState
from loray.spec.tinker import CheckpointKind, TinkerCheckpoint, TinkerModel, TinkerSampler
from loray.telemetry import get_logger
from serve_apps.tinker.futures import POLL_S, Answer, Future
from serve_apps.tinker.sessions import ServedName, now
from serve_apps.tinker.trainers import TrainerAway
from serve_apps.tinker.training import Training, answer

_log = get_logger(__name__)


class Publisher(Protocol):
    """Publishes files, by their names, as the next version of a name."""

    def __call__(
        self, principal: Principal, name: str, served: ServedName, files: Mapping[str, bytes]
    ) -> tuple[str, str, int]:
        """Return `NAME@VERSION`, the digest and the bytes. It blocks. Raises LorayError."""
        ...


@dataclass
class Checkpoints:
    """Saves what models have learnt, and lists it."""

    training: Training
    publish: Publisher

    async def save(self, principal: Principal, asked: SaveWeightsRequest) -> dict[str, Any]:
        """Save a model's weights and optimizer state under a name. Raises RequestError for one that is taken, and
        LimitExceeded where the tenant stores as much as it may.
        """
        model = await self.training.live_model(principal, asked.model_id)
        row = _row(model, "training", asked.name, asked.seq_id, asked.ttl_seconds, asked.user_metadata)
        if not asked.overwrite:
            await self._check_name(principal, row)
        await self.training.records.ask(
            principal, lambda catalog: catalog.adapters.check_stored_bytes(catalog.tinker.stored_bytes)
        )
        told = await self.training.submit(model, asked.seq_id, SaveState(model.id, asked.name))
        await self._add(principal, row, overwrite=asked.overwrite)
        self._start(principal, model, RequestId(model.id, True, asked.seq_id), row)
        return told

    async def save_for_sampler(self, principal: Principal, asked: SaveWeightsForSamplerRequest) -> dict[str, Any]:
        """Publish a model's weights, or give them to a sampling session alone."""
        model = await self.training.live_model(principal, asked.model_id)
        what: TinkerCheckpoint | TinkerSampler
        if asked.path is not None:
            name = check_checkpoint_name(asked.path)
            what = _row(model, "sampler", name, asked.seq_id, asked.ttl_seconds, asked.user_metadata)
            await self._check_name(principal, what)
            told = await self.training.submit(model, asked.seq_id, Publish(model.id))
            await self._add(principal, what, overwrite=False)
        else:
            assert asked.sampling_session_seq_id is not None
            what = TinkerSampler(
                id=sampler_id_of(model.session_id, asked.sampling_session_seq_id),
                session_id=model.session_id,
                tenant=model.tenant,
                base=model.base,
                base_model=model.base_model,
                model_id=model.id,
                seq=asked.seq_id,
                inflight=asked.kind == "inflight",
                is_ready=False,
            )
            sampler: TinkerSampler = what
            known = await self.training.records.ask(principal, lambda catalog: catalog.tinker.add_sampler(sampler))
            if (known.model_id, known.seq, known.inflight) != (model.id, asked.seq_id, sampler.inflight):
                raise RequestError(f"sampling session {what.id} is there already", "sampling_session_seq_id")
            told = await self.training.submit(model, asked.seq_id, Publish(model.id))
        self._start(principal, model, RequestId(model.id, True, asked.seq_id), what)
        return told

    async def _check_name(self, principal: Principal, row: TinkerCheckpoint) -> None:
        """Raises RequestError where another request has saved under the name, before this one counts."""
        try:
            await self.training.records.ask(
                principal, lambda catalog: catalog.tinker.check_name(row.model_id, row.kind, row.name, row.seq)
            )
        except ConflictError as e:
            raise RequestError(str(e), "path") from e

    async def _add(self, principal: Principal, row: TinkerCheckpoint, *, overwrite: bool) -> None:
        """Raises RequestError where another request has saved under the name."""
        try:
            await self.training.records.ask(
                principal, lambda catalog: catalog.tinker.add_checkpoint(row, overwrite=overwrite)
            )
        except ConflictError as e:
            raise RequestError(str(e), "path") from e

    async def result(self, principal: Principal, request_id: RequestId) -> Answer | None:
        """Wait for the result of a request of a model's queue; None: it has not come yet. Raises what it has failed
        with. What is saved is written down first, also where another process of this kind was asked to save it.
        """
        records, trainers = self.training.records, self.training.trainers
        model = await records.model(principal, request_id.of)
        if request_id.seq == 0:
            return await self.training.start_beginning(principal, model, request_id).wait(POLL_S)
        future = self.training.futures.find(str(request_id), principal.tenant)
        if future is not None:
            return await future.wait(POLL_S)
        failure: LorayError = NotFoundError(f"what {request_id} has saved is not there any more")
        try:
            found = await trainers.ask(model.base, "result", model.id, request_id.seq, POLL_S)
            if found is None:
                return None
            if not _is_saved(found):
                return answer(model.id, found)
        except TrainerAway:
            raise
        except LorayError as e:
            failure = e
        saved = await records.ask(principal, lambda catalog: catalog.tinker.saved_by(request_id.of, request_id.seq))
        if saved is None:
            raise failure
        return await self._start(principal, model, request_id, saved).wait(POLL_S)

    def _start(
        self,
        principal: Principal,
        model: TinkerModel,
        request_id: RequestId,
        what: TinkerCheckpoint | TinkerSampler,
    ) -> Future:
        """Wait for the trainer, then write down what it has saved. After a restart of this process, the next question
        for the result begins this again.
        """

        async def work(future: Future) -> Answer:
            try:
                found = await self.training.trainers.result(future, model.base, model.id, request_id.seq)
            except TrainerAway:
                raise
            except LorayError:  # nothing was saved: the name is free again
                await self.training.records.ask(
                    principal, lambda catalog: catalog.tinker.forget_save(model.id, request_id.seq)
                )
                raise
            if isinstance(what, TinkerSampler):
                return await self._sampler_saved(principal, what, *found)
            if what.kind == "training":
                return await self._state_saved(principal, what, found)
            return await self._published(principal, model, what, *found)

        asked = what.id if isinstance(what, TinkerSampler) else (what.kind, what.name)
        return self.training.futures.start(str(request_id), model.tenant, asked, work)

    async def _state_saved(self, principal: Principal, row: TinkerCheckpoint, found: Mapping[str, Any]) -> Answer:
        done = replace(row, folder=found["folder"], nbytes=found.get("nbytes", 0), is_ready=True)
        await self.training.records.ask(principal, lambda catalog: catalog.tinker.finish_checkpoint(done))
        return {"type": "save_weights", "path": str(CheckpointPath(row.model_id, row.kind, row.name))}

    async def _published(
        self, principal: Principal, model: TinkerModel, row: TinkerCheckpoint, ref: AdapterRef, holder: str
    ) -> Answer:
        files = await self.training.trainers.ask(model.base, "give", ref.digest)
        served = await self.training.names.find(model.base)
        version, digest, nbytes = await asyncio.to_thread(self.publish, principal, model.name, served, files)
        done = replace(row, version=version, digest=digest, nbytes=nbytes, is_ready=True)
        await self.training.records.ask(principal, lambda catalog: catalog.tinker.finish_checkpoint(done))
        return {"type": "save_weights_for_sampler", "path": str(CheckpointPath(row.model_id, row.kind, row.name))}

    async def _sampler_saved(
        self, principal: Principal, sampler: TinkerSampler, ref: AdapterRef, holder: str
    ) -> Answer:
        done = replace(sampler, adapter=ref, holders=(holder,), is_ready=True)
        await self.training.records.ask(principal, lambda catalog: catalog.tinker.finish_sampler(done))
        self.training.records.put(done)
        return {"type": "save_weights_for_sampler", "sampling_session_id": sampler.id}

    async def autosave(self, principal: Principal, model: TinkerModel) -> None:
        """Save the state of a model whose client has gone, so that it can go on from there."""
        status = await self.training.trainers.ask(model.base, "status")
        step = int(status.get("models", {}).get(model.id, {}).get("step", model.num_steps))
        name = f"autosave-{step}"
        row = replace(_row(model, "training", name, 0, None, None), is_ready=True)
        folder = await self.training.trainers.ask(model.base, "save", model.id, name)
        await self._add(principal, replace(row, folder=folder), overwrite=True)

    # -- lists ---------------------------------------------------------------------------------------------------------

    async def weights_info(self, principal: Principal, path: str) -> dict[str, Any]:
        parsed = CheckpointPath.parse(path)
        await self.training.records.ask(
            principal, lambda catalog: catalog.tinker.checkpoint(parsed.model_id, parsed.kind, parsed.name)
        )
        return results.weights_info(await self.training.records.model(principal, parsed.model_id))

    async def runs(self, principal: Principal, limit: int, offset: int) -> dict[str, Any]:
        def read(catalog: Catalog) -> tuple[list[dict[str, Any]], int]:
            models, total = catalog.tinker.models(limit=limit, offset=offset)
            return [results.training_run(m, catalog.tinker.checkpoints(m.id, limit=1000)[0]) for m in models], total

        found, total = await self.training.records.ask(principal, read)
        return {"training_runs": found, "cursor": results.cursor(offset, limit, total)}

    async def run(self, principal: Principal, model_id: str) -> dict[str, Any]:
        model = await self.training.records.model(principal, model_id)
        rows, _ = await self.training.records.ask(
            principal, lambda catalog: catalog.tinker.checkpoints(model_id, limit=1000)
        )
        return results.training_run(model, rows)

    async def page(self, principal: Principal, model_id: str | None, limit: int, offset: int) -> dict[str, Any]:
        if model_id is not None:
            await self.training.records.model(principal, model_id)
        rows, total = await self.training.records.ask(
            principal, lambda catalog: catalog.tinker.checkpoints(model_id, limit=limit, offset=offset)
        )
        return {"checkpoints": list(map(results.checkpoint, rows)), "cursor": results.cursor(offset, limit, total)}

    async def set_ttl(self, principal: Principal, path: CheckpointPath, ttl_s: int | None) -> None:
        until = None if ttl_s is None else now() + timedelta(seconds=ttl_s)
        await self.training.records.ask(
            principal, lambda catalog: catalog.tinker.set_expiry(path.model_id, path.kind, path.name, until)
        )

    async def delete(self, principal: Principal, path: CheckpointPath) -> None:
        """Delete a checkpoint with its bytes. Raises NotFoundError, and RequestError where an alias has the version."""
        row = await self.training.records.ask(
            principal, lambda catalog: catalog.tinker.checkpoint(path.model_id, path.kind, path.name)
        )
        try:
            await self._delete(principal, row)
        except ConflictError as e:
            raise RequestError(str(e), "path") from e

    async def delete_expired(self) -> None:
        """Delete checkpoints whose time is over. One that cannot be deleted now is looked at again."""
        expired: Sequence[TinkerCheckpoint] = await self.training.records.ask_all(
            lambda catalog: catalog.tinker.expired(now())
        )
        for row in expired:
            try:
                await self._delete(Principal(tenant=row.tenant), row)
            except ConflictError as e:
                _log.warning("checkpoint %s of %s is kept: %s", row.name, row.model_id, e)
                await self.set_ttl(Principal(tenant=row.tenant), CheckpointPath(row.model_id, row.kind, row.name), None)

    async def _delete(self, principal: Principal, row: TinkerCheckpoint) -> None:
        """Raises ConflictError where an alias has the version."""

        def delete(catalog: Catalog) -> None:
            if row.version is not None:
                with suppress(AdapterNotFound):  # it was deleted by its name
                    _delete_version(catalog, row)
            catalog.tinker.delete_checkpoint(row.model_id, row.kind, row.name)

        if row.folder is not None:
            model = await self.training.records.model(principal, row.model_id)
            await self.training.trainers.ask(model.base, "delete", row.folder)
        await self.training.records.ask(principal, delete)


def _is_saved(result: object) -> bool:
    """Return whether a trainer's result is of SaveState or Publish."""
    return isinstance(result, tuple) or (isinstance(result, Mapping) and "folder" in result)


def _delete_version(catalog: Catalog, row: TinkerCheckpoint) -> None:
    """Delete the version of sampler weights. The only one of a name goes with the name, unless its model may publish
    more under that. Raises ConflictError where an alias has it.
    """
    name, _, version = (row.version or "").partition("@")
    entry = catalog.adapters.get(name)
    if len(entry.versions) > 1 or entry.aliases:
        catalog.removal.delete_version(name, int(version))
    elif not catalog.tinker.model(row.model_id).is_live:
        catalog.removal.delete_adapter(name)


def _row(
    model: TinkerModel, kind: CheckpointKind, name: str, seq: int, ttl_s: int | None, metadata: Mapping[str, Any] | None
) -> TinkerCheckpoint:
    at = now()
    return TinkerCheckpoint(
        model_id=model.id,
        tenant=model.tenant,
        kind=kind,
        name=name,
        seq=seq,
        metadata=as_texts(metadata),
        created_at=at,
        expires_at=None if ttl_s is None else at + timedelta(seconds=ttl_s),
    )


def publish_files(to: Destination, served: ServedName, files: Mapping[str, bytes]) -> tuple[str, str, int]:
    """Publish files that have a manifest already, whose digest stays. Raises as `import_folder`."""
    with scratch_folder() as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        version = import_folder(folder, served.base, to)
    return f"{to.name}@{version.version}", version.digest, sum(map(len, files.values()))
