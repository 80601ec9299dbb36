"""What is measured: a model's shape with the loads on it, and the least times that a card allows for them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.machine import MachineRates
from benchmarks.serving.figures.floors import ModelSize
from benchmarks.serving.models import RANDOM
from loray.bases.config import ModelConfig
from loray.spec import ATTENTION_MODULES

_ITEM_BYTES = 2  # of bf16


@dataclass(frozen=True)
class Shape:
    """Adapter i has rank `ranks[i % len(ranks)]` on q, k, v and o.

    context, steps   of decode steps: tokens of each prompt, steps that are timed
    long_context     of decode steps of `long_rows`; the pool holds their keys and values
    many             adapters of closed loops: first as many as stay in the pool
    stream_tokens    outputs of streams beside which an adapter is loaded
    crowd            adapters that the pool holds, of the last of `ranks`; twice as many take turns
    loop_s           seconds of a closed loop, whose requests have `loop_prompt` and `loop_outputs` tokens
    """

    base: str = "llama3-8b-random"
    device: str = "cuda"
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    rows: tuple[int, ...] = (1, 32, 64, 256)
    adapters: tuple[int, ...] = (0, 1, 32, 64, 128, 256)
    prompts: tuple[int, ...] = (2048, 32768)
    many: tuple[int, ...] = (100, 512, 2000)
    crowd: int = 8
    context: int = 512
    steps: int = 40
    long_context: int = 32768
    long_rows: tuple[int, ...] = (1, 8)
    stream_tokens: int = 4096
    loop_s: float = 60.0
    loop_prompt: int = 64
    loop_outputs: int = 32
    pool_bytes: int = 40 << 30
    host_bytes: int = 32 << 30
    step_tokens: int = 8192
    graph_record_s: float = 120.0

    @property
    def config(self) -> ModelConfig:
        return replace(RANDOM[self.base], max_position_embeddings=1 << 17)

    @property
    def token_bytes(self) -> int:
        """Of one token's keys and values."""
        c = self.config
        return 2 * _ITEM_BYTES * c.num_layers * c.num_kv_heads * c.head_dim

    def adapter_bytes(self, rank: int) -> int:
        shapes = [self.config.module_shape(module) for module in ATTENTION_MODULES]
        return _ITEM_BYTES * rank * self.config.num_layers * sum(out + width for out, width in shapes)

    def decode_floor_s(self, rates: MachineRates, rows: int, context: float, adapters: int) -> float:
        """Weights, keys and values of all rows, and the rows of distinct adapters are read once; or the products."""
        size = ModelSize.of(self.config)
        own = sum(self.adapter_bytes(self.ranks[i % len(self.ranks)]) for i in range(min(adapters, rows)))
        read = size.nbytes + rows * context * self.token_bytes + own
        flops = 2.0 * rows * (size.layer_weights + size.head_weights)
        return max(read / rates.bandwidth, flops / rates.flops)

    def prompt_floor_s(self, rates: MachineRates, num_tokens: int) -> float:
        """Products of all tokens in the layers and of one in the head, and causal attention's."""
        size, c = ModelSize.of(self.config), self.config
        pairs = num_tokens * (num_tokens + 1) / 2
        attention = 4.0 * pairs * c.num_layers * c.num_heads * c.head_dim
        return (2.0 * (num_tokens * size.layer_weights + size.head_weights) + attention) / rates.flops
