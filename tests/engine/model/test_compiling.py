"""Which kernels the ops of prompts with adapters have taken before the first request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from loray.bases.registry import BaseModel
from loray.engine.model.decoder import compile_adapters
from loray.engine.pool.pool import input_shapes
from loray_kernels.cuda.kernels import Gather
from loray_kernels.cuda.ops import CudaOps
from loray_kernels.reference import ReferenceOps

CAPACITY = 512


class Tiles:
    """Notes which launches there were instead of making them."""

    def __init__(self) -> None:
        self.launches: set[tuple[Any, ...]] = set()

    def shrink(self, x_TI: Any, pool: Any, items: Any, table: Any, h_TR: Any) -> None:
        self.launches.add(("shrink", x_TI.shape[1], table.max_rows))

    def expand(self, outputs: Any, h_TR: Any, pool: Any, items: Any, table: Any) -> None:
        self.launches.add(("expand", sum(y.shape[1] for y in outputs)))

    def dense_shrink(self, x_TI: Any, a_RI: Any, h_TR: Any) -> None:
        self.launches.add(("dense shrink", x_TI.shape[1]))

    def vera_expand(self, y_TO: Any, z_TR: Any, *others: Any) -> None:
        self.launches.add(("vera expand", y_TO.shape[1], z_TR.stride(0) % 16 == 0))


def no_gather(*arguments: Any) -> None:
    raise AssertionError("a gather is launched, which needs no compilation")


def test_each_kernel_of_each_input_is_taken_once(tiny_base: Callable[..., BaseModel]) -> None:
    config = tiny_base("Qwen3ForCausalLM").config
    pool, tiles = torch.full((4096,), 0.5), Tiles()
    compile_adapters(CudaOps(Gather(no_gather), cast(Any, tiles)), pool, input_shapes(config, CAPACITY))
    hidden, heads, middle = config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    inputs = [(hidden, 3, qkv, heads), (heads, 1, hidden, hidden), (hidden, 2, 2 * middle, middle)]
    inputs.append((middle, 1, hidden, hidden))
    expected: set[tuple[Any, ...]] = set()
    for width, num_modules, out, first in inputs:
        expected |= {("shrink", width, rows // num_modules * num_modules) for rows in (16, 32, 64)}
        expected |= {("expand", out), ("dense shrink", width)}
        expected |= {("vera expand", first, aligned) for aligned in (True, False)}
    assert tiles.launches == expected


def test_the_pool_stays_as_it_is(tiny_base: Callable[..., BaseModel]) -> None:
    pool = torch.arange(4096.0)
    config = tiny_base("Qwen3ForCausalLM").config
    compile_adapters(ReferenceOps(), pool, input_shapes(config, CAPACITY))
    assert torch.equal(pool, torch.arange(4096.0))
