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


def _numbers(handle: Any) -> Any:
    """A tile's elements in fp64."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data.astype(np.float64)
    return (handle.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.fixture(scope="session", autouse=True)
def dots() -> None:
    """The interpreter multiplies the bits of bf16 as if they were integers, and where a row's product is added up in
    fp32, NumPy's library may do it in another order for another row of a tile. A card does neither.
    """

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        product = (_numbers(a) @ _numbers(b)).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


@pytest.fixture(scope="session")
def ops() -> Ops:
    return CudaOps(Gather(ShimLauncher()), Tiles())
