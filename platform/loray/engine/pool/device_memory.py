"""The division of a GPU's memory.

All sizes are bytes of one device; `config` is that of the device's part of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from loray.bases.config import ModelConfig
from loray.engine.memory.limits import block_bytes
from loray.errors import SpecError
from loray.spec import ServeSpec, format_size
from loray.telemetry import get_logger
from loray_kernels import device_memory, scratch_bytes, workspace_bytes

SCORED_BYTES = 16 << 20  # of a prompt's logits, fp32, that are computed at a time
_LARGEST_SHARE = 0.95  # of what is free, that is ever planned for: the device may be another process's too
_RANKS = 1024  # of all adapters' modules of one input, side by side: a token's intermediate, fp32
_SCORED_ROWS = 32  # of logits, whose log-probabilities are computed at a time
_DESCRIPTOR_BYTES = 8 << 20  # of adapters' descriptors

_log = get_logger(__name__)


class DeviceMemory(NamedTuple):
    """`free` of `total`, with regard to all processes; `taken`: by this one's tensors."""

    total: int
    free: int
    taken: int


class DeviceMemoryPlan(NamedTuple):
    """`usable`: by this process. `needs`: by what they are for. `pool`: what they leave of it, perhaps below 0."""

    usable: int
    needs: Mapping[str, int]
    pool: int

    def text(self) -> str:
        """Say it in one line."""
        needs = ", ".join(f"{what} {format_size(num)}" for what, num in self.needs.items() if num)
        return f"{format_size(self.usable)} may be used: {needs}, pool {format_size(max(self.pool, 0))}"


def activation_bytes(spec: ServeSpec, config: ModelConfig) -> int:
    """Activations of the largest step: max_num_batched_tokens × (dtype × widths of what is there at once + 4 × ranks).

    With D hidden columns, Q and K columns of queries and keys, F of the MLP. Attention: the layer's input, norm, result
    and sum (4 D), q, k and v (Q + 2 K), normed and turned queries and keys (2 Q + 2 K), its result and FlashInfer's
    copies (3 Q). MLP: 4 D, gate and up (2 F) and their product (F), of each expert that a token passes, with its input
    and result (2 D). The larger of the two; layers follow each other.
    """
    d, f = config.hidden_size, config.intermediate_size
    q, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mlp = 3 * f if config.experts is None else config.num_active_mlps * (3 * f + 2 * d)
    widest = 4 * d + max(6 * q + 4 * k, mlp)
    return spec.max_num_batched_tokens * (spec.element_bytes * widest + 4 * _RANKS)


def logits_bytes(spec: ServeSpec, config: ModelConfig) -> int:
    """Logits: max_num_seqs × vocabulary × (dtype + 4 × 3): the head's result, in fp32, and two tensors of the sampler.

    A rank among several gathers the parts of the others: once more in fp32.
    """
    copies = 3 + (spec.tensor_parallel_size > 1)
    return spec.max_num_seqs * config.vocab_size * (spec.element_bytes + 4 * copies)


def prompt_logprobs_bytes(spec: ServeSpec, config: ModelConfig) -> int:
    """Prompts' logits that are scored at a time: SCORED_BYTES, or one row, and the same in dtype; of 32 rows the
    log-probabilities, fp32, a copy for the best ones, and a comparison, one byte each.
    """
    row = 4 * config.vocab_size
    logits = max(SCORED_BYTES, row)
    return logits + logits * spec.element_bytes // 4 + _SCORED_ROWS * config.vocab_size * (4 + 4 + 1)


def capture_bytes(spec: ServeSpec, config: ModelConfig) -> int:
    """Captured steps: graph_bytes if there are any; adapters' descriptors, 8 MiB, and block tables of max_num_seqs
    requests, 8 bytes a block.
    """
    longest = min(spec.max_model_len or config.max_position_embeddings, config.max_position_embeddings)
    tables = 8 * spec.max_num_seqs * -(-longest // spec.block_tokens)
    return (spec.graph_bytes if spec.graph_seconds else 0) + _DESCRIPTOR_BYTES + tables


def usable_bytes(memory: DeviceMemory, utilization: float) -> int:
    """Memory for this process: total × utilization, and never more than what it has and 0.95 × what is free."""
    return min(int(memory.total * utilization), memory.taken + int(memory.free * _LARGEST_SHARE))


def plan_memory(
    spec: ServeSpec,
    config: ModelConfig,
    memory: DeviceMemory,
    *,
    held: Mapping[str, int] = MappingProxyType({}),
    scratch: Mapping[str, int] = MappingProxyType({}),
) -> DeviceMemoryPlan:
    """Divide the memory when the base has been loaded. `held`: what of `memory.taken` is not the base, by what it is
    for. `scratch`: what the kernels will take, likewise.
    """
    needs = {
        "base": memory.taken - sum(held.values()),
        **held,
        "activations": activation_bytes(spec, config),
        "logits": logits_bytes(spec, config),
        "prompt logprobs": prompt_logprobs_bytes(spec, config),
        **scratch,
        "recordings": capture_bytes(spec, config),
    }
    usable = usable_bytes(memory, spec.gpu_memory_utilization)
    return DeviceMemoryPlan(usable, needs, usable - sum(needs.values()))


def check_plan(plan: DeviceMemoryPlan, spec: ServeSpec, memory: DeviceMemory, least: int) -> None:
    """SpecError if the pool would have less than `least` bytes."""
    if plan.pool >= least:
        return
    raise SpecError(
        f"the pool would have {max(plan.pool, 0) / 2**20:.0f} MiB of the GPU's {format_size(memory.total)} "
        f"({format_size(memory.free)} of them free, gpu_memory_utilization {spec.gpu_memory_utilization:g}; "
        f"{plan.text()}); lower max_num_batched_tokens, max_num_seqs or graph_bytes, raise gpu_memory_utilization, "
        "end what else is on the GPU, or serve a smaller base or one over several ranks"
    )


def sized(
    spec: ServeSpec, config: ModelConfig, device: torch.device, least: Callable[[int], int] = lambda num: num
) -> ServeSpec:
    """Give `spec` the bytes of its pool. Called when the base is on `device`, of which `config` is this rank's part.

    Of several ranks all have as much as the one that has the least: `least` gives that of a number. On a GPU the log
    says what its memory is for. SpecError if the device has no room for two blocks.
    """
    if device.type != "cuda":
        return spec.model_copy(update={"pool_bytes": spec.fixed_pool_bytes})
    memory, ranks = DeviceMemory(*device_memory(device)), spec.tensor_parallel_size
    plan = plan_memory(spec, config, memory, held=workspace_bytes(), scratch=scratch_bytes())
    if spec.pool_bytes is not None:
        given = plan._replace(pool=spec.pool_bytes // ranks)
        _log.info("GPU memory: %s, which is given", given.text())
        if given.pool > plan.pool:
            left = format_size(max(plan.pool, 0))
            _log.warning("%s would be left for the pool; large steps may find no memory and fail a request", left)
        return spec
    check_plan(plan, spec, memory, least=2 * block_bytes(spec, config))
    pool = least(plan.pool)
    _log.info("GPU memory: %s", plan._replace(pool=pool).text())
    return spec.model_copy(update={"pool_bytes": pool * ranks})
