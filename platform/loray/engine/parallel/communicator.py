"""`Communicator`: the collectives of ranks and what rank 0 sends them; and a step as bytes.

There are two groups. `data` carries tensors of a forward pass: NCCL on CUDA, gloo elsewhere. `control`, always gloo,
carries rank 0's commands and adapters' rows, which are in host memory. There a rank may wait days for the next step.
Rank 0 and each other rank prove to each other that they know the engine's secret before anything else is sent.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate, islice, pairwise
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]
    AllreduceOptions,
    GatherOptions,
    PrefixStore,
    ProcessGroup,
    ProcessGroupGloo,
    ReduceOp,
    Store,
)

from loray.engine.model.batch import ChunkInput
from loray.engine.parallel.shard import Shard
from loray.engine.parallel.transport import new_nonce, proof
from loray.engine.pool.pool import ResidentAdapter
from loray_kernels import DecodeStep, Parts

Collective = Literal["all_reduce", "gather"]

_FORWARD_TIMEOUT = timedelta(minutes=5)  # within which every rank must start the same collective
_IDLE_TIMEOUT = timedelta(days=10_000)
_STEP_HEAD = len(DecodeStep._fields)  # the parts, and a number for each of the others


class _Call(NamedTuple):
    collective: Collective
    dtype: torch.dtype
    shape: tuple[int, ...]


class Communicator:
    """A rank's end of both groups. It listens at `own_address` alone."""

    def __init__(self, store: Store, shard: Shard, device: torch.device, own_address: str, secret: bytes) -> None:
        """RuntimeError if a rank does not know the secret."""
        self.shard, self._device = shard, device
        self._silent = False
        self._skipped: dict[_Call, None] = {}  # by the last silent step, of those that are not connected
        self._connected: set[_Call] = set()
        rank, size = shard.rank, shard.world_size
        self._control = _gloo(PrefixStore("control", store), rank, size, _IDLE_TIMEOUT, own_address)
        for other in range(1, size) if rank == 0 else [0]:
            self._authenticate(secret, other)
        if device.type == "cuda":
            self._data = _nccl(PrefixStore("data", store), rank, size, _FORWARD_TIMEOUT)
        else:
            self._data = _gloo(PrefixStore("data", store), rank, size, _FORWARD_TIMEOUT, own_address)

    def _authenticate(self, secret: bytes, other: int) -> None:
        own = new_nonce()
        theirs = self._exchanged(own, other)
        shown = self._exchanged(proof(secret, self.shard.rank, theirs), other)
        if not hmac.compare_digest(shown, proof(secret, other, own)):
            raise RuntimeError(f"rank {other} does not know the engine's secret")

    def _exchanged(self, data: bytes, other: int) -> bytes:
        """Send `data`, and receive as many bytes. Rank 0 sends first: sending waits for the receiver. RuntimeError if
        the other rank is silent, as one may be that does not know the secret.
        """
        mine, theirs = torch.frombuffer(bytearray(data), dtype=torch.uint8), torch.empty(len(data), dtype=torch.uint8)
        if self.shard.rank == 0:
            self._control.send([mine], other, 0).wait(_FORWARD_TIMEOUT)
        self._control.recv([theirs], other, 0).wait(_FORWARD_TIMEOUT)
        if self.shard.rank > 0:
            self._control.send([mine], other, 0).wait(_FORWARD_TIMEOUT)
        return theirs.numpy().tobytes()

    # -- a forward pass: every rank makes the same calls in the same order --------------------------------------------
    #    They may be captured in a CUDA graph: they allocate and wait on the device alone.

    def all_reduce(self, x: Tensor) -> None:
        """Replace `x` by the sum over the ranks, in x's dtype."""
        if not self._skips("all_reduce", x):
            self._data.allreduce([x]).wait()

    def gather(self, x: Tensor) -> Tensor | None:
        """Gather (ranks, *x.shape) on rank 0; None elsewhere."""
        out = x.new_empty(self.shard.world_size, *x.shape) if self.shard.rank == 0 else None
        if not self._skips("gather", x):
            options = GatherOptions()
            options.rootRank = 0
            self._data.gather([] if out is None else [list(out.unbind())], [x.contiguous()], options).wait()
        return out

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Make collectives of a forward pass do nothing inside, where their results mean nothing."""
        self._silent, self._skipped = True, {}
        try:
            yield
        finally:
            self._silent = False

    def connect(self) -> None:
        """Call what the last silent step has skipped, each collective of a dtype and shape once ever. Every rank calls
        this after the same steps.
        """
        for name, dtype, shape in self._skipped:
            getattr(self, name)(torch.zeros(shape, dtype=dtype, device=self._device))
        self._connected |= self._skipped.keys()
        self._skipped = {}

    def _skips(self, collective: Collective, x: Tensor) -> bool:
        if self._silent and (call := _Call(collective, x.dtype, tuple(x.shape))) not in self._connected:
            self._skipped[call] = None
        return self._silent

    def agree(self, holds: bool) -> bool:
        """Ask whether it holds on every rank; each calls this. RuntimeError if a rank has ended."""
        return bool(self.least(int(holds)))

    def least(self, number: int) -> int:
        """Find the least of every rank's number; each calls this. RuntimeError if a rank has ended."""
        least, options = torch.tensor([number]), AllreduceOptions()
        options.reduceOp = ReduceOp(ReduceOp.MIN)
        self._control.allreduce([least], options).wait()
        return int(least)

    # -- rank 0 with the others ---------------------------------------------------------------------------------------

    def send(self, data: bytes, rank: int) -> None:
        self._control.send([torch.tensor([len(data)])], rank, 0).wait()
        self._control.send([torch.frombuffer(bytearray(data), dtype=torch.uint8)], rank, 0).wait()

    def send_rows(self, rows: Tensor, rank: int) -> None:
        """Send `rows`, which are contiguous and in host memory."""
        if rows.numel():
            self._control.send([rows.view(-1).view(torch.uint8)], rank, 0).wait()

    def receive_rows(self, rows: Tensor, rank: int) -> None:
        """Receive what that rank sends into `rows`. RuntimeError if it has ended."""
        if rows.numel():
            self._control.recv([rows.view(-1).view(torch.uint8)], rank, 0).wait()

    def receive(self, rank: int) -> bytes:
        """Receive what that rank `send`s. RuntimeError if it has ended."""
        size = torch.empty(1, dtype=torch.int64)
        self._control.recv([size], rank, 0).wait()
        data = torch.empty(int(size), dtype=torch.uint8)
        self._control.recv([data], rank, 0).wait()
        return data.numpy().tobytes()


