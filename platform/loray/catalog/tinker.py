"""The catalog's operations on what Tinker's protocol knows: sessions, models, sampling sessions and checkpoints.

Each exists for its own tenant alone. They do not count as changes, since serving does not depend on them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa
from pydantic import TypeAdapter

from loray.catalog.audit_chain import log
from loray.catalog.database import Database
from loray.catalog.queries import now
from loray.catalog.schema import tinker_checkpoints, tinker_models, tinker_samplers, tinker_sessions
from loray.errors import ConflictError, LimitExceeded, NotFoundError, shown
from loray.spec import AdapterRef, AdapterSpec
from loray.spec.tinker import CheckpointKind, TinkerCheckpoint, TinkerModel, TinkerSampler, TinkerSession

R = TypeVar("R", TinkerSession, TinkerModel, TinkerSampler, TinkerCheckpoint)

_SPEC: TypeAdapter[AdapterSpec] = TypeAdapter(AdapterSpec)
_REF: TypeAdapter[AdapterRef] = TypeAdapter(AdapterRef)
_TABLES = {
    TinkerSession: tinker_sessions,
    TinkerModel: tinker_models,
    TinkerSampler: tinker_samplers,
    TinkerCheckpoint: tinker_checkpoints,
}


class Followed(NamedTuple):
    """A session, its models, and what they have saved, the newest first."""

    session: TinkerSession
    models: Sequence[TinkerModel]
    checkpoints: Sequence[TinkerCheckpoint]

    @property
    def num_steps(self) -> int:
        return sum(model.num_steps for model in self.models)

    @property
    def num_tokens(self) -> int:
        return sum(model.num_tokens for model in self.models)

    @property
    def num_live(self) -> int:
        return sum(model.is_live for model in self.models)


@dataclass
class Tinker:
    """The catalog's operations on Tinker's protocol."""

    db: Database

    # -- sessions -----------------------------------------------------------------------------------------------------

    def add_session(self, session: TinkerSession) -> None:
        with self.db.changing() as c:
            _insert(c, session)
            log(c, self.db.actor, "begin_session", session.id, tenant=session.tenant)

    def session(self, session_id: str) -> TinkerSession:
        """Raises NotFoundError."""
        return self._one(TinkerSession, tinker_sessions.c.id == session_id, session_id)

    def sessions(self, *, limit: int, offset: int = 0) -> tuple[list[TinkerSession], int]:
        """Those of the tenant, the newest first, and how many there are."""
        return self._page(TinkerSession, (), (tinker_sessions.c.created_at, tinker_sessions.c.id), limit, offset)

    def end_session(self, session_id: str, end: str) -> None:
        """Say why a session has ended. The first reason stays."""
        table = tinker_sessions
        with self.db.changing() as c:
            c.execute(sa.update(table).where(table.c.id == session_id, table.c.end.is_(None)).values(end=end))
            log(c, self.db.actor, "end_session", session_id, tenant=self.db.principal.tenant, end=end)

    def note_seen(self, seen: Mapping[str, datetime]) -> None:
        """Record when clients were last heard of, whoever's they are."""
        with self.db.writing() as c:
            for session_id, at in seen.items():
                c.execute(sa.update(tinker_sessions).where(tinker_sessions.c.id == session_id).values(seen_at=at))

    def idle_sessions(self, before: datetime, *, training_of: str | None = None) -> list[TinkerSession]:
        """The sessions of all tenants that go on, and whose clients were last heard of before. Of one tenant, those
        alone that have live models.
        """
        table, models = tinker_sessions, tinker_models
        query = sa.select(table).where(table.c.end.is_(None), table.c.seen_at < before)
        if training_of is not None:
            live = sa.select(models.c.session_id).where(models.c.is_live)
            query = query.where(table.c.tenant == training_of, table.c.id.in_(live))
        with self.db.reading() as c:
            return _rows(c, TinkerSession, query)

    def ended_sessions(self, ids: Collection[str]) -> list[TinkerSession]:
        """Those among these sessions, of any tenants, that have ended."""
        table = tinker_sessions
        with self.db.reading() as c:
            return _rows(c, TinkerSession, sa.select(table).where(table.c.end.is_not(None), table.c.id.in_(ids)))

    # -- following ----------------------------------------------------------------------------------------------------

    def follow(self, session_id: str) -> Followed:
        """Return a session of the tenant, for an administrator of any. Raises NotFoundError."""
        with self.db.reading() as c:
            found = self._followed(c, tinker_sessions.c.id == session_id, limit=1, offset=0)
        if not found:
            raise NotFoundError(f"there is no training session {shown(session_id)}")
        return found[0]

    def followed(self, *, limit: int, offset: int = 0) -> list[Followed]:
        """Return the sessions of the tenant, for an administrator of all, the newest first."""
        with self.db.reading() as c:
            return self._followed(c, sa.true(), limit=limit, offset=offset)

    def stop_session(self, session_id: str) -> None:
        """End one of those that `follow` gives: the front frees its models, and saves them before. Raises
        NotFoundError.
        """
        session, table = self.follow(session_id).session, tinker_sessions
        with self.db.changing() as c:
            goes_on = sa.and_(table.c.id == session_id, table.c.end.is_(None))
            if c.execute(sa.update(table).where(goes_on).values(end="stopped")).rowcount:
                log(c, self.db.actor, "end_session", session_id, tenant=session.tenant, end="stopped")

    def _followed(self, c: sa.Connection, which: sa.ColumnElement[bool], *, limit: int, offset: int) -> list[Followed]:
        table = tinker_sessions
        mine = sa.true() if self.db.principal.is_admin else self._mine(table)
        newest_first = sa.select(table).where(which, mine).order_by(table.c.created_at.desc(), table.c.id.desc())
        sessions = _rows(c, TinkerSession, newest_first.limit(limit).offset(offset))
        of = tinker_models.c.session_id.in_([session.id for session in sessions])
        models = _rows(c, TinkerModel, sa.select(tinker_models).where(of).order_by(tinker_models.c.id))
        owned = tinker_checkpoints.c.model_id.in_(sa.select(tinker_models.c.id).where(of))
        written = sa.select(tinker_checkpoints).where(owned, tinker_checkpoints.c.is_ready)
        checkpoints = _rows(c, TinkerCheckpoint, written.order_by(tinker_checkpoints.c.created_at.desc()))
        found = []
        for session in sessions:
            own = [model for model in models if model.session_id == session.id]
            ids = {model.id for model in own}
            found.append(Followed(session, own, [saved for saved in checkpoints if saved.model_id in ids]))
        return found

    # -- models -------------------------------------------------------------------------------------------------------

    def add_model(self, model: TinkerModel, most: int) -> TinkerModel:
        """Add a model, or return the one that has its id. Raises LimitExceeded for a tenant with `most` live ones."""
        table = tinker_models
        with self.db.changing() as c:
            known = _rows(c, TinkerModel, sa.select(table).where(table.c.id == model.id, self._mine(table)))
            if known:
                return known[0]
            live = sa.select(sa.func.count()).select_from(table).where(self._mine(table), table.c.is_live)
            if c.execute(live).scalar_one() >= most:
                raise LimitExceeded(
                    f"tenant {model.tenant} trains {most} models, which is the most at once: finish a session, or ask "
                    "for a larger max_jobs"
                )
            _insert(c, model)
            log(c, self.db.actor, "begin_model", model.id, tenant=model.tenant, base=model.base)
            return model

    def model(self, model_id: str) -> TinkerModel:
        """Raises NotFoundError."""
        return self._one(TinkerModel, tinker_models.c.id == model_id, model_id)

    def models(self, *, limit: int, offset: int = 0, session_id: str | None = None) -> tuple[list[TinkerModel], int]:
        """Those of the tenant, or of one of its sessions, the newest first, and how many there are."""
        table = tinker_models
        where = () if session_id is None else (table.c.session_id == session_id,)
        return self._page(TinkerModel, where, (table.c.created_at, table.c.id), limit, offset)

    def note_progress(self, progress: Mapping[str, Mapping[str, Any]]) -> None:
        """Record `step`, `tokens` and `loss` of models, whoever's they are."""
        table = tinker_models
        with self.db.writing() as c:
            for model_id, told in progress.items():
                step = int(told.get("step", 0))
                values = {"num_steps": step, "num_tokens": int(told.get("tokens", 0)), "loss": told.get("loss")}
                is_new = sa.and_(table.c.id == model_id, table.c.num_steps != step)
                c.execute(sa.update(table).where(is_new).values(values | {"used_at": now()}))

    def live_bases(self) -> set[str]:
        """The bases of all tenants' live models."""
        with self.db.reading() as c:
            return set(c.scalars(sa.select(tinker_models.c.base).where(tinker_models.c.is_live).distinct()))

    def left_models(self) -> list[tuple[TinkerModel, str]]:
        """The live models of all tenants whose sessions have ended, and how these have."""
        table, ends = tinker_models, tinker_sessions
        query = sa.select(table, ends.c.end).join(ends, ends.c.id == table.c.session_id)
        with self.db.reading() as c:
            found = c.execute(query.where(table.c.is_live, ends.c.end.is_not(None))).all()
        names = [column.name for column in table.columns]
        return [(_read(TinkerModel, {name: row._mapping[table.c[name]] for name in names}), row.end) for row in found]

    def end_model(self, model_id: str) -> None:
        """The model has no slot any more."""
        with self.db.writing() as c:
            c.execute(sa.update(tinker_models).where(tinker_models.c.id == model_id).values(is_live=False))

    # -- sampling sessions --------------------------------------------------------------------------------------------

    def add_sampler(self, sampler: TinkerSampler) -> TinkerSampler:
        """Add a sampling session, or return the one that has its id."""
        table = tinker_samplers
        with self.db.changing() as c:
            known = _rows(c, TinkerSampler, sa.select(table).where(table.c.id == sampler.id, self._mine(table)))
            if not known:
                _insert(c, sampler)
        return known[0] if known else sampler

    def sampler(self, sampler_id: str) -> TinkerSampler:
        """Raises NotFoundError."""
        return self._one(TinkerSampler, tinker_samplers.c.id == sampler_id, sampler_id)

    def samplers(self, session_id: str) -> list[TinkerSampler]:
        table = tinker_samplers
        with self.db.reading() as c:
            query = sa.select(table).where(self._mine(table), table.c.session_id == session_id)
            return _rows(c, TinkerSampler, query.order_by(table.c.id))

    def finish_sampler(self, sampler: TinkerSampler) -> None:
        """Its weights are known."""
        with self.db.writing() as c:
            c.execute(sa.update(tinker_samplers).where(tinker_samplers.c.id == sampler.id).values(_values(sampler)))

    def join_sampler(self, sampler_id: str) -> int:
        """Count another client of a sampling session, and return its number, from 1 on."""
        table = tinker_samplers
        mine = sa.and_(table.c.id == sampler_id, self._mine(table))
        with self.db.changing() as c:
            c.execute(sa.update(table).where(mine).values(num_clients=table.c.num_clients + 1))
            number: int = c.execute(sa.select(table.c.num_clients).where(mine)).scalar_one()
            return number

    def inflight(self, model_id: str) -> TinkerSampler | None:
        """The in-flight sampling session of a model that has its newest weights."""
        table = tinker_samplers
        query = sa.select(table).where(table.c.model_id == model_id, table.c.inflight, table.c.is_ready)
        with self.db.reading() as c:
            found = _rows(c, TinkerSampler, query.order_by(table.c.seq.desc()).limit(1))
        return found[0] if found else None

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def check_name(self, model_id: str, kind: CheckpointKind, name: str, seq: int) -> None:
        """Raise ConflictError where another request of the model has saved under the name."""
        with self.db.reading() as c:
            self._check_name(c, model_id, kind, name, seq)

    def add_checkpoint(self, row: TinkerCheckpoint, *, overwrite: bool) -> None:
        """Add a checkpoint that its request has not saved yet. One that is overwritten stays until then. Raises
        ConflictError as `check_name`.
        """
        named = _named(row.model_id, row.kind, row.name)
        with self.db.changing() as c:
            if not overwrite:
                self._check_name(c, row.model_id, row.kind, row.name, row.seq)
            known = _rows(c, TinkerCheckpoint, sa.select(tinker_checkpoints).where(named))
            if not known:
                _insert(c, row)
            elif known[0].seq != row.seq or row.is_ready:
                kept = {} if row.is_ready else {name: getattr(known[0], name) for name in _KEPT}
                c.execute(sa.update(tinker_checkpoints).where(named).values(_values(row) | kept))

    def finish_checkpoint(self, row: TinkerCheckpoint) -> None:
        """It is written."""
        named = _named(row.model_id, row.kind, row.name)
        with self.db.changing() as c:
            c.execute(sa.update(tinker_checkpoints).where(named).values(_values(row)))
            log(c, self.db.actor, "save_model", row.model_id, tenant=row.tenant, kind=row.kind, name=row.name)

    def forget_save(self, model_id: str, seq: int) -> None:
        """The request has failed. What was there under its name before stays."""
        c_ = tinker_checkpoints.c
        failed = sa.and_(c_.model_id == model_id, c_.seq == seq, c_.is_ready.is_(False))
        with self.db.writing() as c:
            c.execute(sa.delete(tinker_checkpoints).where(failed, self._mine(tinker_checkpoints)))

    def checkpoint(self, model_id: str, kind: CheckpointKind, name: str) -> TinkerCheckpoint:
        """One that is written. Raises NotFoundError."""
        where = sa.and_(_named(model_id, kind, name), tinker_checkpoints.c.is_ready)
        return self._one(TinkerCheckpoint, where, f"{model_id} {name}")

    def saved_by(self, model_id: str, seq: int) -> TinkerCheckpoint | TinkerSampler | None:
        """What a request of a model's queue saves; None where it is another one."""
        with self.db.reading() as c:
            for kind in (TinkerCheckpoint, TinkerSampler):
                table = _TABLES[kind]
                query = sa.select(table).where(self._mine(table), table.c.model_id == model_id, table.c.seq == seq)
                found: list[Any] = _rows(c, kind, query)
                if found:
                    row: TinkerCheckpoint | TinkerSampler = found[0]
                    return row
        return None

    def checkpoints(
        self, model_id: str | None = None, *, limit: int, offset: int = 0, kind: CheckpointKind | None = None
    ) -> tuple[list[TinkerCheckpoint], int]:
        """Those of a model or of the tenant that are written, the newest first, and how many there are."""
        table = tinker_checkpoints
        where: list[sa.ColumnElement[bool]] = [table.c.is_ready]
        if model_id is not None:
            where.append(table.c.model_id == model_id)
        if kind is not None:
            where.append(table.c.kind == kind)
        return self._page(TinkerCheckpoint, where, (table.c.created_at, table.c.name), limit, offset)

    def stored_bytes(self) -> int:
        """Sum the bytes of the tenant's training checkpoints, which are no adapters."""
        c_ = tinker_checkpoints.c
        query = sa.select(sa.func.coalesce(sa.func.sum(c_.nbytes), 0))
        query = query.where(self._mine(tinker_checkpoints), c_.kind == "training")
        with self.db.reading() as c:
            return int(c.execute(query).scalar_one())

    def set_expiry(self, model_id: str, kind: CheckpointKind, name: str, until: datetime | None) -> None:
        """Raises NotFoundError."""
        self.checkpoint(model_id, kind, name)
        with self.db.changing() as c:
            c.execute(sa.update(tinker_checkpoints).where(_named(model_id, kind, name)).values(expires_at=until))

    def delete_checkpoint(self, model_id: str, kind: CheckpointKind, name: str) -> None:
        with self.db.changing() as c:
            mine = sa.and_(_named(model_id, kind, name), self._mine(tinker_checkpoints))
            if c.execute(sa.delete(tinker_checkpoints).where(mine)).rowcount:
                tenant = self.db.principal.tenant
                log(c, self.db.actor, "delete_checkpoint", model_id, tenant=tenant, kind=kind, name=name)

    def expired(self, at: datetime) -> list[TinkerCheckpoint]:
        """The checkpoints of all tenants whose time is over."""
        table = tinker_checkpoints
        with self.db.reading() as c:
            return _rows(c, TinkerCheckpoint, sa.select(table).where(table.c.expires_at <= at, table.c.is_ready))

    # -----------------------------------------------------------------------------------------------------------------

    def _mine(self, table: sa.Table) -> sa.ColumnElement[bool]:
        mine: sa.ColumnElement[bool] = table.c.tenant == self.db.principal.tenant
        return mine

    def _check_name(self, c: sa.Connection, model_id: str, kind: CheckpointKind, name: str, seq: int) -> None:
        taken = sa.and_(_named(model_id, kind, name), tinker_checkpoints.c.seq != seq)
        if c.execute(sa.select(tinker_checkpoints.c.name).where(taken)).first() is not None:
            raise ConflictError(f"{model_id} has saved {name!r} before: choose another name, or overwrite it")

    def _one(self, kind: type[R], where: sa.ColumnElement[bool], called: str) -> R:
        table = _TABLES[kind]
        with self.db.reading() as c:
            found = _rows(c, kind, sa.select(table).where(where, self._mine(table)))
        if not found:
            raise NotFoundError(f"there is no {shown(called)} for this key")
        return found[0]

    def _page(
        self,
        kind: type[R],
        where: Sequence[sa.ColumnElement[bool]],
        order: Sequence[sa.Column[Any]],
        limit: int,
        offset: int,
    ) -> tuple[list[R], int]:
        table = _TABLES[kind]
        matching = sa.and_(self._mine(table), *where)
        query = sa.select(table).where(matching).order_by(*(column.desc() for column in order))
        with self.db.reading() as c:
            total: int = c.execute(sa.select(sa.func.count()).select_from(table).where(matching)).scalar_one()
            return _rows(c, kind, query.limit(limit).offset(offset)), total


