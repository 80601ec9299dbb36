"""Adapters on their way to the engine: from the node's cache, or from the store; verified, then packed.

A replica need not load what it has kept in host memory. Otherwise the node's cache has the adapter, packed. If it has
not, the store does: the weights are read in ranges, several at once, and hashed as they come. The adapter is given to
the engine when it has been verified; after that it is written into the cache, which only helps later loads.

An ephemeral adapter is in no store. Its trainer has written it into the cache of its own node, and a replica elsewhere
asks the actors that its reference names. It is loaded once or twice in its short life, so no packed form is kept.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loray.adapters.files import MAX_CONFIG_BYTES, check_declared, check_header_length, check_tensors
from loray.adapters.manifest import read_manifest, verify_files, with_manifest
from loray.adapters.peft_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    parse_adapter,
    parse_config,
    without_prefix,
)
from loray.bases.checkpoint import DTYPES, TensorEntry, parse_header
from loray.bases.registry import BaseModel
from loray.engine.pool.packed import PackedAdapter, Packer, open_packed, packed_name, save_packed
from loray.errors import AdapterGone, IntegrityError, LorayError, UnsupportedError
from loray.priority import compute_in_background
from loray.settings import Settings
from loray.spec import ACTOR_NAMESPACE, AdapterManifest, AdapterRef
from loray.store import NODE_CACHE_BYTES, AdapterCache, AdapterStore, open_store, write_entry
from loray.telemetry import get_logger
from loray_kernels.memory import Recycled
from serve_apps.replica.metrics import LoadCounts

_log = get_logger(__name__)

_MAX_WAITING = 8  # adapters that wait to be written; one more is not kept, as the engine must not wait for it
_FIRST_BYTES = 256 << 10  # contains the header, and all of a small adapter
_RANGE_BYTES = 4 << 20
_NUM_RANGES = 4  # read at once, of all adapters together
_GIVE_S = 30.0  # in which an actor gives an adapter's files

Files = Mapping[str, bytes | memoryview]


class CacheWriter:
    """Writes one adapter at a time, in a thread in the background. A failure is logged and affects no request."""

    def __init__(self) -> None:
        self._free_slots = threading.BoundedSemaphore(_MAX_WAITING)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-cache", initializer=compute_in_background)
        self._last: Future[None] | None = None

    def submit(self, label: str, write: Callable[[], None], held: ExitStack, memory: Recycled) -> None:
        """Schedule `write`. After it, `held` is closed and `memory` is prepared for the next load.

        If too many adapters wait already, the cache does not keep this one.
        """
        if not self._free_slots.acquire(blocking=False):
            held.close()
            return
        held.callback(self._free_slots.release)
        self._last = self._thread.submit(self._run, label, write, held, memory)

    def flush(self) -> None:
        """Wait until everything has been written."""
        if self._last is not None:
            self._last.result()

    def _run(self, label: str, write: Callable[[], None], held: ExitStack, memory: Recycled) -> None:
        try:
            with held:
                write()
        except Exception as e:  # noqa: BLE001 - the adapter is served nevertheless
            _log.warning("adapter %s is here, but the node's cache has not kept it: %s", label, e)
        memory.prepare()


class AdapterLoader:
    """The engine's `load`, which its loader threads call."""

    def __init__(self, base: BaseModel, settings: Settings, counts: LoadCounts | None = None) -> None:
        self.base, self.counts, self.home = base, counts or LoadCounts(), settings.home
        self.store = AdapterStore(open_store(settings.store))
        self.cache = AdapterCache(self.store, settings.home / "cache", NODE_CACHE_BYTES)
        self.cache_writer = CacheWriter()
        self._ranges = ThreadPoolExecutor(_NUM_RANGES, thread_name_prefix="adapter-range")

    def __call__(self, ref: AdapterRef, packer: Packer) -> PackedAdapter:
        """Load and pack the adapter.

        Raises NotFoundError or IntegrityError from the store, AdapterGone for an ephemeral adapter, BaseMismatch, and
        UnsupportedError if the engine does not support the adapter.
        """
        name = packed_name(packer, self.base.fingerprint)
        with ExitStack() as held:
            entry = held.enter_context(self.cache.entry(ref.digest, is_good=lambda folder: _is_good(folder / name)))
            file, is_cached = entry.folder / name, entry.present
            self.counts.began("cache" if is_cached else "actor" if ref.is_ephemeral else "store")
            if is_cached and file.exists():
                return open_packed(file, pinned=packer.pinned)
            if ref.is_ephemeral:
                if not is_cached:
                    write_entry(entry.folder, files_given(ref))
                return self._packed(ref, entry.folder, _cached(ref, entry.folder, packer.memory), packer)
            files: Files = {}
            if is_cached:
                read = _cached(ref, entry.folder, packer.memory)
            else:
                read, files = self._stored(ref, packer.memory)
            packed = self._packed(ref, entry.folder, read, packer)
            if is_cached and packed.pair is not None:
                return packed

            def write() -> None:
                if not is_cached:
                    self.store.fetch(ref.digest, entry.folder, have=files)
                if packed.pair is None:
                    save_packed(packed, file)
                if is_cached:
                    self.cache.trim(ref.digest)

            self.cache_writer.submit(ref.label, write, held.pop_all(), packer.memory)
        return packed

    def _stored(self, ref: AdapterRef, memory: Recycled) -> tuple[_Read, Files]:
        """Read the adapter from the store and verify it. Returns its files too."""
        manifest = self.store.manifest(ref.digest)
        stored = _Stored(self.store, ref.digest, manifest, self._ranges)
        config = self._ranges.submit(stored.read, CONFIG_FILE, 0, MAX_CONFIG_BYTES)
        whole, entries, sha256 = stored.weights(memory)
        config_bytes = config.result()
        for name, found in ((CONFIG_FILE, hashlib.sha256(config_bytes).hexdigest()), (WEIGHTS_FILE, sha256)):
            if found != manifest.files[name]:
                raise IntegrityError(
                    f"adapter {ref.digest[:12]} is damaged: {name} in the store differs from its SHA-256; "
                    "publish the adapter again"
                )
        files: Files = {CONFIG_FILE: config_bytes, WEIGHTS_FILE: whole.numpy().data}
        return _Read(manifest, config_bytes, whole, entries), files

    def _packed(self, ref: AdapterRef, folder: Path, read: _Read, packer: Packer) -> PackedAdapter:
        """Pack what was read; errors name `folder`. A file that differs from an earlier one in values alone is not
        parsed.
        """
        manifest, whole = read.manifest, read.whole
        trained = manifest.ref(ref.digest, ref.name, ref.version)
        trained.check_base(self.base.name, self.base.fingerprint, self.base.of)
        header = read.header(source=ref.label)
        declared = (manifest.nbytes, manifest.invocation_tokens, repr(manifest.rope_parameters))
        kind = (header, read.config, len(whole), declared)
        if (packed := packer.pack_alike(kind, whole)) is not None:
            return packed
        entries = read.entries or _entries(header, manifest, len(whole), source=ref.label)
        tensors = without_prefix(_views(whole, entries, source=ref.label))
        weights = parse_adapter(folder, parse_config(folder, read.config), tensors, self.base.config)
        return packer.pack(with_manifest(weights, manifest, ref.label), file=whole, kind=kind)


