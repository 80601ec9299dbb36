"""The tests of every backend, run for `cuda` without a GPU: CUDA C++ under the shim, Triton in its interpreter.

Collected by name only, in a process that sets TRITON_INTERPRET=1 before Triton is imported; see test_cuda.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from loray_kernels import Ops
from loray_kernels.cuda import triton_launch
from loray_kernels.cuda.ops import CudaOps
from loray_kernels.cuda.triton_launch import Tiles, split_input
from tests.fixtures.shim import ShimLauncher
from tests.kernels.cases import *  # noqa: F403
from tests.kernels.cuda.cases import *  # noqa: F403


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
    return CudaOps(ShimLauncher(), Tiles())


def test_splits_depend_on_the_input_alone() -> None:
    assert {width: split_input(width) for width in (64, 512, 576, 4096, 5120, 14336)} == {
        64: (1, 128),
        512: (1, 512),
        576: (2, 384),
        4096: (8, 512),
        5120: (8, 640),
        14336: (8, 1792),
    }


def test_partial_sums_beyond_their_memory_follow_each_other(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    """With equal bits, and what counts arrivals is left as it was found."""
    x_TI, pool, tables, segments = wide(torch.bfloat16, [70, 3, 33], 0)  # noqa: F405
    expected = ops.lora_shrink(x_TI, pool, tables, segments, 0)
    monkeypatch.setattr(triton_launch, "PARTIAL_BYTES", 1)
    for got, want in zip(ops.lora_shrink(x_TI, pool, tables, segments, 0), expected, strict=True):
        assert torch.equal(got, want)
    assert isinstance(ops, CudaOps)
    assert not bool(ops._tiles._counters(pool.device).any())
