"""Devices that estimates are for. Peaks are the makers' figures; a plan prints the assumed shares of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from loray.machine import GpuRates, Hardware, Machine, Rates, training_dtype
from loray.spec import DType, Frozen, NumBytes, parse_size

GB = 10**9
MIB = 1 << 20
THIS_MACHINE = "this-machine"

# Elements of fp32 logits that the loss computes at once. On a GPU 512 MiB: each chunk reads the head twice, which is a
# gigabyte at 128,000 tokens and 4,096 channels, and would be all that small ones do. On a CPU 16 MiB: a worker that
# holds a part of a row holds little else per token.
LOSS_CHUNK = 1 << 27
LOSS_CHUNK_ON_CPU = 1 << 22

_Share = Annotated[float, Field(gt=0, le=1)]
_Rate = Annotated[float, Field(gt=0)]


def loss_chunks(num_positions: int, vocabulary: int, device: str) -> Iterator[slice]:
    """Yield the parts of positions whose logits are computed at once on a type of torch's devices."""
    elements = LOSS_CHUNK_ON_CPU if device == "cpu" else LOSS_CHUNK
    rows = max(1, elements // vocabulary)
    return (slice(start, start + rows) for start in range(0, num_positions, rows))


class Device(Frozen):
    """One worker's share of a machine; also a YAML file.

    memory_bytes, flops, bandwidth  bytes, FLOP/s of dense products in the fastest dtype, bytes/s
    product_shares                  shares of `flops` that products reach in each dtype, and attention likewise
    training_dtype                  the dtype of a recipe that leaves it to the device
    matmul_share, attention_share, dense_attention_share
                                    shares of `flops` that linear layers, S2-Attn and dense attention reach
    link_bandwidth                  bytes/s between two workers, one way
    framework_bytes                 memory beside the tensors: CUDA's context, libraries, workspaces, NCCL's channels
    fragmentation                   free bytes between blocks, as a share of the memory that a step allocates and frees
    usable_share                    share of `memory_bytes` that a run may use
    keeps_freed_below               the allocator keeps freed blocks of fewer bytes, and does not reuse them for larger
                                    ones; 0 where it reuses freed memory for any size
    loss_chunk                      elements of logits that the loss computes at once
    foreach_optimizer               AdamW has temporaries of all parameters at once, else of one at a time
    workers_per_node                how many such workers share a node
    host_memory_bytes               the node's own memory, without that of its GPUs; None: unknown, and not checked
    process_bytes                   of a process in it beside tensors: interpreter, libraries, CUDA's host part
    """

    NOUN: ClassVar[str] = "device"

    name: str
    memory_bytes: NumBytes
    flops: _Rate
    bandwidth: _Rate
    link_bandwidth: _Rate
    product_shares: Mapping[DType, _Share] = {"bfloat16": 1.0, "float16": 1.0, "float32": 1 / 16}
    training_dtype: DType = "bfloat16"
    matmul_share: _Share = 0.65
    attention_share: _Share = 0.5
    dense_attention_share: _Share = 0.5
    framework_bytes: Annotated[int, BeforeValidator(parse_size), Field(ge=0)] = 2 * GB
    fragmentation: float = Field(default=0.08, ge=0)
    usable_share: _Share = 0.95
    keeps_freed_below: int = Field(default=0, ge=0)
    loss_chunk: int = Field(default=LOSS_CHUNK, gt=0)
    foreach_optimizer: bool = True
    workers_per_node: int = Field(default=8, gt=0)
    host_memory_bytes: NumBytes | None = None
    process_bytes: NumBytes = 4 * GB

    @property
    def is_host(self) -> bool:
        """True where workers compute in the host's memory, without GPUs."""
        return self.name == THIS_MACHINE

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * self.usable_share)


def _gpu(
    name: str, memory_gb: float, tflops: float, tb_per_s: float, link_gb: float, attention: float, host_tb: float
) -> Device:
    """One of the eight in a node with `host_tb` TB of its own memory, as clouds rent them."""
    return Device(
        name=name,
        memory_bytes=int(memory_gb * GB),
        flops=tflops * 1e12,
        bandwidth=tb_per_s * 1e12,
        link_bandwidth=link_gb * 1e9,
        attention_share=attention,
        dense_attention_share=attention,
        host_memory_bytes=int(host_tb * 1000 * GB),
    )


