"""Models that clients train: their beginning and end, passes and optimizer steps, and where results are."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from pydantic import TypeAdapter, ValidationError

from loray.catalog import Catalog
from loray.errors import ConflictError, LimitExceeded, RequestError, UnsupportedParameter, shown
from loray.schemas.tinker.paths import START, CheckpointPath, RequestId, model_id_of
from loray.schemas.tinker.requests import (
    CreateModelRequest,
    ForwardBackwardBody,
    LoadWeightsRequest,
    LoraConfig,
    OptimStepRequest,
    as_texts,
)
from loray.schemas.tinker.results import model_info, pass_bytes
from loray.spec import (
    ROLLOUT_PRIORITY,
    AdapterSpec,
    LoraSpec,
    Name,
    Principal,
    UsageEvent,
    VeraSpec,
    duration_s,
    service_tier,
)
from loray.spec.datums import ForwardBackward, LoadState, LossOutput, OptimStep
from loray.spec.tinker import TinkerModel
from serve_apps.tinker.futures import Answer, Future, Futures
from serve_apps.tinker.sessions import Records, ServedName, ServedNames, now
from serve_apps.tinker.trainers import Trainers

MAX_MODELS = 8  # of a tenant at once, where neither it nor its key has a limit of jobs
_ALPHA = 32.0  # whatever the rank
_NAME: TypeAdapter[str] = TypeAdapter(Name)


@dataclass
class Training:
    """Models in the trainers of their bases. `charge` takes what a pass has used, and writes it down soon."""

    names: ServedNames
    records: Records
    futures: Futures
    trainers: Trainers
    charge: Callable[[UsageEvent], None]

    # -- beginning ----------------------------------------------------------------------------------------------------

    async def create(self, principal: Principal, asked: CreateModelRequest) -> dict[str, Any]:
        """Begin a model. Sent twice, it is the same one. Raises RequestError, and LimitExceeded for one too many."""
        served = await self.names.find(asked.base_model)
        metadata = as_texts(asked.user_metadata)
        lora = asked.lora_config or LoraConfig(rank=32)
        return await self._begin(
            principal,
            asked.session_id,
            asked.model_seq_id,
            served,
            _adapter(lora, metadata),
            lora.seed,
            metadata,
            initial=metadata.get("loray.init_adapter"),
        )

    async def create_from(self, principal: Principal, asked: LoadWeightsRequest) -> dict[str, Any]:
        """Begin a model with the weights of a checkpoint, whose form it has."""
        assert asked.session_id is not None
        assert asked.model_seq_id is not None
        path = CheckpointPath.parse(asked.path)
        source = await self.records.model(principal, path.model_id)
        checkpoint = await self.records.ask(
            principal, lambda catalog: catalog.tinker.checkpoint(path.model_id, path.kind, path.name)
        )
        if asked.optimizer and checkpoint.kind != "training":
            raise RequestError(f"{path} has no optimizer state: load it with optimizer false", "path")
        served = await self.names.find(asked.base_model or source.base_model)
        if served.base.name != source.base:
            raise RequestError(f"{path} is of the base {source.base}, not {served.base.name}", "base_model")
        return await self._begin(
            principal,
            asked.session_id,
            asked.model_seq_id,
            served,
            source.adapter,
            source.seed,
            as_texts(asked.user_metadata),
            initial=asked.path,
            with_optimizer=asked.optimizer,
        )

    async def _begin(
        self,
        principal: Principal,
        session_id: str,
        seq: int,
        served: ServedName,
        adapter: AdapterSpec,
        seed: int | None,
        metadata: Mapping[str, str],
        *,
        initial: str | None = None,
        with_optimizer: bool = False,
    ) -> dict[str, Any]:
        session = await self.records.open_session(principal, session_id)
        at = now()
        model = TinkerModel(
            id=model_id_of(session_id, seq),
            session_id=session_id,
            tenant=principal.tenant,
            base=served.base.name,
            base_model=served.name,
            adapter=adapter,
            seed=secrets.randbelow(1 << 31) if seed is None else seed,
            name=_name(metadata, session.id, seq),
            initial=initial,
            with_optimizer=with_optimizer,
            metadata=metadata,
            created_at=at,
            used_at=at,
        )
        limits = [n for n in (principal.limits.max_jobs, principal.tenant_limits.max_jobs) if n is not None]
        most = min(limits, default=MAX_MODELS)
        known: TinkerModel = await self.records.ask(principal, lambda catalog: catalog.tinker.add_model(model, most))
        if _asked(known) != _asked(model) or (seed is not None and known.seed != seed):
            raise RequestError(f"model {model.id} was begun before with other settings", "model_seq_id")
        self.records.put(known)
        request_id = RequestId(model.id, True, 0)
        self.start_beginning(principal, known, request_id)
        return {"request_id": str(request_id), "model_id": model.id}

    def start_beginning(self, principal: Principal, model: TinkerModel, request_id: RequestId) -> Future:
        """Ask the model's trainer to create it, unless this process does so already."""

        async def work(future: Future) -> Answer:
            initial, folder = await self._initial(principal, model)
            spec = model.adapter.model_dump(mode="json")
            await self.trainers.insist(future, model.base, "create", model.id, spec, model.seed, initial)
            if folder is not None and model.with_optimizer:
                await self.trainers.insist(future, model.base, "load", model.id, folder, True)
            if model.initial is not None and model.initial.startswith(START):
                return {"type": "load_weights", "path": model.initial, "model_id": model.id}
            return {"type": "create_model", "model_id": model.id}

        return self.futures.start(str(request_id), model.tenant, _asked(model), work)

    async def _initial(self, principal: Principal, model: TinkerModel) -> tuple[str | None, str | None]:
        """Return what the trainer begins with, a folder or a digest, and the folder."""
        initial = model.initial
        if initial is None:
            return None, None
        if not initial.startswith(START):
            ref = await self.records.ask(principal, lambda catalog: catalog.adapters.resolve(initial))
            return ref.digest, None
        path = CheckpointPath.parse(initial)
        checkpoint = await self.records.ask(
            principal, lambda catalog: catalog.tinker.checkpoint(path.model_id, path.kind, path.name)
        )
        return checkpoint.folder or checkpoint.digest, checkpoint.folder

    # -- operations ---------------------------------------------------------------------------------------------------

    async def live_model(self, principal: Principal, model_id: str) -> TinkerModel:
        """A model that has its slot. Raises NotFoundError, and RequestError that names its last checkpoint."""
        model = await self.records.model(principal, model_id)
        if model.is_live:
            return model
        saved, _ = await self.records.ask(
            principal, lambda catalog: catalog.tinker.checkpoints(model_id, limit=1, kind="training")
        )
        last = f": go on from {CheckpointPath(model_id, 'training', saved[0].name)}" if saved else ""
        raise RequestError(f"model {model_id} has ended with its session{last}", "model_id")

    async def submit(self, model: TinkerModel, seq: int, operation: Any) -> dict[str, Any]:
        """Give the trainer an operation, which it has written down when this returns. Raises RequestError for a number
        that another operation has.
        """
        try:
            await self.trainers.ask(model.base, "submit", model.id, seq, operation)
        except ConflictError as e:
            raise RequestError(str(e), "seq_id") from e
        return {"request_id": str(RequestId(model.id, True, seq)), "model_id": model.id}

    async def forward_backward(self, principal: Principal, asked: ForwardBackwardBody) -> dict[str, Any]:
        model = await self.live_model(principal, asked.model_id)
        served = await self.names.find(model.base)
        asked.check(served.base.config.vocab_size, served.context_length)
        has_budget = any(limits.max_budget is not None for limits in (principal.limits, principal.tenant_limits))
        if has_budget:
            await self.records.ask(principal, lambda catalog: _check_budget(catalog, principal))
        operation = ForwardBackward(model.id, asked.datums, asked.loss, asked.forward_only)
        told = await self.submit(model, asked.seq_id, operation)
        used = _used(principal, model, told["request_id"], operation.num_tokens)
        if has_budget:  # which the next pass is checked by
            await self.records.ask(principal, lambda catalog: catalog.usage.record([used]))
        else:
            self.charge(used)
        return told

    async def optim_step(self, principal: Principal, asked: OptimStepRequest) -> dict[str, Any]:
        model = await self.live_model(principal, asked.model_id)
        return await self.submit(model, asked.seq_id, OptimStep(model.id, asked.adam_params))

    async def load(self, principal: Principal, asked: LoadWeightsRequest) -> dict[str, Any]:
        """Load a checkpoint into a model that is there."""
        assert asked.model_id is not None
        assert asked.seq_id is not None
        model = await self.live_model(principal, asked.model_id)
        path = CheckpointPath.parse(asked.path)
        if path.kind != "training":
            raise RequestError(f"{path}: only weights/NAME is loaded into a model that is there", "path")
        checkpoint = await self.records.ask(
            principal, lambda catalog: catalog.tinker.checkpoint(path.model_id, path.kind, path.name)
        )
        assert checkpoint.folder is not None
        return await self.submit(model, asked.seq_id, LoadState(model.id, checkpoint.folder, asked.optimizer))

    async def info(self, principal: Principal, model_id: str) -> dict[str, Any]:
        model = await self.records.model(principal, model_id)
        served = await self.names.find(model.base_model)
        return model_info(model, served.tokenizer_id, served.base.config.architecture)

    async def end(self, model: TinkerModel) -> None:
        """Give back the slot of a model. What it has is lost, but for what was saved."""
        await self.trainers.ask(model.base, "remove", model.id)
        await self.records.ask_all(lambda catalog: catalog.tinker.end_model(model.id))
        self.records.put(replace(model, is_live=False))


