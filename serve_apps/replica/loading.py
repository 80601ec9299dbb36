"""Adapters on their way to the engine: from the node's cache, from another replica, or from the store; packed at once.

A replica need not load what it has kept in host memory. Otherwise the node's cache has the adapter, packed; or another
replica gives its files, which become the cache's. If neither has it, the store does: it is read as ranges of its
weights, in the order of layers. Each range is packed when it arrives, so the engine can use the first layers while the
last ones are being read. The file's SHA-256 is computed meanwhile and checked before any token computed with the
adapter is sent (`loray.engine.model.partial`).

Afterwards the adapter is written into the cache. Until its first step, hashing, packing and computing need the cores;
the cache only helps later loads.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loray.adapters.files import MAX_CONFIG_BYTES, check_declared, check_header_length, check_tensors, read_header
from loray.adapters.manifest import read_manifest, with_manifest
from loray.adapters.peft_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    parse_adapter,
    parse_config,
    read_adapter,
    without_prefix,
)
from loray.adapters.tensor_ranges import PartialFile, Range
from loray.bases.checkpoint import parse_header
from loray.bases.registry import BaseModel
from loray.engine.memory.partial import PartialLoad
from loray.engine.pool.packed import PackedAdapter, Packer, Packing, open_packed, packed_name, save_packed
from loray.errors import IntegrityError, UnsupportedError
from loray.priority import compute_in_background
from loray.settings import Settings
from loray.spec import AdapterManifest, AdapterRef
from loray.store import AdapterCache, AdapterCopy, AdapterStore, open_store
from loray.store.cache import CacheEntry
from loray.store.copies import write_copy
from loray.telemetry import get_logger
from loray_kernels.memory import Recycled
from serve_apps.replica.metrics import LoadCounts, Source

if TYPE_CHECKING:
    from loray.engine.pool.loader import LoadProgress
    from loray.methods.weights import AdapterWeights


_log = get_logger(__name__)

_MAX_WAIT_S = 0.25  # for the first step on an adapter
_MAX_WAITING = 8  # adapters that wait to be written; a loader that has one more writes it itself
_NODE_CACHE_BYTES = 16 << 30  # of disk
_FIRST_BYTES = 256 << 10  # contains the header, and all of a small adapter
_RANGE_BYTES = 4 << 20
_NUM_RANGES = 4  # read at once, of all adapters together


class CacheWriter:
    """Writes one adapter at a time, in a thread in the background. A failure is logged and affects no request."""

    def __init__(self) -> None:
        self._free_slots = threading.BoundedSemaphore(_MAX_WAITING)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-cache", initializer=compute_in_background)
        self._last: Future[None] | None = None

    def submit(
        self, label: str, packed: PackedAdapter, write: Callable[[], None], held: ExitStack, memory: Recycled
    ) -> None:
        """Schedule `write`. After it, `held` is closed and `memory` is prepared for the next load.

        If too many adapters wait already, `write` is called at once.
        """
        if self._free_slots.acquire(blocking=False):
            due = time.monotonic() + _MAX_WAIT_S
            self._last = self._thread.submit(self._run_and_release, label, packed, write, held, memory, due)
        else:
            self._run(label, packed, write, held, memory, 0.0)

    def flush(self) -> None:
        """Wait until everything has been written."""
        if self._last is not None:
            self._last.result()

    def _run_and_release(self, *args: Any) -> None:
        try:
            self._run(*args)
        finally:
            self._free_slots.release()

    def _run(
        self,
        label: str,
        packed: PackedAdapter,
        write: Callable[[], None],
        held: ExitStack,
        memory: Recycled,
        due: float,
    ) -> None:
        try:
            with held:
                if packed.partial is not None:
                    packed.partial.wait_until_used(max(0.0, due - time.monotonic()))
                write()
        except Exception as e:  # noqa: BLE001 - the adapter is served nevertheless
            _log.warning("adapter %s is here, but the node's cache has not kept it: %s", label, e)
        memory.prepare()


class Peers(Protocol):
    """Other replicas that have adapters."""

    def copy(self, digest: str) -> AdapterCopy | None:
        """Get the adapter's files from one that has it, not verified. None if none is known, or that one does not give
        it in time. Does not raise.
        """
        ...


class AdapterLoader:
    """Makes an adapter of a reference: the engine's `load`, which its loader threads call."""

    def __init__(
        self, base: BaseModel, settings: Settings, counts: LoadCounts | None = None, peers: Peers | None = None
    ) -> None:
        self.base, self.counts, self.peers = base, counts or LoadCounts(), peers
        self.store = AdapterStore(open_store(settings.store))
        self.cache = AdapterCache(self.store, settings.home / "cache", _NODE_CACHE_BYTES)
        self.ranges = ThreadPoolExecutor(_NUM_RANGES, thread_name_prefix="adapter-range")
        self.hashing = ThreadPoolExecutor(1, thread_name_prefix="adapter-hash")  # on another core than packing
        self.cache_writer = CacheWriter()

    def __call__(self, ref: AdapterRef) -> StoredAdapter:
        return StoredAdapter(self, ref)