_KEPT = ("folder", "version", "digest", "nbytes", "created_at", "is_ready")  # of a checkpoint that is overwritten


def _named(model_id: str, kind: CheckpointKind, name: str) -> sa.ColumnElement[bool]:
    c = tinker_checkpoints.c
    return sa.and_(c.model_id == model_id, c.kind == kind, c.name == name)


def _insert(c: sa.Connection, row: TinkerSession | TinkerModel | TinkerSampler | TinkerCheckpoint) -> None:
    c.execute(_TABLES[type(row)].insert().values(_values(row)))


def _values(row: TinkerSession | TinkerModel | TinkerSampler | TinkerCheckpoint) -> dict[str, Any]:
    """A row as columns: what is not asked for by itself is JSON."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    if "metadata" in values:
        values["metadata"] = json.dumps(dict(values["metadata"]))
    if isinstance(row, TinkerModel):
        values["adapter"] = row.adapter.model_dump_json()
    if isinstance(row, TinkerSampler):
        values["adapter"] = None if row.adapter is None else json.dumps(asdict(row.adapter))
        values["holders"] = json.dumps(row.holders)
    return values


def _rows(c: sa.Connection, kind: type[R], query: sa.Select[Any]) -> list[R]:
    return [_read(kind, row._asdict()) for row in c.execute(query)]


def _read(kind: type[R], values: dict[str, Any]) -> R:
    if "metadata" in values:
        values["metadata"] = json.loads(values["metadata"])
    if kind is TinkerModel:
        values["adapter"] = _SPEC.validate_json(values["adapter"])
    if kind is TinkerSampler:
        values["adapter"] = None if values["adapter"] is None else _REF.validate_json(values["adapter"])
        values["holders"] = tuple(json.loads(values["holders"]))
    return kind(**values)
