"""The tests of every backend, run for `cuda` without a GPU: CUDA C++ under the shim, Triton in its interpreter.

Collected by name only, in a process that sets TRITON_INTERPRET=1 before Triton is imported; see test_cuda.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

from loray_kernels import Ops
from loray_kernels.cuda.gather import Gather
from loray_kernels.cuda.ops import CudaOps
from loray_kernels.cuda.tiles.launch import Tiles
from tests.kernels.cuda.cases import *  # noqa: F403
from tests.kernels.cuda.shim import ShimLauncher
from tests.kernels.test_ops import *  # noqa: F403


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@pytest.fixture(scope="session", autouse=True)
def dot_of_bf16() -> None:
    """The interpreter multiplies the bits of bf16 as if they were integers."""
    narrow = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return narrow(self, _widened(a), _widened(b), *args)

    interpreter.InterpreterBuilder.create_dot = create_dot


@pytest.fixture(scope="session")
def ops() -> Ops:
    return CudaOps(Gather(ShimLauncher()), Tiles())