class StoredAdapter:
    """Loads one adapter of the loader's store."""

    def __init__(self, loader: AdapterLoader, ref: AdapterRef) -> None:
        self._loader, self._ref = loader, ref

    def pack(self, packer: Packer, progress: LoadProgress) -> PackedAdapter:
        """Load and pack the adapter.

        Raises NotFoundError or IntegrityError from the store, BaseMismatch, and UnsupportedError if the engine does not
        support the adapter.
        """
        name = packed_name(packer, self._loader.base.fingerprint)
        with ExitStack() as held:
            entry = held.enter_context(
                self._loader.cache.entry(self._ref.digest, is_good=lambda folder: _is_good(folder / name))
            )
            file, source = entry.folder / name, self._source(entry)
            self._loader.counts.began(source)
            if source == "cache" and file.exists():
                return open_packed(file, pinned=packer.pinned)
            if source != "store":
                manifest = read_manifest(entry.folder)
                check_declared(read_header(entry.folder / WEIGHTS_FILE), manifest, source=self._ref.label)
                packed = packer.pack(self._checked(manifest, read_adapter(entry.folder, self._loader.base.config)))
                progress(packed, 0.0)
                if packed.pair is not None:
                    return packed

                def write() -> None:
                    save_packed(packed, file)
                    self._loader.cache.trim(self._ref.digest)
            else:
                packed, fetched = self._stream(entry.folder, packer, progress)

                def write() -> None:
                    self._loader.store.fetch(self._ref.digest, entry.folder, have=fetched)
                    if packed.pair is None:
                        save_packed(packed, file)

            self._loader.cache_writer.submit(self._ref.label, packed, write, held.pop_all(), packer.memory)
        return packed

    def _source(self, entry: CacheEntry) -> Source:
        """Find where the adapter's bytes come from. If it is not the store, they are in the cache then."""
        if entry.present:
            return "cache"
        copy = None if self._loader.peers is None else self._loader.peers.copy(self._ref.digest)
        if copy is not None:
            try:
                write_copy(copy, self._ref.digest, entry.folder)
                self._loader.counts.asked("given")
                return "peer"
            except (IntegrityError, OSError) as e:
                self._loader.counts.asked("failed")
                _log.warning("adapter %s comes from the store, as a replica's copy is unusable: %s", self._ref.label, e)
        return "store"

    def _stream(
        self, folder: Path, packer: Packer, progress: LoadProgress
    ) -> tuple[PackedAdapter, Mapping[str, bytes | memoryview]]:
        """Read the adapter from the store and pack it. Returns its files too."""
        digest, store = self._ref.digest, self._loader.store
        manifest = store.manifest(digest)
        config = self._loader.ranges.submit(self._read, manifest, CONFIG_FILE, 0, MAX_CONFIG_BYTES)
        file = self._begin(manifest, packer)
        config_bytes = config.result()
        if hashlib.sha256(config_bytes).hexdigest() != manifest.files[CONFIG_FILE]:
            raise IntegrityError(
                f"adapter {digest[:12]} is damaged: {CONFIG_FILE} differs from its SHA-256; publish the adapter again"
            )
        partial = PartialLoad()
        tensors = without_prefix(file.tensors)
        packing: Packing | None = None
        taken = 0
        with self._coming(manifest, file) as layers:
            for num_layers, remaining_s in layers:
                if packing is None:  # only now: Packing reads an embedding and norms that belong to no layer at once
                    parsed = parse_adapter(
                        folder, parse_config(folder, config_bytes), tensors, self._loader.base.config
                    )
                    packing = Packing(packer, self._checked(manifest, parsed), partial)
                packing.take(range(taken, num_layers))
                taken = num_layers
                partial.advance(num_layers)
                if remaining_s is not None:
                    progress(packing.packed, remaining_s)
        assert packing is not None
        self._loader.hashing.submit(file.verify, manifest.files[WEIGHTS_FILE]).result()
        partial.finish()
        progress(packing.packed, 0.0)
        return packing.packed, {CONFIG_FILE: config_bytes, WEIGHTS_FILE: file.data}

    def _begin(self, manifest: AdapterManifest, packer: Packer) -> PartialFile:
        source = f"adapter {self._ref.digest[:12]}: {WEIGHTS_FILE} in the store"
        size = self._loader.ranges.submit(self._size, manifest)
        beginning = self._read(manifest, WEIGHTS_FILE, 0, _FIRST_BYTES)
        missing = check_header_length(beginning, source=source) - len(beginning)
        if missing > 0:
            beginning += self._read(manifest, WEIGHTS_FILE, len(beginning), len(beginning) + missing)
        entries = parse_header(beginning, source=source)
        check_tensors(entries, source=source, file_bytes=size.result())  # before memory is taken by what it says
        check_declared(entries, manifest, source=source)
        return PartialFile(beginning, entries, packer.memory.empty, source=source)

    @contextmanager
    def _coming(self, manifest: AdapterManifest, file: PartialFile) -> Iterator[Iterator[tuple[int, float | None]]]:
        """Read the file. Yields an iterator over (number of complete layers, seconds until the file is hashed).

        The seconds are None if the next range has arrived too: packing it is better than a step on these layers.
        """
        ranges = file.ranges(_RANGE_BYTES)
        reads = [self._loader.ranges.submit(self._fill, manifest, file, piece) for piece in ranges]
        try:
            yield self._follow(file, ranges, reads)
        finally:
            for future in reads:
                future.cancel()
            wait(reads)  # so that none writes to memory that has been freed

    def _follow(
        self, file: PartialFile, ranges: Sequence[Range], reads: Sequence[Future[None]]
    ) -> Iterator[tuple[int, float | None]]:
        num_layers = self._loader.base.config.num_layers
        left = sum(r.stop - r.start for r in ranges)
        arrived, began = 0, time.monotonic()
        self._loader.hashing.submit(file.update_hash)
        for i, (piece, future) in enumerate(zip(ranges, reads, strict=True)):
            future.result()
            arrived += piece.stop - piece.start
            left -= piece.stop - piece.start
            if not left:
                yield num_layers, file.hash_seconds_left()
            elif piece.num_layers > 0 and ranges[i + 1].num_layers > 0:
                seconds_per_byte = (time.monotonic() - began) / arrived
                remaining_s = left * seconds_per_byte + file.hash_seconds_left()
                yield piece.num_layers, None if reads[i + 1].done() else remaining_s
        if not ranges:
            yield num_layers, file.hash_seconds_left()

    def _fill(self, manifest: AdapterManifest, file: PartialFile, piece: Range) -> None:
        self._loader.store.read_into(
            self._ref.digest,
            WEIGHTS_FILE,
            manifest.files[WEIGHTS_FILE],
            piece.start,
            file.data[piece.start : piece.stop],
        )
        file.mark_received(piece.start, piece.stop)
        self._loader.hashing.submit(file.update_hash)

    def _read(self, manifest: AdapterManifest, name: str, start: int, stop: int) -> bytes:
        if name not in manifest.files:
            raise UnsupportedError(f"adapter {self._ref.digest[:12]} has no {name}: it is not a PEFT adapter")
        return self._loader.store.read_range(self._ref.digest, name, manifest.files[name], start, stop)

    def _size(self, manifest: AdapterManifest) -> int:
        if WEIGHTS_FILE not in manifest.files:
            return 0  # `_read` says so
        return self._loader.store.file_size(self._ref.digest, WEIGHTS_FILE, manifest.files[WEIGHTS_FILE])

    def _checked(self, manifest: AdapterManifest, weights: AdapterWeights) -> AdapterWeights:
        """Check the base, and add what only the manifest contains."""
        ref, base = self._ref, self._loader.base
        manifest.ref(ref.digest, ref.name, ref.version).check_base(base.name, base.fingerprint)
        return with_manifest(weights, manifest, self._ref.label)


def _is_good(packed_file: Path) -> bool:
    if not packed_file.exists():
        return False
    try:
        open_packed(packed_file, verify=True)
    except IntegrityError as e:
        _log.warning("a packed adapter in the cache is damaged and is made again: %s", e)
        packed_file.unlink(missing_ok=True)
        return False
    return True
