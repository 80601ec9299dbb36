"""Threads that read and pack adapters."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from loray.engine.pool.packed import FIRST_BYTES, PackedAdapter, Packer
from loray.engine.pool.pool import Pool
from loray.spec import AdapterBytes, AdapterRef, RopeParameters
from loray_kernels import use_device

# A load waits for the network most of the time; what four of them compute takes less than one core.
_NUM_THREADS = 4


# Loads an adapter into host memory, complete, verified and packed, wherever it is. Raises errors of the adapter or its
# place.
LoadAdapter = Callable[[AdapterRef, Packer], PackedAdapter]


class AdapterLoads:
    """Runs loads in its threads. `prepare_rope` is called there with the RoPE of each adapter that has its own; what it
    raises fails the load.
    """

    def __init__(
        self,
        pool: Pool,
        packer: Packer,
        load: LoadAdapter,
        prepare_rope: Callable[[RopeParameters], None] = lambda rope: None,
    ) -> None:
        self._pool, self._packer, self._load, self._prepare_rope = pool, packer, load, prepare_rope
        self._threads = ThreadPoolExecutor(
            _NUM_THREADS, thread_name_prefix="adapter-load", initializer=_prepare_thread, initargs=(pool.tensor.device,)
        )
        if pool.tensor.nbytes >= sum(FIRST_BYTES):  # a smaller pool holds no such adapters
            packer.memory.prepare()
        self._num_blocks: dict[str, int] = {}
        self._bytes: dict[str, AdapterBytes] = {}

    def start(self, ref: AdapterRef) -> Future[PackedAdapter]:
        return self._threads.submit(self._run, ref)

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

    def _run(self, ref: AdapterRef) -> PackedAdapter:
        packed = self._load(ref, self._packer)
        if packed.rope is not None:
            self._prepare_rope(packed.rope)
        self._num_blocks[ref.digest] = num_blocks = self._pool.num_blocks_for(packed)
        pair = None
        if packed.pair is not None:
            pair_blocks = num_blocks - packed.shape.num_blocks(self._pool.geometry)
            pair = (packed.pair.digest, pair_blocks * self._pool.block_bytes)
        self._bytes[ref.digest] = AdapterBytes(packed.nbytes, pair)
        return packed


def _prepare_thread(device: torch.device) -> None:
    use_device(device)  # memory is pinned for the thread's current device
    # Two teams of OpenMP threads on the same cores slow each other down. Loading needs only one thread.
    torch.set_num_threads(1)