class _Read(NamedTuple):
    """The files of one adapter. `whole`: the bytes of its weights, in which tensors are aligned; `entries`: its header,
    where that has been checked.
    """

    manifest: AdapterManifest
    config: bytes
    whole: Tensor
    entries: Mapping[str, TensorEntry] | None = None

    def header(self, *, source: str) -> bytes:
        end = check_header_length(self.whole[:8].numpy().tobytes(), source=source)
        return self.whole[:end].numpy().tobytes()


def _cached(ref: AdapterRef, folder: Path, memory: Recycled) -> _Read:
    manifest, path = read_manifest(folder), folder / WEIGHTS_FILE
    try:
        config = (folder / CONFIG_FILE).read_bytes()
        with path.open("rb") as f:
            beginning = f.read(8)
            end = check_header_length(beginning, source=str(path))
            whole = _aligned(memory, end, os.fstat(f.fileno()).st_size)
            f.seek(0)
            f.readinto(whole.numpy().data)
    except OSError as e:
        raise IntegrityError(f"the adapter {ref.label} cannot be read from {folder}: {e.strerror}") from e
    return _Read(manifest, config, whole)


def files_given(ref: AdapterRef) -> Mapping[str, bytes]:
    """Ask the actors that hold an ephemeral adapter for its files, one after the other. Raises AdapterGone."""
    for name in ref.holders:
        import ray  # `loray serve` has none, and no such adapters
        from ray.exceptions import RayError

        try:
            actor = ray.get_actor(name, namespace=ACTOR_NAMESPACE)
            files: Mapping[str, bytes] = ray.get(actor.give.remote(ref.digest), timeout=_GIVE_S)
            verify_files(files, ref.digest)
            return files
        except (RayError, LorayError, ValueError) as e:  # ValueError: there is no such actor
            _log.warning("actor %s does not give adapter %s (%s): %s", name, ref.label, ref.digest[:12], e)
    raise AdapterGone(
        f"the ephemeral adapter {ref.label} ({ref.digest[:12]}) is neither in this node's cache, nor does "
        f"{' or '.join(ref.holders) or 'any actor'} give it; publish it again, or sample a later version"
    )