PRESETS = {
    device.name: device
    for device in (
        _gpu("a100-40gb", 42.4, 312, 1.555, 300, 0.5, 1.1),
        _gpu("a100-80gb", 85.0, 312, 2.039, 300, 0.5, 1.1),
        _gpu("h100-80gb", 85.0, 989, 3.35, 450, 0.35, 2.0),
        _gpu("h200-141gb", 151.0, 989, 4.8, 450, 0.35, 2.0),
    )
}
_UNKNOWN = Rates({"bfloat16": 1.0, "float32": 1.0}, 1.0, 1.0, bandwidth=1.0, gpu=GpuRates(1.0, 1.0))
ASSUMED_GPU = "a100-80gb"  # where a recipe uses GPUs and nothing says which
# Measured (docs/guide/methods.md): the peak of the smallest run, less the tensors of its plan.
_HOST_FRAMEWORK = 100 * MIB
# glibc keeps freed blocks below its largest mmap threshold in the heap, and larger blocks outside of it.
_GLIBC_THRESHOLD = 32 * MIB
# Of what a GPU's products were measured to reach, which is below the maker's figure.
_MEASURED_MATMUL, _MEASURED_ATTENTION = 0.9, 0.5
_PCIE = 25e9  # bytes/s of PCIe 4.0 with 16 lanes; what links GPUs is not measured


def host(machine: Machine, num_workers: int) -> Device:
    """Describe one worker's share of a machine without GPUs, of `num_workers` in all. The peak is the fastest measured
    rate: on a machine that was busy, matrix products may be slower than attention.

    Where its rates were not measured, only its memory counts, and no time does.
    """
    hardware, rates = machine.hardware, machine.rates or _UNKNOWN
    peak = max(rates.fastest, rates.attention_flops, rates.dense_attention_flops)
    return Device(
        name=THIS_MACHINE,
        memory_bytes=hardware.memory_bytes // num_workers,
        flops=peak / num_workers,
        bandwidth=rates.bandwidth / num_workers,
        link_bandwidth=rates.bandwidth / 4 / num_workers,  # over loopback every byte is read and written twice
        product_shares={dtype: flops / rates.fastest for dtype, flops in rates.products.items()},
        training_dtype=training_dtype(hardware, use_gpu=False).dtype,
        matmul_share=0.9 * rates.fastest / peak,
        attention_share=rates.attention_flops / peak,
        dense_attention_share=rates.dense_attention_flops / peak,
        framework_bytes=_HOST_FRAMEWORK,
        usable_share=0.9,
        keeps_freed_below=_GLIBC_THRESHOLD,
        loss_chunk=LOSS_CHUNK_ON_CPU,
        foreach_optimizer=False,
    )


def gpu_here(machine: Machine) -> Device | None:
    """Describe one of this machine's GPUs: its own memory, with measured rates, or a maker's where the model is known.
    None where there is no GPU, or neither is known.
    """
    hardware, rates = machine
    if not hardware.gpus:
        return None
    gpu = min(hardware.gpus, key=lambda gpu: gpu.capability)
    shape: dict[str, Any] = {
        "memory_bytes": gpu.memory_bytes,
        "training_dtype": training_dtype(hardware, use_gpu=True).dtype,
        "workers_per_node": len(hardware.gpus),
        "host_memory_bytes": hardware.memory_bytes,
    }
    # The maker's figures of this model, by its name and the nearest memory.
    models = [d for name, d in PRESETS.items() if gpu.name.lower().startswith(name.partition("-")[0])]
    if models:
        return min(models, key=lambda d: abs(d.memory_bytes - gpu.memory_bytes)).model_copy(update=shape)
    if rates is None or rates.gpu is None:
        return None
    return Device(
        name=gpu.name,
        flops=rates.gpu.flops,
        bandwidth=rates.gpu.bandwidth,
        link_bandwidth=_PCIE,
        matmul_share=_MEASURED_MATMUL,
        attention_share=_MEASURED_ATTENTION,
        dense_attention_share=_MEASURED_ATTENTION,
        **shape,
    )


def device_on(hardware: Hardware, num_workers: int, *, use_gpu: bool) -> Device | None:
    """Describe one worker's share of a node, of `num_workers` on it: its GPU, or of its memory. Rates that are not
    known do not count, and no time does. None where GPUs are used and none was found.
    """
    machine = Machine(hardware, _UNKNOWN)
    if not use_gpu:
        return host(machine, num_workers)
    device = gpu_here(machine)
    node = {"workers_per_node": num_workers, "host_memory_bytes": hardware.memory_bytes}
    return None if device is None else device.model_copy(update=node)
