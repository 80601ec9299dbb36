"""Sessions of clients, and the rows of the catalog that are in use: a front asks the database once for each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.errors import ClusterError, NotFoundError, RequestError, SpecError, shown
from loray.policy.quotas import allowed_priority
from loray.schemas.tinker.paths import new_session_id
from loray.schemas.tinker.requests import CreateSessionRequest, as_texts
from loray.schemas.tinker.results import HEAD_IS_FROZEN, NEWEST_SDK, OLDEST_SDK, sdk_version_of
from loray.spec import ROLLOUT_PRIORITY, AnyDType, Principal, SampledBase
from loray.spec.tinker import TinkerModel, TinkerSampler, TinkerSession

SESSION_IDLE_S = 600.0
SOON_IDLE_S = 60.0  # the same where its tenant wants another model and has as many as it may
_REFRESH_S = 10.0
_HUB = "hf:"
R = TypeVar("R")
T = TypeVar("T")


def now() -> datetime:
    return datetime.now(UTC)


class SessionGone(NotFoundError):
    """The session has ended; its client stops to say that it is there."""

    status = 410


@dataclass(frozen=True, slots=True)
class ServedName:
    """A base as a client may name it.

    context_length  the most tokens of a row, or of a sample with its prompt
    dtype           of the engine, and so of the trainer
    """

    name: str
    base: BaseModel
    context_length: int
    dtype: AnyDType

    @property
    def tokenizer_id(self) -> str:
        """What the client finds the tokenizer by: the hub's id where the base has one, else the name it used."""
        source = self.base.source
        return source.removeprefix(_HUB) if source.startswith(_HUB) else self.name


class ServedNames:
    """The bases of a deployment by all their names: its own, the hub's, and those of LORAY_TINKER_NAMES."""

    def __init__(
        self,
        served: Callable[[], Awaitable[Mapping[str, SampledBase]]],
        base_of: Callable[[str], BaseModel],
        others: Mapping[str, str],
    ) -> None:
        """`served` gives the bases that are served now; `base_of`, which may block, one of them."""
        self._served, self._base_of, self._others = served, base_of, others
        self._names: dict[str, ServedName] = {}
        self._read_at = float("-inf")

    async def all(self) -> list[ServedName]:
        """Raises ClusterError where nothing is served."""
        if time.monotonic() - self._read_at > _REFRESH_S:
            await self._read()
        return list(self._names.values())

    async def find(self, name: str) -> ServedName:
        """Raises RequestError, and as `all`."""
        if name not in self._names:
            await self._read()
        found = self._names.get(name)
        if found is None:
            raise RequestError(
                f"no base {shown(name)} is served here; there are {', '.join(sorted(self._names))} "
                "(LORAY_TINKER_NAMES gives a base more names)",
                "base_model",
            )
        return found

    async def _read(self) -> None:
        try:
            found = await self._served()
        except SpecError as e:
            raise ClusterError(str(e)) from e
        names: dict[str, ServedName] = {}
        for base_name, (context, dtype) in found.items():
            base = await asyncio.to_thread(self._base_of, base_name)
            called = [base.name, *(name for name, of in self._others.items() if of == base.name)]
            if base.source.startswith(_HUB):
                called.append(base.source.removeprefix(_HUB))
            names |= {name: ServedName(name, base, context, dtype) for name in called if name not in names}
        self._names, self._read_at = names, time.monotonic()


@dataclass
class Records:
    """Rows of sessions, models and samplers, each for its own tenant."""

    catalog: Catalog
    _sessions: dict[str, TinkerSession] = field(default_factory=dict)
    _models: dict[str, TinkerModel] = field(default_factory=dict)
    _samplers: dict[str, TinkerSampler] = field(default_factory=dict)

    async def ask(self, principal: Principal, question: Callable[[Catalog], R]) -> R:
        """Return what `question` finds in the catalog as the caller sees it, in a thread."""
        return await asyncio.to_thread(lambda: question(self.catalog.view(principal)))

    async def ask_all(self, question: Callable[[Catalog], R]) -> R:
        """As `ask`, of all tenants."""
        return await asyncio.to_thread(lambda: question(self.catalog))

    async def session(self, principal: Principal, session_id: str) -> TinkerSession:
        """Raises NotFoundError, also for a session of another tenant."""
        return await self._row(
            principal, self._sessions, session_id, lambda catalog: catalog.tinker.session(session_id)
        )

    async def open_session(self, principal: Principal, session_id: str) -> TinkerSession:
        """A session that goes on. Raises RequestError for one that has ended."""
        session = await self.session(principal, session_id)
        if session.end is not None:
            raise RequestError(f"session {session_id} has ended ({session.end}); begin another one", "session_id")
        return session

    async def model(self, principal: Principal, model_id: str) -> TinkerModel:
        return await self._row(principal, self._models, model_id, lambda catalog: catalog.tinker.model(model_id))

    async def sampler(self, principal: Principal, sampler_id: str) -> TinkerSampler:
        return await self._row(
            principal, self._samplers, sampler_id, lambda catalog: catalog.tinker.sampler(sampler_id)
        )

    def put(self, row: TinkerSession | TinkerModel | TinkerSampler) -> None:
        """Keep what the catalog has been told."""
        if isinstance(row, TinkerSession):
            self._sessions[row.id] = row
        elif isinstance(row, TinkerModel):
            self._models[row.id] = row
        else:
            self._samplers[row.id] = row

    def open_sessions(self) -> Sequence[str]:
        """The ids of those that go on, as far as is known here."""
        return [session.id for session in self._sessions.values() if session.end is None]

    def forget(self, session_id: str) -> None:
        """Ask the catalog again for what belongs to the session."""
        self._sessions.pop(session_id, None)
        for rows in (self._models, self._samplers):
            for row in [row for row in rows.values() if row.session_id == session_id]:
                del rows[row.id]

    async def _row(self, principal: Principal, known: dict[str, T], row_id: str, read: Callable[[Catalog], T]) -> T:
        row = known.get(row_id)
        if row is None:
            row = known[row_id] = await self.ask(principal, read)
        if getattr(row, "tenant", None) != principal.tenant:
            raise NotFoundError(f"there is no {shown(row_id)} for this key")
        return row


