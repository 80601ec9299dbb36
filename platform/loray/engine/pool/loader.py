"""Threads that read and pack adapters.

A load gives its result before it is complete, as soon as the rest is expected within the time that the first step with
the adapter takes to compute (`lead_s`): then each layer is there before the step needs it, and the step does not wait.
`model.partial` handles the adapters for which this prediction is wrong.

That is the CPU's way. A GPU's step is queued ahead, and a layer that is late would stop it for every request: there a
load gives its result when it is complete, while the steps of others go on.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from loray.engine.pool.packed import FIRST_BYTES, PackedAdapter, Packer
from loray.engine.pool.pool import Pool
from loray.errors import EngineError
from loray.methods.weights import AdapterWeights
from loray.spec import AdapterBytes, AdapterRef, RopeParameters
from loray.telemetry import get_logger
from loray_kernels import use_device

_log = get_logger(__name__)

# A load waits for the network most of the time; what four of them compute takes less than one core.
_NUM_THREADS = 4


class LoadProgress(Protocol):
    """Called as an adapter is loaded, at last when it is complete. `remaining_s`: the estimated time until then."""

    def __call__(self, packed: PackedAdapter, remaining_s: float) -> None: ...


class AdapterSource(Protocol):
    """An adapter in the place where it is stored."""

    def pack(self, packer: Packer, progress: LoadProgress) -> PackedAdapter:
        """Load it into host memory. Raises errors of the adapter or its place. If `progress` has been called with the
        adapter before, the caller then fails its PartialLoad.
        """
        ...


LoadAdapter = Callable[[AdapterRef], AdapterWeights | AdapterSource]


class AdapterLoads:
    """Runs loads in its threads, which call `wake` when an adapter that was given before it was complete is done.

    `prepare_rope` is called in these threads with the RoPE of each adapter that has its own; what it raises fails the
    load.
    """

    def __init__(
        self,
        pool: Pool,
        packer: Packer,
        load: LoadAdapter,
        wake: Callable[[], None],
        prepare_rope: Callable[[RopeParameters], None] = lambda rope: None,
    ) -> None:
        self._pool, self._packer, self._load, self._wake = pool, packer, load, wake
        self._prepare_rope = prepare_rope
        self._threads = ThreadPoolExecutor(
            _NUM_THREADS, thread_name_prefix="adapter-load", initializer=_prepare_thread, initargs=(pool.tensor.device,)
        )
        if pool.tensor.nbytes >= sum(FIRST_BYTES):  # a smaller pool holds no such adapters
            packer.memory.prepare()
        self._whole = pool.tensor.is_cuda
        self._num_blocks: dict[str, int] = {}
        self._bytes: dict[str, AdapterBytes] = {}

    def start(self, ref: AdapterRef, lead_s: float) -> Future[PackedAdapter]:
        """Start a load. The result may be partial, except on a GPU; about `lead_s` seconds later it is complete."""
        result: Future[PackedAdapter] = Future()
        self._threads.submit(self._run, result, ref, lead_s)
        return result

    def num_blocks(self, digest: str) -> int | None:
        """Count the most blocks that the adapter takes; None until it has been loaded. From any thread."""
        return self._num_blocks.get(digest)

    def expected_blocks(self, ref: AdapterRef) -> int:
        """Count them, or estimate them from its published size until it has been loaded. On several ranks it takes more
        than the estimate. May be called from any thread.
        """
        estimate = min(-(-ref.nbytes // self._pool.block_bytes) + 1, self._pool.geometry.num_blocks // 2)
        return self._num_blocks.get(ref.digest) or estimate

    def nbytes(self, digest: str) -> AdapterBytes | None:
        """Count the bytes that it takes in the pool; None until it has been loaded. May be called from any thread."""
        return self._bytes.get(digest)

    def forget(self, digest: str) -> None:
        self._num_blocks.pop(digest, None)
        self._bytes.pop(digest, None)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, result: Future[PackedAdapter], ref: AdapterRef, lead_s: float) -> None:
        if not result.set_running_or_notify_cancel():
            return

        def progress(packed: PackedAdapter, remaining_s: float) -> None:
            if not result.done():
                if packed.rope is not None:
                    self._prepare_rope(packed.rope)
                complete = packed.partial is None or packed.partial.complete
                if complete or (remaining_s <= lead_s and not self._whole):
                    self._note_size(ref, packed)
                    result.set_result(packed)
            elif packed.partial is not None and packed.partial.complete:
                self._wake()

        try:
            loaded = self._load(ref)
            if isinstance(loaded, AdapterWeights):
                progress(self._packer.pack(loaded), 0.0)
            else:
                progress(loaded.pack(self._packer, progress), 0.0)
        except BaseException as e:  # noqa: BLE001 - the requests that wait for this adapter get it
            if not result.done():
                result.set_exception(e)
                return
            partial = result.result().partial
            if partial is None or partial.done:
                _log.warning("adapter %s is here, but the node's cache has not kept it: %s", ref.label, e)
                return
            partial.fail(e if isinstance(e, Exception) else EngineError(f"loading {ref.label}: {e!r}"))
            self._wake()

    def _note_size(self, ref: AdapterRef, packed: PackedAdapter) -> None:
        geometry = self._pool.geometry
        self._num_blocks[ref.digest] = num_blocks = self._pool.num_blocks_for(packed)
        pair = None
        if packed.pair is not None:
            pair_blocks = num_blocks - packed.shape.num_blocks(geometry)
            pair = (packed.pair.digest, pair_blocks * self._pool.block_bytes)
        self._bytes[ref.digest] = AdapterBytes(packed.nbytes, pair)


def _prepare_thread(device: torch.device) -> None:
    use_device(device)  # memory is pinned for the thread's current device
    # Two teams of OpenMP threads on the same cores slow each other down. Loading needs only one thread.
    torch.set_num_threads(1)
