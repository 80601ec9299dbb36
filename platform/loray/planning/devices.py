"""Devices as the estimates see them. Peaks are the makers'; shares of them are assumptions, printed with a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, Field

from loray.spec import Frozen, NumBytes, parse_size

GB = 10**9
MIB = 1 << 20


_Share = Annotated[float, Field(gt=0, le=1)]
_Rate = Annotated[float, Field(gt=0)]


class Device(Frozen):
    """One worker's share of a machine; also a YAML file. Bytes, FLOP/s of dense bf16 products, bytes/s.

    matmul_share, attention_share, dense_attention_share
                                   of `flops` that linear layers, S2-Attn and dense attention reach
    link_bandwidth                 between two workers, one way
    framework_bytes                resident beside the tensors: CUDA's context, libraries, workspaces, NCCL's channels
    fragmentation                  of the memory that comes and goes in a step: what lies free between its blocks
    usable_share                   of `memory_bytes`, for everything
    keeps_freed_below              the allocator neither gives freed blocks of less than this back nor lends them to
                                   larger ones; 0 where freed memory serves any size
    loss_chunk                     elements of logits at once: `loray.train.loss`
    foreach_optimizer              AdamW's temporaries are of all parameters at once, not of one after the other
    """

    name: str
    memory_bytes: NumBytes
    flops: _Rate
    bandwidth: _Rate
    link_bandwidth: _Rate
    matmul_share: _Share = 0.65
    attention_share: _Share = 0.5
    dense_attention_share: _Share = 0.5
    framework_bytes: Annotated[int, BeforeValidator(parse_size), Field(ge=0)] = 2 * GB
    fragmentation: float = Field(default=0.08, ge=0)
    usable_share: _Share = 0.95
    keeps_freed_below: int = Field(default=0, ge=0)
    loss_chunk: int = Field(default=1 << 24, gt=0)
    foreach_optimizer: bool = True

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * self.usable_share)


def _gpu(name: str, memory_gb: float, tflops: float, tb_per_s: float, link_gb: float, attention: float) -> Device:
    return Device(
        name=name,
        memory_bytes=int(memory_gb * GB),
        flops=tflops * 1e12,
        bandwidth=tb_per_s * 1e12,
        link_bandwidth=link_gb * 1e9,
        attention_share=attention,
        dense_attention_share=attention,
    )


PRESETS = {
    device.name: device
    for device in (
        _gpu("a100-40gb", 42.4, 312, 1.555, 300, 0.5),
        _gpu("a100-80gb", 85.0, 312, 2.039, 300, 0.5),
        _gpu("h100-80gb", 85.0, 989, 3.35, 450, 0.35),
        _gpu("h200-141gb", 151.0, 989, 4.8, 450, 0.35),
    )
}
THIS_MACHINE = "this-machine"
# Measured (docs/guide/planning.md): the peak of the smallest run, less the tensors of its plan.
_HOST_FRAMEWORK = 100 * MIB
# Freed memory below glibc's largest mmap threshold stays in the heap, where larger blocks never go.
_GLIBC_THRESHOLD = 32 * MIB


@dataclass(frozen=True, slots=True)
class HostRates:
    """What all cores of a machine without GPUs reach together: FLOP/s of bf16 products and of attention, bytes/s."""

    memory_bytes: int
    flops: float
    attention_flops: float
    dense_attention_flops: float
    bandwidth: float


def host(rates: HostRates, num_workers: int) -> Device:
    """A machine without GPUs that `num_workers` workers share. Its peak is the fastest that was seen: one that was busy
    while it was measured may reach less in products than in attention.
    """
    peak = max(rates.flops, rates.attention_flops, rates.dense_attention_flops)
    return Device(
        name=THIS_MACHINE,
        memory_bytes=rates.memory_bytes // num_workers,
        flops=peak / num_workers,
        bandwidth=rates.bandwidth / num_workers,
        link_bandwidth=rates.bandwidth / 4 / num_workers,  # over loopback every byte is read and written twice
        matmul_share=0.9 * rates.flops / peak,
        attention_share=rates.attention_flops / peak,
        dense_attention_share=rates.dense_attention_flops / peak,
        framework_bytes=_HOST_FRAMEWORK,
        usable_share=0.9,
        keeps_freed_below=_GLIBC_THRESHOLD,
        loss_chunk=1 << 22,
        foreach_optimizer=False,
    )
