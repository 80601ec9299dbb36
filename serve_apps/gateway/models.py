"""The models that a gateway lists, in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from itertools import islice

from loray.api.openai import Model
from loray.bases.registry import BaseModel
from loray.catalog import AdapterEntry
from loray.errors import RateLimited
from loray.serving.access import may_ask
from loray.serving.quotas import QuotaGate
from loray.spec import AdapterRef, Limits, Principal
from serve_apps.gateway.directory import ModelDirectory

_OWNER = "loray"
MAX_CARDS = 10_000  # of one answer
LISTS = Limits(rpm_limit=60)  # of a key, beside its own limits
_AT_ONCE = 100  # models that are encoded before other requests have their turn: about a millisecond


class ModelCards:
    """Cards of the directory's models. `limit` maps a base and the context length of one of its models to the one that
    is served.
    """

    def __init__(self, directory: ModelDirectory, limit: Callable[[BaseModel, int], int]) -> None:
        self._directory, self._limit = directory, limit
        self._created = int(time.time())
        self._lists = QuotaGate()

    async def card(self, model: str, principal: Principal) -> Model:
        """One model, by any name that the directory resolves for this caller. Raises what it raises."""
        base, ref = await self._directory.resolve(model, principal)
        return self._base(base) if ref is None else self._adapter(model, self._directory.entry(ref), ref)

    def count_list(self, principal: Principal) -> None:
        """Before a list. Raises RateLimited where the key has asked for too many in the last minute."""
        counted = Principal(tenant=principal.tenant, key_id=principal.key_id, limits=LISTS)
        try:
            self._lists.admit(counted, 0, time.time())
        except RateLimited as e:
            raise RateLimited(f"lists of models: {e}", e.retry_after_s) from e

    async def page(
        self, principal: Principal, after: str | None = None, limit: int | None = None
    ) -> AsyncIterator[bytes]:
        """The parts of a list's body: the bases, then adapters by name, as of one moment: what the caller may ask.

        `after` and `limit` are those of OpenAI's other lists: at most `limit` models after the one called `after`, and
        never more than MAX_CARDS.
        """
        limit = min(MAX_CARDS if limit is None else limit, MAX_CARDS)
        first = last = None
        num, has_more = 0, False
        yield b'{"object":"list","data":['
        async for cards in self._found(principal, after):
            part = cards[: limit - num]
            if part:
                yield (b"," if num else b"") + ",".join(card.to_json() for card in part).encode()
                first, last = first or part[0].id, part[-1].id
                num += len(part)
            if has_more := len(part) < len(cards):
                break
        end = {"first_id": first, "last_id": last, "has_more": has_more}
        yield f"],{json.dumps(end, separators=(',', ':'))[1:]}".encode()

    async def _found(self, principal: Principal, after: str | None) -> AsyncIterator[list[Model]]:
        """Cards, in parts between which other requests have their turn."""
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
