"""What a gateway has of each base that it serves: its prompts, its limits and its engines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from loray import __version__
from loray.api.status import AutoscalingStatus, BaseStatus, ReplicaStatus
from loray.bases.registry import BaseModel
from loray.engine.memory.limits import max_model_len, pool_geometry
from loray.errors import EngineError
from loray.spec import AdapterRef, ServeSpec
from loray.text.grammar import GrammarChecker
from serve_apps.gateway.engines import Engines
from serve_apps.gateway.metrics import OfBase
from serve_apps.gateway.prompts import PromptEncoder

MIN_BODY_BYTES, MAX_BODY_BYTES = 1 << 20, 64 << 20
BYTES_PER_TOKEN = 64  # of a body; JSON takes 12 bytes for a character at most
FRESH_S = 1.0  # for which what replicas have said of their health is said again

OpenEngines = Callable[[ServeSpec], Engines]


class ServedBase:
    """One base of a deployment. `spec` is its own, `engines` have its replicas."""

    def __init__(self, spec: ServeSpec, base: BaseModel, prompts: PromptEncoder, engines: Engines) -> None:
        self.spec, self.base = spec, base
        self.prompts, self.engines = prompts, engines
        self.grammars = GrammarChecker(base)
        self.system_fingerprint = f"loray-{__version__}-{base.fingerprint[:12]}"
        is_known = spec.fixed_pool_bytes is not None  # else only its replicas know it
        self._pool_tokens = pool_geometry(spec, base.config).num_tokens if is_known else None

    @classmethod
    def open(cls, spec: ServeSpec, base: BaseModel, engines: Engines) -> ServedBase:
        """Reads the base's tokenizer and templates."""
        return cls(spec, base, PromptEncoder.load(base, spec.tool_parser), engines)

    @property
    def name(self) -> str:
        return self.base.name

    def limit(self, context_length: int) -> int:
        """The largest number of prompt and output tokens: the minimum of the model's, the spec's and the pool's limit.

        The adapter takes space in the pool too. Only its replica knows how much, and applies its own limit.
        """
        return max_model_len(self.spec, context_length, self._pool_tokens)

    def limit_of(self, adapter: AdapterRef | None) -> int:
        """As `limit`, of an adapter, or of the base itself."""
        return self.limit(self.base.config.max_position_embeddings if adapter is None else adapter.context_length)

    def max_body_bytes(self, longest_context: int) -> int:
        """Of a request: the spec's, else what a prompt as long as the longest context may take, at most 64 MiB."""
        if self.spec.max_body_bytes is not None:
            return self.spec.max_body_bytes
        return min(max(MIN_BODY_BYTES, BYTES_PER_TOKEN * self.limit(longest_context)), MAX_BODY_BYTES)

    async def healthy(self) -> bool:
        """Whether it can be asked: a replica answers, or the next request starts one. Not where a replica is wanted and
        the last one did not become ready.
        """
        if not self.engines.is_cold():
            return await self.engines.healthy()
        return not (self.engines.start_failed() and await self.num_wanted())

    async def metrics(self) -> OfBase:
        num_wanted, replicas = await asyncio.gather(self.num_wanted(), self.engines.metrics())
        return OfBase(num_wanted, replicas)

    async def num_wanted(self) -> int:
        """The replicas that the spec or the autoscaler wants."""
        return self._target(await self._scaling())

    async def _scaling(self) -> AutoscalingStatus | None:
        return None if self.spec.autoscaling is None else await self.engines.autoscaling()

    def _target(self, scaling: AutoscalingStatus | None) -> int:
        return self.spec.min_replicas if scaling is None else scaling.target

    async def status(self, num_adapters: int, layout: bool | frozenset[str]) -> BaseReport:
        """Asks its replicas. `num_adapters`: of it in the catalog."""
        replicas = [r.model_copy(update={"base": self.name}) for r in await self.engines.stats(layout)]
        scaling = await self._scaling()
        target = self._target(scaling)
        status = BaseStatus(
            base=self.name,
            status="degraded" if len(replicas) < target else "ok" if target or replicas else "asleep",
            num_replicas=len(replicas),
            target=target,
            num_adapters=num_adapters,
            spec=self.spec,
            autoscaling=scaling,
        )
        return BaseReport(status, replicas)


class BaseReport(NamedTuple):
    status: BaseStatus
    replicas: list[ReplicaStatus]


class Target(NamedTuple):
    """What a request's model means. `adapter`: None for the base itself. `limit`: the largest number of tokens."""

    base: ServedBase
    adapter: AdapterRef | None
    limit: int


class Health:
    """Whether the bases can be asked. Asks the replicas at most once in FRESH_S, however many callers, who need no key,
    there are. Used from one event loop.
    """

    def __init__(self, bases: Sequence[ServedBase]) -> None:
        self._bases = bases
        self._asked: asyncio.Future[list[bool]] | None = None
        self._asked_at = 0.0

    async def found(self) -> str:
        """JSON, with the number of the bases that cannot be asked. Raises EngineError if that are all of them."""
        asked, now = self._asked, asyncio.get_running_loop().time()
        if asked is None or (asked.done() and now >= self._asked_at + FRESH_S):
            asked = self._asked = asyncio.gather(*(base.healthy() for base in self._bases))
            self._asked_at = now
        num_silent = (await asyncio.shield(asked)).count(False)
        if num_silent == len(self._bases):
            raise EngineError("no replica answers; `loray status` says more")
        found = {"status": "degraded", "num_unavailable": num_silent} if num_silent else {"status": "ok"}
        return json.dumps(found, separators=(",", ":"))