# torch's stubs do not know that these are process groups.
def _gloo(store: Store, rank: int, size: int, timeout: timedelta, own_address: str) -> ProcessGroup:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=own_address)]
    options._timeout = timeout
    return cast("ProcessGroup", ProcessGroupGloo(store, rank, size, options))


def _nccl(store: Store, rank: int, size: int, timeout: timedelta) -> ProcessGroup:
    from torch.distributed import ProcessGroupNCCL  # only where torch was built with it

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return cast("ProcessGroup", ProcessGroupNCCL(store, rank, size, options))


# -- a step as bytes ---------------------------------------------------------------------------------------------------


def dump_step(step: DecodeStep) -> bytes:
    fields = [np.asarray(getattr(step, name), dtype=np.int64) for name in DecodeStep._fields if name != "parts"]
    head = np.array([int(step.parts), *map(len, fields)], dtype=np.int64)
    return np.concatenate([head, *fields]).tobytes()


def load_step(data: bytes) -> DecodeStep:
    words = np.frombuffer(data, dtype=np.int64)
    starts = accumulate(words[1:_STEP_HEAD].tolist(), initial=_STEP_HEAD)
    fields: list[Any] = [words[start:stop] for start, stop in pairwise(starts)]
    fields.insert(DecodeStep._fields.index("parts"), Parts(int(words[0])))
    return DecodeStep(*fields)


def dump_chunks(chunks: Sequence[ChunkInput]) -> tuple[bytes, tuple[str, ...]]:
    """Give the step's numbers, and the digests of its adapters, which they name by place; −1 is the base."""
    place: dict[str | None, int] = {None: -1}
    words: list[int] = []
    for adapter, start, token_ids, blocks, num_sampled, scored, _ in chunks:
        number = place.setdefault(None if adapter is None else adapter.ref.digest, len(place) - 1)
        words += (number, start, len(token_ids), num_sampled, scored.start, scored.stop, len(blocks))
        words += token_ids
        words += blocks
    return np.array(words, dtype=np.int64).tobytes(), tuple(digest for digest in place if digest is not None)


def load_chunks(data: bytes, adapters: Sequence[ResidentAdapter]) -> list[ChunkInput]:
    """`adapters`: of the digests of the step."""
    words = iter(np.frombuffer(data, dtype=np.int64).tolist())
    chunks = []
    for number in words:
        start, num_tokens, num_sampled, first, end, num_blocks = islice(words, 6)
        token_ids, blocks = list(islice(words, num_tokens)), list(islice(words, num_blocks))
        adapter = None if number < 0 else adapters[number]
        chunks.append(ChunkInput(adapter, start, token_ids, blocks, num_sampled, range(first, end)))
    return chunks
