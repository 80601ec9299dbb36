"""The backends under test: the reference, and the C++ kernels for every instruction set that this CPU has."""

from __future__ import annotations

import pytest

from loray_kernels import BackendUnavailable, Ops, backend
from loray_kernels.cpu.native import ISA_FLAGS, supported
from loray_kernels.cpu.ops import CpuOps

NATIVE = [f"cpu {isa}" for isa in ISA_FLAGS]
BACKENDS = ["reference", *NATIVE]


def make_ops(name: str) -> Ops:
    kind, _, isa = name.partition(" ")
    if not isa:
        return backend(kind)
    try:
        if isa not in supported():
            pytest.skip(f"this CPU has no {isa}")
        return CpuOps(isa)
    except BackendUnavailable as e:
        pytest.skip(str(e))
