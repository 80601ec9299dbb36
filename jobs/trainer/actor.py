"""The trainer of a base: queues of operations of many models, which share passes, and what is left when it is killed.

An operation is accepted when it is in its model's journal. It is done in its turn, which is its number. After a kill,
the last snapshots and then the journals give what was there before, so that what was accepted is done exactly once.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import torch
from pydantic import TypeAdapter, ValidationError

from jobs.runs.folders import RunFolder, open_runs
from jobs.trainer.calls import CallServer
from jobs.trainer.models import ModelRecord, Published, Result, Snapshot, TrainedModel
from jobs.trainer.publishing import Versions
from jobs.trainer.states import SavedState, as_folder, delete_state, load_state, save_state
from jobs.workers.worker import preset_threads
from loray.adapters.manifest import read_manifest, with_manifest
from loray.adapters.peft_format import read_adapter
from loray.bases.registry import ensure_base
from loray.errors import ConflictError, LorayError, NotFoundError, Overloaded, SpecError, StoreError, TrainingError
from loray.machine import hardware, memory_left, training_dtype
from loray.methods.weights import AdapterWeights
from loray.planning.many import TOKENS_PER_PASS_ON_CPU
from loray.planning.run import count_trained
from loray.priority import ForegroundTime, YieldGate, compute_in_background
from loray.settings import Settings
from loray.spec import DTYPE_BYTES, AdapterSpec, AnyDType
from loray.spec.datums import ForwardBackward, LoadState, LossOutput, Op, OptimStep, Publish, SaveState
from loray.store import NODE_CACHE_BYTES, AdapterCache, AdapterStore, open_store
from loray.telemetry import configure_logging, get_logger
from loray.train.journal import SnapshotClock
from loray.train.many.bank import AdapterBank
from loray.train.many.trainer import BankTrainer
from loray.train.model import load_model
from loray.train.optimizer import OptimizerState
from loray.train.yielding import yield_at_layers

log = get_logger(__name__)
T = TypeVar("T")

_TOKENS_PER_PASS_ON_GPU = 16_384
_LEAST_TOKENS = 256
_SHARE, _SHARE_OF_PASS = 0.5, 0.25  # of the memory that is left beside the base: for adapters, and for a pass
_IDLE_S = 600.0  # after which a model leaves the bank, and after which without a model in it the trainer ends
_SOON_IDLE_S = 60.0  # the same where another model wants its place
_LOOK_S = 15.0
_DIGEST_LENGTH = 64
_MODELS = "models"  # the folder of their folders
_LOCK_S = 30.0  # in which a process that was killed is gone
_ADAPTER: TypeAdapter[AdapterSpec] = TypeAdapter(AdapterSpec)


class Trainer:
    """An actor's methods. It computes in one thread, in the background; everything else is on its event loop."""

    def __init__(self, base: str, dtype: AnyDType, name: str) -> None:
        """Load the base, and go on with the models that are in its folder. `name`: of the actor."""
        settings = Settings.from_env()
        configure_logging(settings.log_level)
        self._name = name
        self._runs, self._states = open_runs(settings, "trainers"), open_runs(settings, "states")
        self._held = ExitStack()
        self._lock(self._runs.open(base, name))
        self._base = ensure_base(settings.home, base)
        on_gpu = torch.cuda.is_available()
        self._dtype = training_dtype(hardware(), use_gpu=on_gpu).dtype if dtype == "auto" else dtype
        model = load_model(self._base, dtype=self._dtype)
        if on_gpu:
            model.cuda()
        else:
            preset = preset_threads(Path("/proc/self/environ").read_bytes())
            torch.set_num_threads(preset or len(os.sched_getaffinity(0)))
            yield_at_layers(model, YieldGate(ForegroundTime(settings.home)))
        left = torch.cuda.mem_get_info()[0] if on_gpu else memory_left()
        self._room = int(_SHARE * left)
        most = _TOKENS_PER_PASS_ON_GPU if on_gpu else TOKENS_PER_PASS_ON_CPU
        self._tokens_per_pass = max(_LEAST_TOKENS, min(most, int(_SHARE_OF_PASS * left) // self._bytes_per_token()))
        self._trainer = BankTrainer(AdapterBank(model, self._base, self._dtype), self._tokens_per_pass)
        store = AdapterStore(open_store(settings.store))
        self._cache = AdapterCache(store, settings.home / "cache", NODE_CACHE_BYTES)
        self._versions = Versions(self._base, self._cache, name)
        self._clock = SnapshotClock()
        self._models: dict[str, TrainedModel] = {}
        self._failed: list[str] = []  # models that could not be read
        for folder in self._runs.make(f"{base}/{_MODELS}").folders():
            self._recover(folder)
        self._thread = ThreadPoolExecutor(1, "trainer", initializer=None if on_gpu else compute_in_background)
        self._calls = CallServer(self)
        self._changing = asyncio.Lock()  # what the thread computes, and which models there are
        self._wake = asyncio.Event()
        self._wake.set()
        self._task: asyncio.Task[None] | None = None
        self._used_at = time.monotonic()

    # -- methods of the actor -----------------------------------------------------------------------------------------

    async def listen(self) -> str:
        """Return the name of the socket over which processes of this node may call the other methods."""
        return await self._calls.start()

    async def create(self, model: str, spec: dict[str, Any], seed: int, initial: str | None = None) -> dict[str, Any]:
        """Begin a model: with new weights from `seed`, those of a published adapter (its digest), or those of a saved
        state (its folder). The same again is the same model.

        Raises SpecError, UnsupportedError, ConflictError where the name is another model's, and Overloaded where no
        room is left.
        """
        self._begin()
        try:
            adapter = _ADAPTER.validate_python(spec)
        except ValidationError as e:
            raise SpecError(f"the adapter of model {model} is not valid: {e}") from e
        async with self._changing:
            known = self._models.get(model)
            if known is not None:
                record = known.record
                if (record.adapter, record.seed, record.initial) != (adapter, seed, initial):
                    raise ConflictError(f"there is a model {model} of another kind; choose another name")
            else:
                await self._make_room(adapter)
                record = ModelRecord(
                    model=model, adapter=adapter, seed=seed, initial=initial, created_at=datetime.now(UTC)
                )
                known = await self._compute(self._create, record)
                self._models[model] = known
        return {"model": model, "step": known.num_steps, "next_seq": known.next_seq, "dtype": self._dtype}

    async def submit(self, model: str, seq_id: int, op: Op) -> None:
        """Accept an operation of a model; numbers are from 1 on, and may come in any order. The same again changes
        nothing. Raises ConflictError where another operation has the number, and Overloaded where too many wait.
        """
        self._begin()
        if op.model != model or seq_id < 1:
            raise SpecError(f"operation {seq_id} of {op.model} was sent for {model}; numbers begin at 1")
        nbytes = await self._find(model).accept(seq_id, op)
        if nbytes:
            self._clock.accepted(nbytes)
        self._used_at = time.monotonic()
        self._wake.set()

    async def result(
        self, model: str, seq_id: int, timeout_s: float
    ) -> LossOutput | Mapping[str, Any] | Published | None:
        """Wait for an operation's result; None where it is not there in time. Raises what the operation failed with."""
        self._begin()
        return await self._find(model).result(seq_id, timeout_s)

    async def publish(self, model: str, kind: str = "ephemeral", keep: int | None = None) -> Published:
        """Make an ephemeral adapter of the weights as they are, of which this actor gives the bytes. Of the model the
        last `keep` stay; None: all, as far as the node's cache has room. Returns its reference and this actor's name.
        """
        found = self._find(model)
        async with self._changing:
            await self._enter(found)
            return await self._compute(self._publish, found, keep)

    async def give(self, digest: str) -> Mapping[str, bytes]:
        """Return the files of a published version. Raises AdapterGone."""
        return await asyncio.to_thread(self._versions.give, digest)

    async def retire(self, digests: Collection[str]) -> None:
        """Drop versions that nobody samples any more."""
        self._versions.retire(digests)

    async def save(self, model: str, name: str) -> str:
        """Save the state as it is, and return its folder; a state of this name is replaced."""
        found = self._find(model)
        async with self._changing:
            await self._enter(found)
            return str((await self._compute(self._save, found, name))["folder"])

    async def load(self, model: str, path: str, with_optimizer: bool) -> dict[str, Any]:
        """Take the weights of a saved state, with the optimizer's state or without. Gradients are 0 afterwards."""
        found = self._find(model)
        async with self._changing:
            await self._enter(found)
            result = await self._compute(self._load, found, path, with_optimizer)
            await self._snapshot([found])
            return result

    async def delete(self, path: str) -> None:
        """Delete a saved state by the folder that a save has returned. No error where there is none."""
        await asyncio.to_thread(delete_state, self._states, path)

    async def remove(self, model: str) -> None:
        """End a model, and delete what is kept of it, but for states that were saved. No error where there is none."""
        async with self._changing:
            found = self._models.pop(model, None)
            if found is None:
                return
            if found.resident:
                await self._compute(self._trainer.remove, model)
            await asyncio.to_thread(self._versions.forget, model)
            await asyncio.to_thread(found.folder.remove_all)
        self._used_at = time.monotonic()

    async def status(self) -> dict[str, Any]:
        """Describe the models, and why some of the folder could not be read."""
        self._begin()
        models = {
            m.name: {
                "step": m.num_steps,
                "tokens": m.num_tokens,
                "loss": m.loss,
                "queued": m.num_waiting,
                "seq": m.next_seq,
                "resident": m.resident,
            }
            for m in self._models.values()
        }
        about = {"base": self._base.name, "dtype": self._dtype, "pid": os.getpid()}
        return about | {"models": models, "unreadable": list(self._failed)}

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Start the loop with the first call; before it there is no event loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _LOOK_S)
            self._wake.clear()
            try:
                did_any = True
                while did_any:
                    async with self._changing:  # between rounds, others have their turn
                        did_any = await self._round()
                async with self._changing:
                    await self._look_after()
            except Exception:  # as a disk that is full
                log.exception("the trainer of %s goes on after an error", self._base.name)
                await asyncio.sleep(1.0)

    async def _round(self) -> bool:
        """Do what comes first in the queues: passes of all models together, then steps, then the rest one by one.
        Returns whether there was anything.
        """
        ready = [model for model in self._models.values() if model.head() is not None]
        for model in list(ready):
            try:
                await self._enter(model)
            except (Overloaded, StoreError):  # it waits for a place, or for its files
                ready.remove(model)
            except LorayError as e:  # its files are lost
                log.error("model %s cannot go on: %s", model.name, e)
                model.done(e)
                ready.remove(model)
        began = time.monotonic()
        passes = [(model, op) for model in ready for op in self._passes(model)]
        if passes:
            outputs = await self._compute(self._trainer.forward_backward, [op for _, op in passes])
            for (model, op), output in zip(passes, outputs, strict=True):
                if isinstance(output, LossOutput):
                    model.num_tokens += 0 if op.forward_only else op.num_tokens
                    model.loss = output.loss
                model.done(output)
        steps = [(model, head) for model in ready if isinstance(head := model.head(), OptimStep)]
        if steps:
            results = await self._compute(self._steps, [step for _, step in steps])
            for (model, _), metrics in zip(steps, results, strict=True):
                model.num_steps += not isinstance(metrics, LorayError)
                model.done(metrics)
        for model in ready:
            other = model.head()
            if isinstance(other, SaveState | LoadState | Publish):
                model.done(await self._compute(self._other, model, other))
                if isinstance(other, LoadState):  # the state that it has read may be gone at a replay
                    await self._snapshot([model])
        self._clock.computed(time.monotonic() - began)
        await self._snapshot_where_due()
        return bool(ready)

    async def _snapshot_where_due(self) -> None:
        if self._clock.is_due:
            await self._snapshot([model for model in self._models.values() if model.is_dirty and model.resident])
            self._clock.taken()

    def _passes(self, model: TrainedModel) -> Sequence[ForwardBackward]:
        """Take the passes at the head of a model's queue: the first, and more up to a pass's tokens."""
        found: list[ForwardBackward] = []
        num_tokens = 0
        while isinstance(op := model.head(len(found)), ForwardBackward):
            num_tokens += op.num_tokens
            if found and num_tokens > self._tokens_per_pass:
                break
            found.append(op)
        return found

    def _steps(self, steps: Sequence[OptimStep]) -> Sequence[Mapping[str, float] | LorayError]:
        try:
            return self._trainer.optim_step(steps)
        except Exception as e:  # sent again, some would be done twice
            log.exception("%d optimizer steps have failed", len(steps))
            return [TrainingError(f"the optimizer step has failed: {type(e).__name__}: {e}")] * len(steps)

    def _other(self, model: TrainedModel, op: SaveState | LoadState | Publish) -> Result:
        try:
            match op:
                case SaveState():
                    return self._save(model, op.name)
                case LoadState():
                    return self._load(model, op.path, op.with_optimizer)
                case Publish():
                    return self._publish(model, None)
        except LorayError as e:
            return e
        except Exception as e:
            log.exception("%s of model %s has failed", type(op).__name__, model.name)
            return TrainingError(f"{type(op).__name__} has failed: {type(e).__name__}: {e}")

    async def _look_after(self) -> None:
        """Forget old results, write snapshots that are due by their age, free idle models, and end at last."""
        now = time.monotonic()
        for model in self._models.values():
            model.forget_results()
        await self._snapshot_where_due()
        for model in list(self._models.values()):
            if now - model.used_at > _IDLE_S:
                await self._leave(model)
        if any(model.resident or model.num_waiting for model in self._models.values()):
            self._used_at = now
        elif now - self._used_at > _IDLE_S:
            log.info("the trainer of %s ends: it has had no model for a while", self._base.name)
            self._held.close()
            _end()

    # -- models and the bank ------------------------------------------------------------------------------------------

    def _find(self, model: str) -> TrainedModel:
        if (found := self._models.get(model)) is None:
            raise NotFoundError(f"the trainer of {self._base.name} has no model {model!r}; create it first")
        return found

    def _recover(self, folder: str) -> None:
        """Go on with the model in a folder of this base's. One that cannot be read is left there, and told."""
        run = self._runs.open(f"{self._base.name}/{_MODELS}/{folder}", unquote(folder))
        try:
            content = run.read(ModelRecord.FILE)
            if content is None:  # it was being created
                run.remove_all()
                return
            record = ModelRecord.parse(json.loads(content), source=f"{ModelRecord.FILE} of {run}")
            model = TrainedModel(record, run)
            if nbytes := model.read():
                self._clock.accepted(nbytes)
            self._models[record.model] = model
        except (LorayError, ValueError) as e:
            log.error("the model in %s cannot go on: %s", run, e)
            self._failed.append(f"{unquote(folder)}: {e}")

    def _lock(self, folder: RunFolder) -> None:
        """Hold the folder until this process ends. Raises ConflictError where another trainer goes on holding it."""
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                self._held.enter_context(folder.locked(self._name, _lost))
                return
            except ConflictError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def _bytes_per_token(self) -> int:
        """Estimate what a pass keeps of a token for its backward pass."""
        config = self._base.config
        elements = 16 * config.hidden_size + 6 * config.intermediate_size
        return config.num_layers * elements * DTYPE_BYTES[self._dtype]

    def _bytes(self, adapter: AdapterSpec) -> int:
        """Bytes of a slot: compute weights, and in fp32 master, gradient and moments."""
        compute = 0 if self._dtype == "float32" else DTYPE_BYTES[self._dtype]
        return count_trained(self._base.config, adapter).adapter * (16 + compute)

    async def _make_room(self, adapter: AdapterSpec) -> None:
        """Free models that nobody uses now, the longest first, where there is no room. Raises Overloaded."""
        needed = self._bytes(adapter)
        resident = sorted((m for m in self._models.values() if m.resident), key=lambda m: m.used_at)
        taken = sum(self._bytes(model.record.adapter) for model in resident)
        for model in resident:
            if taken + needed <= self._room:
                return
            if not model.num_waiting and time.monotonic() - model.used_at > _SOON_IDLE_S:
                await self._leave(model)
                taken -= self._bytes(model.record.adapter)
        if taken + needed > self._room and taken:
            raise Overloaded(
                f"the trainer of {self._base.name} has {len(resident)} models in {taken:,} of {self._room:,} bytes, "
                f"and this one needs {needed:,}: end one, or ask again when one has been idle for a minute"
            )

    async def _enter(self, model: TrainedModel) -> None:
        """Give a model a slot of the bank. Raises Overloaded."""
        if not model.resident:
            await self._make_room(model.record.adapter)
            await self._compute(self._fill, model)

    async def _leave(self, model: TrainedModel) -> None:
        """Take a model out of the bank, after a snapshot. It comes back with its next operation."""
        if model.resident and not model.num_waiting:
            if model.is_dirty:
                await self._snapshot([model])
            await self._compute(self._trainer.remove, model.name)
            model.resident = False

    async def _snapshot(self, models: Sequence[TrainedModel]) -> None:
        for model in models:
            await self._compute(self._write, model, model.begin_snapshot())
            await model.cut()

    async def _compute(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do `work` in the thread that computes."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    # -- in the thread that computes ----------------------------------------------------------------------------------

    def _write(self, model: TrainedModel, begun: Snapshot) -> None:
        model.write(begun, *self._trainer.state(model.name))

    def _create(self, record: ModelRecord) -> TrainedModel:
        state: OptimizerState | None = None
        weights: AdapterWeights | None = None
        if record.initial is not None and len(record.initial) == _DIGEST_LENGTH:
            weights = self._published(record.initial)
        elif record.initial is not None:
            state = self._state(record, record.initial, with_optimizer=False)
        self._trainer.create(record.model, record.adapter, seed=record.seed, weights=weights)
        try:
            if state is not None:
                self._restore(record.model, state)
            place = f"{self._base.name}/{_MODELS}/{as_folder(record.model)}"
            model = TrainedModel(record, self._runs.open(place, record.model))
            if record.initial is not None:  # which may be gone when it is read again
                self._write(model, model.begin_snapshot())
            model.folder.write_model(ModelRecord.FILE, record)
        except BaseException:
            self._trainer.remove(record.model)
            raise
        model.resident = True
        return model

    def _fill(self, model: TrainedModel) -> None:
        record = model.record
        self._trainer.create(record.model, record.adapter, seed=record.seed)
        if model.has_weights:
            try:
                self._trainer.restore(record.model, *model.weights())
            except BaseException:
                self._trainer.remove(record.model)
                raise
        model.resident = True

    def _published(self, digest: str) -> AdapterWeights:
        with self._cache.pinned(digest) as folder:
            manifest = read_manifest(folder)
            manifest.ref(digest, "the initial adapter", 1).check_base(
                self._base.name, self._base.fingerprint, self._base.of
            )
            return with_manifest(read_adapter(folder, self._base.config), manifest, digest[:12])

    def _publish(self, model: TrainedModel, keep: int | None) -> Published:
        record = model.record
        is_digest = record.initial is not None and len(record.initial) == _DIGEST_LENGTH
        ref = self._versions.publish(
            record.model,
            self._trainer.files_in_memory(record.model, self._dtype),
            step=model.num_steps,
            created_at=record.created_at,
            parent=record.initial if is_digest else None,
            keep=keep,
        )
        return ref, self._name

    def _save(self, model: TrainedModel, name: str) -> dict[str, Any]:
        state = SavedState(
            adapter=model.record.adapter,
            base=self._base.name,
            base_fingerprint=self._base.fingerprint,
            step=model.num_steps,
            num_tokens=model.num_tokens,
            saved_at=datetime.now(UTC),
        )
        place = (self._base.name, model.name, name)
        optimizer, _ = self._trainer.state(model.name)
        adapter = self._trainer.files(model.name, self._dtype)
        folder, nbytes = save_state(self._states, place, adapter, optimizer, state)
        return {"folder": folder, "step": model.num_steps, "nbytes": nbytes}

    def _load(self, model: TrainedModel, path: str, with_optimizer: bool) -> dict[str, Any]:
        self._restore(model.name, self._state(model.record, path, with_optimizer=with_optimizer))
        return {"step": model.num_steps}

    def _state(self, record: ModelRecord, path: str, *, with_optimizer: bool) -> OptimizerState:
        saved, state = load_state(self._states, path)
        if saved.base_fingerprint != self._base.fingerprint:
            raise SpecError(f"{path} is a state on {saved.base}, which is another base than this {self._base.name}")
        if saved.adapter.published != record.adapter.published:
            raise SpecError(
                f"{path} is the state of an adapter of another form than model {record.model}: {saved.adapter!r}"
            )
        if with_optimizer:
            return state
        zeros = {name: torch.zeros_like(tensor) for name, tensor in state.masters.items()}
        return OptimizerState(state.masters, zeros, {n: t.clone() for n, t in zeros.items()}, 0)

    def _restore(self, model: str, state: OptimizerState) -> None:
        try:
            self._trainer.restore(model, state)
        except ValueError as e:
            raise SpecError(str(e)) from e


def _lost(why: str) -> None:
    """End this process, in whose place another one trains."""
    log.error("the trainer ends: %s", why)
    os._exit(1)


def _end() -> None:
    import ray

    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
