"""Flights: adapters come from wherever they are kept and are packed, in threads of their own.

A flight is usable as soon as what is missing is expected within the time that its first step takes to compute (`lead`):
the layers then arrive before the step comes to them, and nobody waits. See `landing` for where that proves wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from loray.adapters.weights import AdapterWeights
from loray.engine.pool.packed import FIRST_BYTES, PackedAdapter, Packer
from loray.engine.pool.pool import Pool
from loray.errors import EngineError
from loray.spec import AdapterBytes, AdapterRef
from loray.telemetry import get_logger

_log = get_logger(__name__)

# A flight waits for the network most of its time; what it computes takes less than one core with four of them.
_NUM_FLIGHTS = 4


class Progress(Protocol):
    """Told as an adapter arrives, the last time when it has landed. `remaining_s`: until then, as far as known."""

    def __call__(self, packed: PackedAdapter, remaining_s: float) -> None: ...


class AdapterSource(Protocol):
    """One adapter, where it is kept."""

    def pack(self, packer: Packer, progress: Progress) -> PackedAdapter:
        """Bring it into host memory. Raises what is wrong with it, or with where it is kept; `progress` may have been
        given it before that, and its arrival is then failed by the caller.
        """
        ...


LoadAdapter = Callable[[AdapterRef], AdapterWeights | AdapterSource]


class AdapterLoads:
    """`wake` is called from the flights' threads whenever the engine should look again."""

    def __init__(self, pool: Pool, packer: Packer, load: LoadAdapter, wake: Callable[[], None]) -> None:
        self._pool, self._packer, self._load, self._wake = pool, packer, load, wake
        self._threads = ThreadPoolExecutor(
            _NUM_FLIGHTS, thread_name_prefix="adapter-load", initializer=_leave_the_cores_to_the_engine
        )
        if pool.tensor.nbytes >= sum(FIRST_BYTES):  # not for a pool that holds no such adapter
            packer.memory.prepare()
        self._num_blocks: dict[str, int] = {}
        self._bytes: dict[str, AdapterBytes] = {}

    def start(self, ref: AdapterRef, lead_s: float) -> Future[PackedAdapter]:
        """Its result may still be arriving, for at most about `lead_s`."""
        flight: Future[PackedAdapter] = Future()
        flight.add_done_callback(lambda _: self._wake())
        self._threads.submit(self._fly, flight, ref, lead_s)
        return flight

    def num_blocks(self, digest: str) -> int | None:
        """Blocks that the adapter takes at most; None until it has been loaded. From any thread, as `nbytes`."""
        return self._num_blocks.get(digest)

    def nbytes(self, digest: str) -> AdapterBytes | None:
        """What it takes in the pool."""
        return self._bytes.get(digest)

    def forget(self, digest: str) -> None:
        self._num_blocks.pop(digest, None)
        self._bytes.pop(digest, None)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _fly(self, flight: Future[PackedAdapter], ref: AdapterRef, lead_s: float) -> None:
        if not flight.set_running_or_notify_cancel():
            return

        def progress(packed: PackedAdapter, remaining_s: float) -> None:
            if not flight.done():
                if remaining_s <= lead_s:
                    self._note_size(ref, packed)
                    flight.set_result(packed)
            elif packed.arrival is not None and packed.arrival.landed:
                self._wake()

        try:
            loaded = self._load(ref)
            if isinstance(loaded, AdapterWeights):
                progress(self._packer.pack(loaded), 0.0)
            else:
                progress(loaded.pack(self._packer, progress), 0.0)
        except BaseException as e:  # noqa: BLE001 - it goes to those who wait for this adapter
            if not flight.done():
                flight.set_exception(e)
                return
            arrival = flight.result().arrival
            if arrival is None or arrival.done:
                _log.warning("adapter %s is here, but the node's cache has not kept it: %s", ref.label, e)
                return
            arrival.fail(e if isinstance(e, Exception) else EngineError(f"loading {ref.label}: {e!r}"))
            self._wake()

    def _note_size(self, ref: AdapterRef, packed: PackedAdapter) -> None:
        geometry = self._pool.geometry
        self._num_blocks[ref.digest] = num_blocks = self._pool.num_blocks_for(packed)
        pair = None
        if packed.pair is not None:
            pair_blocks = num_blocks - packed.shape.num_blocks(geometry)
            pair = (packed.pair.digest, pair_blocks * self._pool.block_bytes)
        self._bytes[ref.digest] = AdapterBytes(packed.nbytes, pair)


def _leave_the_cores_to_the_engine() -> None:
    # Two teams of OpenMP threads on the same cores slow each other down; loading is copies and hashes, and needs one.
    torch.set_num_threads(1)
