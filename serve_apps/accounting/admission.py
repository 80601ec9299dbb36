"""Whether a request that generates may begin: its limits, and its turn where the gateway cannot keep up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from loray.errors import LorayError, Overloaded
from loray.serving.fair_admission import FairAdmission
from loray.spec import Principal
from serve_apps.accounting.account import Accounts

LOOK_S = 0.02  # between two looks how late the event loop is
_LOOP_LATE_S = 0.003  # that the loop may be, in the mean
LONGEST_S = 30.0  # that a request waits for its turn
_RETRY_S = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A request that waits."""

    tenant: str
    came: asyncio.Future[None]


class TenantTurns:
    """Requests of tenants in turn. Used from one event loop."""

    def __init__(self, fair: FairAdmission[Turn] | None = None) -> None:
        self._fair = fair or FairAdmission[Turn]()
        self._looking: asyncio.TimerHandle | None = None

    @property
    def num_waiting(self) -> int:
        return self._fair.num_waiting

    def is_modest(self, tenant: str) -> bool:
        """See FairAdmission."""
        return self._fair.is_modest(tenant)

    async def enter(self, tenant: str) -> None:
        """Returns when the request may begin; `leave` follows once. Overloaded if that takes too long."""
        loop = asyncio.get_running_loop()
        turn = Turn(tenant, loop.create_future())
        is_admitted = self._fair.ask(tenant, turn, loop.time())
        if self._fair.is_crowded and self._looking is None:
            self._look_later(loop)
        if is_admitted:
            return
        try:
            async with asyncio.timeout(LONGEST_S):
                await turn.came
        except BaseException as e:
            self._fair.withdraw(tenant, turn)
            if turn.came.done() and not turn.came.cancelled():
                self.leave(tenant)
            if not isinstance(e, TimeoutError):
                raise
            raise Overloaded(
                f"the gateway is busy, and tenant {tenant} has more requests there than others", _RETRY_S
            ) from e

    def tokens_are_late(self, lateness: float) -> None:
        """By what they may be; see `Engines.running`."""
        if self._fair.is_crowded:
            self._begin(self._fair.observe(lateness, asyncio.get_running_loop().time()))

    def leave(self, tenant: str) -> None:
        self._begin(self._fair.ended(tenant, asyncio.get_running_loop().time()))

    def _begin(self, turns: Sequence[Turn]) -> None:
        for turn in turns:
            if turn.came.cancelled():
                self.leave(turn.tenant)
            else:
                turn.came.set_result(None)

    def _look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        self._looking = loop.call_later(LOOK_S, self._look, loop, loop.time() + LOOK_S)

    def _look(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        now = loop.time()
        self._begin(self._fair.observe((now - due) / _LOOP_LATE_S, now))
        self._looking = None
        if self._fair.is_crowded:
            self._look_later(loop)


class _Route(NamedTuple):
    path: str


class AdmitRequests:
    """ASGI middleware: a request over its limits gets its refusal, and another one waits for its turn, before its body
    is read. Behind the one that finds out who asks.

    paths    of the requests that generate or tokenise
    refused  the response to an error, in the application's form
    """

    def __init__(
        self,
        app: ASGIApp,
        accounts: Accounts,
        turns: TenantTurns,
        paths: Collection[str],
        refused: Callable[[Exception], Response],
    ) -> None:
        self._app, self._accounts, self._turns, self._refused = app, accounts, turns, refused
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else None
        if path not in self._paths or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        principal = scope["state"]["principal"]
        assert isinstance(principal, Principal)
        scope["state"]["received_at"] = asyncio.get_running_loop().time()
        try:
            self._accounts.enter(principal)
            await self._turns.enter(principal.tenant)
        except LorayError as e:
            scope["route"] = _Route(path)  # which metrics name
            await self._refused(e)(scope, receive, send)
            return
        scope["state"]["is_modest"] = self._turns.is_modest(principal.tenant)
        try:
            await self._app(scope, receive, send)
        finally:
            self._turns.leave(principal.tenant)
