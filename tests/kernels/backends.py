"""The backends under test: the reference, and the C++ kernels for every instruction set that this CPU has, and
for ARM where it can be emulated.
"""

from __future__ import annotations

import pytest

from loray_kernels import BackendUnavailable, Ops, backend
from loray_kernels.cpu.build import ISA_FLAGS, supported
from loray_kernels.cpu.ops import CpuOps
from tests.kernels import emulated

EMULATED = pytest.param(f"cpu {emulated.ISA}", marks=pytest.mark.slow)
NATIVE = [*(f"cpu {isa}" for isa in ISA_FLAGS), EMULATED]
BACKENDS = ["reference", *NATIVE]


def make_ops(name: str) -> Ops:
    kind, _, isa = name.partition(" ")
    if not isa:
        return backend(kind)
    try:
        if isa == emulated.ISA:
            emulated.provide()
        elif isa not in supported():
            pytest.skip(f"this CPU has no {isa}")
        return CpuOps(isa)
    except BackendUnavailable as e:
        pytest.skip(str(e))
