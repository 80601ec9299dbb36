"""Names of models: `ModelResolver` finds their meaning in a snapshot of the catalog, `ModelCards` lists the models."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from loray.bases.registry import BaseModel
from loray.catalog import AdapterEntry, Catalog, CatalogSnapshot, split_model
from loray.catalog.snapshot import BaseTotals
from loray.catalog.snapshot_file import SnapshotFile, StoredSnapshot
from loray.errors import AdapterNotFound, BaseMismatch, CatalogError, RateLimited, shown
from loray.policy.auth import check_model, may_ask
from loray.policy.canary import Arm, is_taken
from loray.policy.quotas import QuotaGate
from loray.schemas.openai import Model
from loray.schemas.openai.responses import ResponseBody
from loray.spec import AdapterRef, Limits, Principal
from serve_apps.catalog_watch import CatalogWatcher, SnapshotWriter
from serve_apps.python_gc import collection_paused, exempt_all

REFRESH_S = 0.5  # the time after which a promotion or a rollback takes effect
LOOK_AGAIN_S = 0.05
_MANY = 10_000  # adapters, whose objects a collection would look through for more than 20 ms
_OWNER = "loray"
MAX_CARDS = 10_000  # of one answer
LISTS = Limits(rpm_limit=60)  # of a key, beside its own limits
_AT_ONCE = 100  # models that are encoded before other requests have their turn: about a millisecond


class ResolvedModel(NamedTuple):
    """The meaning of a name. `adapter`: None for the base itself."""

    base: BaseModel
    adapter: AdapterRef | None = None


class ModelResolver:
    """The bases and the adapters of one deployment, as `follower` reads them. Used from one event loop.

    If the database cannot be reached, the last snapshot is used; if it cannot be reached at first, the snapshot `kept`
    on disk.
    """

    what, look_s = "names", REFRESH_S

    def __init__(self, bases: Sequence[BaseModel], follower: CatalogWatcher, kept: SnapshotFile | None = None) -> None:
        """`bases`: different models, at least one."""
        self.bases = {base.name: base for base in bases}
        # An adapter is served on the base that it was trained on, else on the first quantised form of it.
        forms = {base.of: base for base in reversed(bases) if base.of is not None}
        self._by_fingerprint = forms | {base.fingerprint: base for base in bases}
        self.follower = follower
        self._snapshot: CatalogSnapshot | None = None
        self._looking = asyncio.Lock()
        self._read_at = float("-inf")  # when the last successful look began
        self._kept, self._keeper = kept, SnapshotWriter(kept)
        follower.add(self)

    @property
    def num_adapters(self) -> int:
        """The adapters of all bases together."""
        return sum(self.num_adapters_of(base) for base in self.bases.values())

    def num_adapters_of(self, base: BaseModel) -> int:
        return self._totals(base).num_adapters

    def longest_context(self, base: BaseModel) -> int:
        """Return the longest context of a base and all its adapters."""
        return max(base.config.max_position_embeddings, self._totals(base).longest_context)

    @property
    def age_s(self) -> float:
        """The seconds since the snapshot was last known to be current; infinite before the first one."""
        return time.monotonic() - self._read_at

    def _totals(self, base: BaseModel) -> BaseTotals:
        totals = {} if self._snapshot is None else self._snapshot.totals
        own = totals.get(base.fingerprint, BaseTotals())
        if base.of is None:
            return own
        of, is_instead = totals.get(base.of, BaseTotals()), self._by_fingerprint[base.of] is base
        return BaseTotals(own.num_adapters + is_instead * of.num_adapters, {**of.contexts, **own.contexts})

    async def labels(self, digests: Collection[str]) -> dict[str, str]:
        """Map digests to `name@version`, as far as the catalog has them. A thread looks through all versions."""
        snapshot, wanted = self._snapshot, frozenset(digests)
        if snapshot is None or not wanted:
            return {}
        refs = (ref for entry in snapshot.models() for ref in entry.refs)
        return await asyncio.to_thread(lambda: {ref.digest: ref.label for ref in refs if ref.digest in wanted})

    async def _look_again(self) -> None:
        """Return after a refresh that began later than this call. Such refreshes are LOOK_AGAIN_S apart at least, so
        that a flood of unknown names does not become one of reads.
        """
        called_at = time.monotonic()
        async with self._looking:
            if self.follower.looked_at < called_at:
                await asyncio.sleep(self.follower.looked_at + LOOK_AGAIN_S - time.monotonic())
            await self.follower.refresh(called_at)

    async def resolve(self, model: str, principal: Principal) -> ResolvedModel:
        """Find what a name means for this caller. `base:name` is accepted as `name`.

        The database is read again for a name that the snapshot lacks, or that does not exist for the caller. Raises
        AdapterNotFound, PermissionDenied for a model that the caller's key is not for, BaseMismatch for an adapter of
        another base, and CatalogError before the first snapshot.
        """
        base, model = self._split(model)
        check_model(principal, model)
        if model in self.bases and base in (None, self.bases[model]):
            return ResolvedModel(self.bases[model])
        ref = None if self._snapshot is None else self._snapshot.find(model, principal)
        if ref is None:
            await self._look_again()
            ref = self._lookup(model, principal)
        return ResolvedModel(self._base_of(ref, base, principal), ref)

    def known_base(self, model: str, principal: Principal) -> str | None:
        """Name the base of a model, as far as it is known without a look at the database."""
        base, model = self._split(model)
        if model in self.bases:
            return model
        ref = None if self._snapshot is None else self._snapshot.find(model, principal)
        try:
            return None if ref is None else self._base_of(ref, base, principal).name
        except BaseMismatch:
            return None

    def _split(self, model: str) -> tuple[BaseModel | None, str]:
        """Split `base:name`; the base is None where there is a name alone."""
        prefix, colon, name = model.partition(":")
        return (self.bases[prefix], name) if colon and prefix in self.bases else (None, model)

    def _base_of(self, ref: AdapterRef, wanted: BaseModel | None, principal: Principal) -> BaseModel:
        """Find the base that an adapter is served on. Raises BaseMismatch where none is, or not the named one."""
        if wanted is not None:
            ref.check_base(wanted.name, wanted.fingerprint, wanted.of)
            return wanted
        base = self._by_fingerprint.get(ref.base_fingerprint)
        if base is None:
            raise BaseMismatch(
                f"adapter {ref.label} was trained on another base (fingerprint {ref.base_fingerprint[:12]}) than "
                f"{self.base_names(principal) or 'those'}, which this deployment serves"
            )
        return base

    def base_names(self, principal: Principal) -> str:
        """Name the bases that the caller may ask, for messages: `a`, `a and b`, `a, b and c`; empty without any."""
        names = [name for name in self.bases if may_ask(principal, name)]
        if not names:
            return ""
        *others, last = names
        return f"{', '.join(others)} and {last}" if others else last

    async def choose(self, model: str, principal: Principal, session: str | None) -> tuple[ResolvedModel, Arm | None]:
        """Find what a name means for a request of this session, and which of an alias's two versions it is if the alias
        has a canary. Without a session it is drawn. Raises what `resolve` raises.
        """
        found = await self.resolve(model, principal)
        ref = found.adapter
        if ref is None or not (entry := self.entry(ref)).canaries:
            return found, None
        canary = entry.canary(split_model(self._split(model)[1]).selector)
        if canary is None:
            return found, None
        session = session or uuid.uuid4().hex
        arm = Arm(canary.id, is_taken(f"{entry.name}@{canary.alias}@{canary.version}", session, canary.percent))
        if not arm.is_canary:
            return found, arm
        ref = entry.select(str(canary.version))
        return ResolvedModel(self._base_of(ref, found.base, principal), ref), arm

    def template(self, adapter: AdapterRef | None) -> str | None:
        """Return the chat template of an adapter that has its own; None: the base's is used."""
        if adapter is None or adapter.chat_template is None:
            return None
        assert self._snapshot is not None
        return self._snapshot.templates[adapter.chat_template]

    def entries(self, principal: Principal, after: str | None = None) -> Iterator[AdapterEntry | None]:
        """Go through the adapters of this moment that exist for the caller, by name and after the name `after`; None
        for each that is not served here, or that its key is not for.
        """
        if self._snapshot is None:
            return
        for entry in self._snapshot.models(after, principal):
            is_served = entry.default.base_fingerprint in self._by_fingerprint
            yield entry if is_served and may_ask(principal, entry.name) else None

    def base_of(self, ref: AdapterRef) -> BaseModel:
        """Return the base on which an adapter is served that `entries` yields."""
        return self._by_fingerprint[ref.base_fingerprint]

    def entry(self, ref: AdapterRef) -> AdapterEntry:
        """Return the entry of an adapter that `resolve` has just found."""
        assert self._snapshot is not None
        return self._snapshot.adapters[ref.name]

    def _lookup(self, model: str, principal: Principal) -> AdapterRef:
        if self._snapshot is None:
            raise CatalogError(
                f"the model {shown(model)} cannot be looked up: the catalog could not be read yet "
                f"({self.follower.failure}); try again"
            )
        try:
            return self._snapshot.resolve(model, principal)
        except AdapterNotFound as e:
            raise AdapterNotFound(f"the model {shown(model)} does not exist: {e}") from e

    # -- what the follower reads --------------------------------------------------------------------------------------

    @property
    def counter(self) -> int:
        return -1 if self._snapshot is None else self._snapshot.counter

    def read(self, catalog: Catalog, *, whole: bool) -> CatalogSnapshot:
        if self._snapshot is not None:
            return catalog.snapshot(self._snapshot, whole=whole)
        with collection_paused():
            return _exempt(catalog.snapshot(whole=whole))

    def read_kept(self) -> StoredSnapshot[CatalogSnapshot] | None:
        with collection_paused():
            found = None if self._kept is None else self._kept.read()
            return found and StoredSnapshot(_exempt(found.state), found.age_s)

    def take(self, state: CatalogSnapshot, at: float) -> None:
        """Take a snapshot. Whoever looks sees the one before or this one, complete."""
        self._snapshot, self._read_at = state, at

    def confirm(self, at: float) -> None:
        self._read_at = at
        snapshot = self._snapshot
        if snapshot is not None:
            self._keeper.keep(lambda: snapshot, snapshot.counter)