@dataclass(frozen=True, slots=True)
class _Stored:
    """One adapter in the store, whose files are read with the threads of `ranges`."""

    store: AdapterStore
    digest: str
    manifest: AdapterManifest
    ranges: ThreadPoolExecutor

    def weights(self, memory: Recycled) -> tuple[Tensor, Mapping[str, TensorEntry], str]:
        """Read the file of weights; returns its bytes, in which tensors are aligned, its header, and their SHA-256."""
        source = f"adapter {self.digest[:12]}: {WEIGHTS_FILE} in the store"
        size = self.ranges.submit(self._size)
        beginning = self.read(WEIGHTS_FILE, 0, _FIRST_BYTES)
        end = check_header_length(beginning, source=source)
        if end > len(beginning):
            beginning += self.read(WEIGHTS_FILE, len(beginning), end)
        num_bytes = size.result()
        entries = _entries(beginning, self.manifest, num_bytes, source=source)  # before memory is taken by what it says
        whole = _aligned(memory, end, num_bytes)
        data = whole.numpy().data
        data[: len(beginning)] = beginning
        starts = range(len(beginning), num_bytes, _RANGE_BYTES)
        reads = [self.ranges.submit(self._fill, data, start) for start in starts]
        sha256 = hashlib.sha256(beginning)
        try:
            for start, read in zip(starts, reads, strict=True):
                read.result()
                sha256.update(data[start : start + _RANGE_BYTES])
        finally:
            for read in reads:
                read.cancel()
            wait(reads)  # so that none writes to memory that has been freed
        return whole, entries, sha256.hexdigest()

    def read(self, name: str, start: int, stop: int) -> bytes:
        if name not in self.manifest.files:
            raise UnsupportedError(f"adapter {self.digest[:12]} has no {name}: it is not a PEFT adapter")
        return self.store.read_range(self.digest, name, self.manifest.files[name], start, stop)

    def _fill(self, data: memoryview, start: int) -> None:
        sha256 = self.manifest.files[WEIGHTS_FILE]
        self.store.read_into(self.digest, WEIGHTS_FILE, sha256, start, data[start : start + _RANGE_BYTES])

    def _size(self) -> int:
        if WEIGHTS_FILE not in self.manifest.files:
            return 0  # `read` says so
        return self.store.file_size(self.digest, WEIGHTS_FILE, self.manifest.files[WEIGHTS_FILE])


def _aligned(memory: Recycled, header_end: int, num_bytes: int) -> Tensor:
    """Take memory for a file of weights, in which the tensors are aligned: they begin behind the header."""
    skip = -header_end % 8
    return memory.empty(skip + num_bytes, torch.uint8)[skip:]


def _entries(beginning: bytes, manifest: AdapterManifest, num_bytes: int, *, source: str) -> Mapping[str, TensorEntry]:
    """Read the header of a file of `num_bytes`, and check it against the file and the manifest."""
    entries = parse_header(beginning, source=source)
    check_tensors(entries, source=source, file_bytes=num_bytes)
    check_declared(entries, manifest, source=source)
    return entries


def _views(whole: Tensor, entries: Mapping[str, TensorEntry], *, source: str) -> dict[str, Tensor]:
    """View the tensors in a file's bytes. Raises IntegrityError where one begins within an element."""
    try:
        return {
            name: whole[e.start : e.stop].view(getattr(torch, DTYPES[e.dtype])).view(e.shape)
            for name, e in entries.items()
        }
    except RuntimeError as e:
        raise IntegrityError(f"{source} is damaged: its header is not that of a safetensors file ({e})") from e


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
