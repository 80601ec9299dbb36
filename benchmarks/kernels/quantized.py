"""Times of quantised linears on the CPU beside those in bf16, on a base's shapes, and their floors.

    python -m benchmarks.kernels.quantized [--tokens 1 32 512] [--isa avx2] [--repeats 9] [--json FILE]

A figure is the median time of one step's linears: all of SmolLM2-135M's layers and the output head, which multiplies
at most 32 tokens; activations are quantised in it. The floor is the larger of bytes ÷ read bandwidth and operations ÷
rate, both measured in the same run. The rate in bf16 is that of torch's fastest matrix product, and that of integers
twice as much: an instruction has twice the multiply-adds.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks.kernels.cpu import HIDDEN, LAYERS, MIDDLE, VOCABULARY, median_seconds
from benchmarks.report import write_json
from benchmarks.world import rates_here
from loray_kernels import LinearWeights, Ops, QuantizedWeight, Weight
from loray_kernels.cpu.ops import CpuOps
from loray_kernels.memory import keep_freed
from loray_kernels.reference import quantize_rows

SIZES = ((HIDDEN, HIDDEN + 2 * 192), (HIDDEN, HIDDEN), (HIDDEN, 2 * MIDDLE), (MIDDLE, HIDDEN))  # (in, out)
GROUP = 64


def as_int8(weight_OI: Tensor) -> Weight:
    return QuantizedWeight(*quantize_rows(weight_OI))


def as_int4(weight_OI: Tensor) -> Weight:
    """Any weights in groups of 64: how they are rounded takes no time here."""
    q_OI = torch.randint(0, 256, (weight_OI.shape[0], weight_OI.shape[1] // 2)).to(torch.uint8)
    return QuantizedWeight(q_OI, torch.full((weight_OI.shape[0], weight_OI.shape[1] // GROUP), 0.01))


FORMS: dict[str, Callable[[Tensor], Weight]] = {
    "bf16": lambda weight_OI: weight_OI,
    "int8": as_int8,
    "int4": as_int4,
}


class Model:
    """The linears of all layers, and the head, which is int8 with int4 layers, too."""

    def __init__(self, ops: Ops, form: str) -> None:
        self._ops, make = ops, FORMS[form]
        self._matrices = [self._pack(make, size) for size in SIZES * LAYERS]
        self._head = self._pack(as_int8 if form == "int4" else make, (HIDDEN, VOCABULARY))

    def _pack(self, make: Callable[[Tensor], Weight], size: tuple[int, int]) -> LinearWeights:
        return self._ops.pack_linear([make(torch.randn(size[1], size[0]).mul_(0.02).to(torch.bfloat16))])

    def step(self, num_tokens: int) -> Callable[[], None]:
        x = {i: torch.randn(num_tokens, i).to(torch.bfloat16) for i in (HIDDEN, MIDDLE)}

        def run() -> None:
            for matrix in self._matrices:
                self._ops.linear(x[matrix.in_features], matrix)
            self._ops.logits(x[HIDDEN][:32], self._head)

        return run

    @property
    def nbytes(self) -> float:
        return sum(m.data.nbytes for m in (*self._matrices, self._head))

    def macs(self, num_tokens: int) -> float:
        layers = sum(m.in_features * m.out_features for m in self._matrices)
        return layers * num_tokens + HIDDEN * VOCABULARY * min(num_tokens, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 512])
    parser.add_argument("--isa", help="generic, avx2, avxvnni, avx512 or amx; by default the fastest here")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    keep_freed()  # as the engine does
    ops, load, threads = CpuOps(args.isa), os.getloadavg(), torch.get_num_threads()
    bandwidth, flops = rates_here("cpu")
    click.echo(
        f"load {load[0]:.2f}  threads {threads}  {ops.isa}  {bandwidth / 1e9:.1f} GB/s  {flops / 1e9:.0f} GFLOP/s"
    )
    models = {form: Model(ops, form) for form in FORMS}
    click.echo("".join(f"{form}: {model.nbytes / 1e6:.0f} MB  " for form, model in models.items()))
    click.echo(f"{'ms a step of linears':<22}" + "".join(f"{form:>9}{'floor':>8}{'gain':>7}" for form in FORMS))
    results = []
    for num_tokens in args.tokens:
        line, plain = f"{num_tokens} tokens".ljust(22), 0.0
        for form, model in models.items():
            ours = median_seconds(model.step(num_tokens), args.repeats)
            rate = flops if form == "bf16" else 2 * flops
            floor = max(model.nbytes / bandwidth, 2 * model.macs(num_tokens) / rate)
            plain = plain or ours
            line += f"{1e3 * ours:>9.2f}{1e3 * floor:>8.2f}{plain / ours:>7.2f}"
            results.append({"tokens": num_tokens, "form": form, "ours": 1e3 * ours, "floor": 1e3 * floor})
        click.echo(line)
    machine = {"load": load, "threads": threads, "isa": ops.isa, "bandwidth": bandwidth, "product_rate": flops / 2}
    write_json(args.json, machine | {"cases": results})


if __name__ == "__main__":
    main()
