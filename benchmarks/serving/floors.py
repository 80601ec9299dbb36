"""The least times that the machine allows, from its memory bandwidth and product rate measured in the same run.

A decode step of `rows` tokens must read every weight once and multiply it with `rows` tokens, and read the rows of each
distinct adapter once:

    step(rows) = max(weight bytes / bandwidth, FLOPs(rows) / rate) + LoRA bytes / bandwidth

FLOPs are two per weight and token; the output head works on sampled tokens only. Attention, norms, sampling and LoRA's
FLOPs (3 % at mean rank 30) are left out: this is a floor, not a forecast. A prompt takes FLOPs / rate. VeRA's pair
counts as weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.world import MachineRates
from loray.bases.config import ModelConfig


class ModelSize(NamedTuple):
    """Weights that every token is multiplied with in all layers, and a sampled token in the output head."""

    layer_weights: int
    head_weights: int
    item_bytes: int = 2

    @classmethod
    def of(cls, config: ModelConfig, item_bytes: int = 2) -> ModelSize:
        head = config.vocab_size * config.hidden_size
        return cls(config.num_matrix_elements - head, head, item_bytes)

    def with_shared(self, weights: int) -> ModelSize:
        """With `weights` of VeRA's pair, which every token is multiplied with as well."""
        return self._replace(layer_weights=self.layer_weights + weights)

    @property
    def nbytes(self) -> int:
        return (self.layer_weights + self.head_weights) * self.item_bytes


def decode_step_seconds(model: ModelSize, machine: MachineRates, rows: int, lora_bytes: float = 0.0) -> float:
    """`step(rows)` of the module's docstring. `lora_bytes`: of the step's distinct adapters."""
    flops = 2.0 * rows * (model.layer_weights + model.head_weights)
    return max(model.nbytes / machine.bandwidth, flops / machine.flops) + lora_bytes / machine.bandwidth


def prompt_seconds(model: ModelSize, machine: MachineRates, num_tokens: int, num_prompts: int = 1) -> float:
    """Seconds of all tokens in the layers and of one token of each prompt in the head."""
    return 2.0 * (num_tokens * model.layer_weights + num_prompts * model.head_weights) / machine.flops


def most_tokens_per_second(
    model: ModelSize,
    machine: MachineRates,
    requests: Sequence[tuple[int, int]],
    at_once: int,
    lora_bytes: float = 0.0,
) -> float:
    """Output tokens/s of a closed loop over requests of (prompt, output) tokens: every prompt, then full decode steps.

    The pass over a prompt gives the first output token of its request. `lora_bytes`: of a decode step's adapters.
    """
    rows = min(at_once, len(requests))
    prompts = prompt_seconds(model, machine, sum(i for i, _ in requests), len(requests))
    num_outputs = sum(o for _, o in requests)
    num_steps = (num_outputs - len(requests)) / rows
    return num_outputs / (prompts + num_steps * decode_step_seconds(model, machine, rows, lora_bytes))
