"""CudaOps on a CPU: the CUDA C++ kernels compiled for it, recorded steps on tapes, copies that are late."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from loray.engine import build
from loray.engine.model import decoder
from loray_kernels import (
    AttentionMeta,
    BackendUnavailable,
    CaptureBarrier,
    CapturedDecoding,
    CapturedStep,
    Decoding,
    KvLayout,
    PageCopy,
    PageWriter,
    Parts,
)
from loray_kernels.cuda import graphs, tables
from loray_kernels.cuda.graphs import Capture, DecodeGraphs
from loray_kernels.cuda.kernels import Gather
from loray_kernels.cuda.ops import CudaOps
from loray_kernels.cuda.tables import pack_attention
from loray_kernels.cuda.upload import piece_table
from loray_kernels.reference import ReferenceOps
from tests.fixtures.engines import Late
from tests.kernels.cuda.memory import Arena
from tests.kernels.cuda.shim import ShimLauncher
from tests.kernels.cuda.tape import Tape, TapeLauncher, refuse_waits


class LateUploader(Late):
    """PageUploader's table and kernel, launched when they are waited for."""

    def __init__(self, gather: Gather, pool: Tensor) -> None:
        super().__init__()
        self._gather, self._pool = gather, pool

    def write(self, rows_LE: Tensor, layer_offsets: Sequence[int], pieces: Sequence[PageCopy]) -> None:
        table_P3 = piece_table(rows_LE.shape[1], layer_offsets, pieces)
        if table_P3.shape[0]:
            self.late.append(lambda: self._gather.place_pages(self._pool, rows_LE, table_P3))


class Tapes:
    """A Capturer. Every capture takes one byte."""

    def __init__(self, ops: ShimOps, ranks: CaptureBarrier) -> None:
        self._ops, self._ranks, self._num_bytes = ops, ranks, 0
        self._arena = Arena()

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Capture]:
        """As GraphCapturer does."""
        assert self._ops.may_capture
        self._num_bytes += 1
        with self._ranks.silent():
            run()
        return lambda: self._capture(run)

    def _capture(self, run: Callable[[], Tensor]) -> Capture:
        self._ranks.connect()
        tape = self._ops.launcher.tape = Tape(self._arena)
        out = tape.record(run)
        out.fill_(torch.nan)  # capturing computes nothing

        def replay() -> None:
            self._ops.replayed.append(out.shape[0])
            tape.replay()

        return Capture(replay, out)

    def num_bytes(self) -> int:
        return self._num_bytes

    def release(self) -> None:
        self._num_bytes, self._arena = 0, Arena()


class ShimOps(CudaOps):
    """Gathers in CUDA C++, everything that is Triton's from the reference. `replayed`: sizes of replayed steps."""

    vera_shrink, vera_expand = ReferenceOps.vera_shrink, ReferenceOps.vera_expand

    def __init__(self, launcher: TapeLauncher) -> None:
        super().__init__(Gather(launcher), cast(Any, None))
        self.launcher = launcher
        self.uploaders: list[LateUploader] = []
        self.captures_steps = self.may_capture = True
        self.replayed: list[int] = []

    def page_writer(self, pool: Tensor) -> PageWriter:
        self.uploaders.append(LateUploader(self._gather, pool))
        return self.uploaders[-1]

    def captured_decoding(
        self, forward: Callable[[CapturedStep], Tensor], decoding: Decoding
    ) -> CapturedDecoding | None:
        return DecodeGraphs(forward, decoding, Tapes(self, decoding.ranks)) if self.captures_steps else None

    def paged_attention(
        self, q_THd: Tensor, pool: Tensor, layout: KvLayout, layer: int, meta: AttentionMeta, scale: float
    ) -> Tensor:
        prompts = pack_attention(meta, layout).prefilled.num
        attention = ReferenceOps.paged_attention if prompts else CudaOps.paged_attention
        return attention(self, q_THd, pool, layout, layer, meta, scale)


def use_shim_ops(monkeypatch: pytest.MonkeyPatch) -> ShimOps:
    """Engines that are built from now on use the result. Skips the test without a compiler."""
    try:
        ops = ShimOps(TapeLauncher(ShimLauncher()))
    except BackendUnavailable as e:
        pytest.skip(str(e))
    refuse_waits(monkeypatch)
    monkeypatch.setattr(tables, "GATHER_BELOW", 1 << 30)
    monkeypatch.setattr(build, "backend", lambda name, device: ops)
    monkeypatch.setattr(decoder, "compile_adapters", lambda *arguments: None)  # the gathers are compiled already
    return ops


def use_three_forms(monkeypatch: pytest.MonkeyPatch) -> ShimOps:
    """As `use_shim_ops`. Engines record steps of the base with 1, 2 and 4 rows."""
    monkeypatch.setattr(graphs, "SIZES", (1, 2, 4))
    monkeypatch.setattr(graphs, "KINDS", (Parts.NONE,))
    return use_shim_ops(monkeypatch)