def answer(model_id: str, result: LossOutput | Mapping[str, Any]) -> Answer:
    """Make the answer to a pass, a step, or a load, from what the trainer has returned."""
    if isinstance(result, LossOutput):
        return pass_bytes(result)
    if result.keys() == {"step"}:
        return {"type": "load_weights", "model_id": model_id}
    return {"type": "optim_step", "metrics": {key: float(value) for key, value in result.items()}}


def _check_budget(catalog: Catalog, principal: Principal) -> None:
    """Raises LimitExceeded where the key or the tenant has used what it may in its `budget_duration`."""
    for limits, whose in ((principal.limits, "key"), (principal.tenant_limits, "tenant")):
        if limits.max_budget is None:
            continue
        since = now() - timedelta(seconds=duration_s(limits.budget_duration))
        of = {"key_id": principal.account} if whose == "key" else {"tenant": principal.tenant}
        if catalog.usage.tokens(since=since, **of) >= limits.max_budget:
            raise LimitExceeded(
                f"the {whose}'s budget of {limits.max_budget:,.0f} tokens in {limits.budget_duration} is used up"
            )


def _used(principal: Principal, model: TinkerModel, request_id: str, num_tokens: int) -> UsageEvent:
    """Describe what a pass uses: its tokens, once, however often it is sent."""
    return UsageEvent(
        request_id=request_id,
        tenant=principal.tenant,
        key_id=principal.account,
        model=model.base,
        digest=None,
        num_prompt_tokens=num_tokens,
        num_cached_tokens=0,
        num_output_tokens=0,
        tier=service_tier(ROLLOUT_PRIORITY),
        seconds=0.0,
        outcome="ok",
        created_at=now(),
    )


