"""What the runner of batches asks of a gateway."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple, Protocol

# Why a line has no answer of its own: its key is gone or blocked; a limit, or the budget, is used up; the base has no
# room; engine, store or catalog are away.
Refusal = Literal["revoked", "blocked", "limit", "budget", "overloaded", "away"]


class LineAnswer(NamedTuple):
    """The answer to a line: `body` is JSON. `refusal`: it says nothing of the line, which is to be sent again after
    `retry_after_s`.
    """

    status: int
    body: str
    request_id: str | None = None
    refusal: Refusal | None = None
    retry_after_s: float = 1.0


class BaseLoad(NamedTuple):
    """A base's engines: how long the request waits that waits longest, and whether none runs."""

    wait_s: float
    is_cold: bool


class GatewayLines(Protocol):
    """A gateway of this process, or any of a deployment. Raises LorayError where it does not answer."""

    async def run_line(self, key_id: str | None, tenant: str, endpoint: str, body: bytes) -> LineAnswer:
        """Answer a line as the request that the key, or nobody's, would send for this tenant."""

    async def bases_of(self, key_id: str | None, tenant: str, models: Collection[str]) -> Mapping[str, str | None]:
        """Map models to the names of their bases; None: it is not known, and a line for it is refused."""

    async def loads(self) -> Mapping[str, BaseLoad]:
        """Describe the bases, by name."""