@dataclass
class Sessions:
    """Begins sessions, hears that their clients are there, and says which of them are not any more."""

    records: Records
    clock: Callable[[], datetime] = now
    _seen: dict[str, datetime] = field(default_factory=dict)  # what the catalog was not told yet

    def __post_init__(self) -> None:
        self._began_at = self.clock()

    async def create(self, principal: Principal, asked: CreateSessionRequest) -> dict[str, Any]:
        """Raises RequestError for an SDK that is too old."""
        version = sdk_version_of(asked.sdk_version)
        refuse_old(asked.sdk_version)
        metadata = as_texts(asked.user_metadata)
        at = self.clock()
        session = TinkerSession(
            id=new_session_id(),
            tenant=principal.tenant,
            key_id=principal.account,
            sdk_version=asked.sdk_version,
            display_name=asked.display_name,
            metadata=metadata,
            priority=allowed_priority(principal, _priority(metadata)),
            created_at=at,
            seen_at=at,
        )
        await self.records.ask(principal, lambda catalog: catalog.tinker.add_session(session))
        self.records.put(session)
        newest = ".".join(map(str, NEWEST_SDK))
        warning = f"this server was tested with SDKs up to {newest}, and yours is {asked.sdk_version}"
        return {
            "type": "create_session",
            "session_id": session.id,
            "info_message": HEAD_IS_FROZEN,
            "warning_message": warning if version > NEWEST_SDK else None,
            "error_message": None,
        }

    async def heartbeat(self, principal: Principal, session_id: str) -> None:
        """Raises SessionGone, NotFoundError."""
        session = await self.records.session(principal, session_id)
        if session.end is not None:
            raise SessionGone(f"session {session_id} has ended ({session.end})")
        self._seen[session_id] = self.clock()

    async def idle(self, idle_s: float, *, training_of: str | None = None) -> Sequence[TinkerSession]:
        """Tell the catalog which sessions were heard of, and return those that go on but were not for so long: of all
        tenants, or those of one that have live models.
        """
        seen = dict(self._seen)
        if seen:
            await self.records.ask_all(lambda catalog: catalog.tinker.note_seen(seen))
            self._seen = {of: at for of, at in self._seen.items() if at != seen.get(of)}
        at = self.clock()
        if at - self._began_at < timedelta(seconds=SOON_IDLE_S):
            return ()  # the clients of the front before this one are still to be heard of
        before = at - timedelta(seconds=idle_s)
        idle: Sequence[TinkerSession] = await self.records.ask_all(
            lambda catalog: catalog.tinker.idle_sessions(before, training_of=training_of)
        )
        return idle

    async def end(self, principal: Principal, session: TinkerSession, end: str) -> None:
        """Say that a session has ended; the first reason stays."""
        await self.records.ask(principal, lambda catalog: catalog.tinker.end_session(session.id, end))
        self.records.put(replace(session, end=end))


def refuse_old(sdk_version: str) -> None:
    """Raises RequestError for an SDK whose requests are not understood here."""
    if sdk_version_of(sdk_version) < OLDEST_SDK:
        oldest = ".".join(map(str, OLDEST_SDK))
        raise RequestError(
            f"SDK {shown(sdk_version)} is too old for this server: pip install 'tinker>={oldest}'", "sdk_version"
        )


def _priority(metadata: Mapping[str, str]) -> int:
    """Raises RequestError."""
    given = metadata.get("loray.priority")
    if given is None:
        return ROLLOUT_PRIORITY
    try:
        return int(given)
    except ValueError:
        raise RequestError("user_metadata: loray.priority must be a whole number", "user_metadata") from None