def _asked(model: TinkerModel) -> object:
    """Return what a client has asked for, by which the same request is known."""
    return (model.base, model.adapter, model.initial, model.with_optimizer, dict(model.metadata), model.name)


def _adapter(lora: LoraConfig, metadata: Mapping[str, str]) -> AdapterSpec:
    """The adapter of a model. Raises RequestError."""
    method = metadata.get("loray.method", "lora")
    fields: dict[str, Any] = {"rank": lora.rank, "target_modules": lora.target_modules}
    if method == "vera":
        return VeraSpec(**fields)
    if method != "lora":
        raise UnsupportedParameter(f"user_metadata: loray.method {shown(method)}: lora or vera", "user_metadata")
    try:
        return LoraSpec(alpha=float(metadata.get("loray.alpha", _ALPHA)), **fields)
    except ValueError as e:  # pydantic's too
        raise RequestError("user_metadata: loray.alpha must be a number above 0", "user_metadata") from e


def _name(metadata: Mapping[str, str], session_id: str, seq: int) -> str:
    """The catalog's name of what a model publishes. Raises RequestError."""
    name = metadata.get("loray.name", f"tinker-{session_id.removeprefix('session-')}-{seq}")
    try:
        return _NAME.validate_python(name)
    except ValidationError as e:
        raise RequestError(f"user_metadata: loray.name {shown(name)} is no name of an adapter", "user_metadata") from e