def _exempt(snapshot: CatalogSnapshot) -> CatalogSnapshot:
    """Exempt a new snapshot before a collection can begin, which would look through all of it."""
    if len(snapshot.adapters) >= _MANY:
        exempt_all()
    return snapshot


class ModelCards:
    """Makes cards of the directory's models. `limit` maps a base and the context length of one of its models to the
    one that is served.
    """

    def __init__(self, directory: ModelResolver, limit: Callable[[BaseModel, int], int]) -> None:
        self._directory, self._limit = directory, limit
        self._created = int(time.time())
        self._lists = QuotaGate()

    async def card(self, model: str, principal: Principal) -> Model:
        """Make the card of a model, by any name that the directory resolves for this caller. Raises what it raises."""
        base, ref = await self._directory.resolve(model, principal)
        return self._base(base) if ref is None else self._adapter(model, self._directory.entry(ref), ref)

    def count_list(self, principal: Principal) -> None:
        """Count a list before it is made. Raises RateLimited where the key has asked for too many in a minute."""
        counted = Principal(tenant=principal.tenant, key_id=principal.key_id, limits=LISTS)
        try:
            self._lists.admit(counted, 0, time.time())
        except RateLimited as e:
            raise RateLimited(f"lists of models: {e}", e.retry_after_s) from e

    async def page(
        self,
        principal: Principal,
        after: str | None = None,
        limit: int | None = None,
        *,
        form: Callable[[Model], ResponseBody] | None = None,
    ) -> AsyncIterator[bytes]:
        """Make the parts of a list's body: the bases, then adapters by name, as of one moment: what the caller may ask.

        `after` and `limit` are those of OpenAI's other lists: at most `limit` models after the one called `after`, and
        never more than MAX_CARDS. `form` makes another API's cards, whose list names no object; None: OpenAI's.
        """
        limit = min(MAX_CARDS if limit is None else limit, MAX_CARDS)
        first = last = None
        num, has_more = 0, False
        yield b'{"object":"list","data":[' if form is None else b'{"data":['
        async for cards in self._found(principal, after):
            part = cards[: limit - num]
            if part:
                written = part if form is None else map(form, part)
                yield (b"," if num else b"") + ",".join(card.to_json() for card in written).encode()
                first, last = first or part[0].id, part[-1].id
                num += len(part)
            if has_more := len(part) < len(cards):
                break
        end = {"first_id": first, "last_id": last, "has_more": has_more}
        yield f"],{json.dumps(end, separators=(',', ':'))[1:]}".encode()

    async def _found(self, principal: Principal, after: str | None) -> AsyncIterator[list[Model]]:
        """Make cards in parts, between which other requests have their turn."""
        bases = list(self._directory.bases.values())
        if after is None or after in self._directory.bases:
            first = 0 if after is None else 1 + [base.name for base in bases].index(after)
            yield [self._base(base) for base in bases[first:] if may_ask(principal, base.name)]
            after = None
        entries = self._directory.entries(principal, after)
        while part := list(islice(entries, _AT_ONCE)):
            yield [self._adapter(e.name, e, e.default) for e in part if e is not None]
            await asyncio.sleep(0)

    def _base(self, base: BaseModel) -> Model:
        return Model(
            id=base.name,
            object="model",
            created=self._created,
            owned_by=_OWNER,
            root=base.name,
            parent=None,
            max_model_len=self._limit(base, base.config.max_position_embeddings),
        )

    def _adapter(self, model: str, entry: AdapterEntry, ref: AdapterRef) -> Model:
        base = self._directory.base_of(ref)
        return Model(
            id=model,
            object="model",
            created=int(entry.created_at.timestamp()),
            owned_by=_OWNER,
            root=ref.label,
            parent=base.name,
            max_model_len=self._limit(base, ref.context_length),
            method=ref.method,
            digest=ref.digest,
            aliases=entry.aliases,
            versions=[r.version for r in reversed(entry.refs)],
            **({"weights": entry.weights} if entry.canaries else {}),
        )
