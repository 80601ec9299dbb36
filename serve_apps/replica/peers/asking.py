"""Asks another replica of the deployment for an adapter's files.

They are the result of a call through Serve's handle, which Ray's object store carries to this node, in shared memory.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from loray.spec import AdapterOf
from loray.telemetry import get_logger
from serve_apps.replica.metrics import LoadCounts, PeerAnswer

if TYPE_CHECKING:
    from loray.store import AdapterCopy

_log = get_logger(__name__)

_MAX_TOLD = 4096
_AVOIDED_S = 10.0  # a replica that did not answer: Serve has replaced it by then, or it is busy with something else


class ReplicaPeers:
    """Implements `serve_apps.replica.loading.Peers`. Used from any thread.

    replica      this one's name, which it never asks
    open_handle  of the deployment; called once, when it is needed first
    timeout_s    for one question; only one replica is asked for an adapter
    """

    def __init__(
        self,
        replica: str,
        open_handle: Callable[[], Any],
        counts: LoadCounts,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replica, self._open_handle, self._counts = replica, open_handle, counts
        self._timeout_s, self._clock = timeout_s, clock
        self._lock = threading.Lock()
        self._handle: Any = None
        self._holders: OrderedDict[str, tuple[str, ...]] = OrderedDict()  # by digest
        self._avoided: dict[str, float] = {}  # replica → until when

    def told(self, digest: str, holders: tuple[str, ...]) -> None:
        """Take the replicas that have the adapter, as a gateway knows it now."""
        others = tuple(holder for holder in holders if holder != self._replica)
        with self._lock:
            self._holders.pop(digest, None)
            if others:
                self._holders[digest] = others
                if len(self._holders) > _MAX_TOLD:
                    self._holders.popitem(last=False)

    def copy(self, digest: str) -> AdapterCopy | None:
        holder = self._holder(digest)
        if holder is None:
            return None
        response = None
        try:
            response = self._deployment().give_adapter.remote(AdapterOf(digest, holder))
            copy = cast("AdapterCopy | None", response.result(timeout_s=self._timeout_s))
        except Exception as e:  # noqa: BLE001 - whatever it is, the store has the adapter
            self._avoid(holder, "late" if isinstance(e, TimeoutError) else "failed", e)
            if response is not None:
                with suppress(Exception):
                    response.cancel()
            return None
        if copy is None:
            self._counts.asked("absent")
        return copy

    def connect(self) -> None:
        """Open the handle now, in a thread, so that the first question need not wait for it."""
        threading.Thread(target=self._connect, name="peers", daemon=True).start()

    def _connect(self) -> None:
        try:
            self._deployment()
        except Exception as e:  # noqa: BLE001 - the first question tries again
            _log.warning("other replicas cannot be asked yet: %s", e)

    def _holder(self, digest: str) -> str | None:
        with self._lock:
            now = self._clock()
            known = self._holders.get(digest, ())
            return next((holder for holder in known if self._avoided.get(holder, now) <= now), None)

    def _avoid(self, holder: str, answer: PeerAnswer, error: Exception) -> None:
        self._counts.asked(answer)
        with self._lock:
            now = self._clock()
            self._avoided = {name: until for name, until in self._avoided.items() if until > now}
            self._avoided[holder] = now + _AVOIDED_S
        _log.warning("replica %s did not give an adapter, the store is asked: %s", holder, error or "it took too long")

    def _deployment(self) -> Any:
        with self._lock:
            if self._handle is None:
                self._handle = self._open_handle()
            return self._handle
