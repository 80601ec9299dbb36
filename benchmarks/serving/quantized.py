"""Speed of the engine on a base in bf16 and on the same in int8 and int4, on this machine's CPU, and their floors.

    python -m benchmarks.serving.quantized [--forms bf16 int8 int4] [--rows 1 32] [--prompt 512] [--json FILE]

The base is SmolLM2-135M, whose layers and output head are rounded as they are loaded; greedy, without adapters, with
prompts of 16 random tokens and 48 new ones for each row, then one prompt alone. The forms take turns, so that a busy
minute meets all; figures are medians. A floor is what reading the weights once a step and their multiply-adds take at
rates measured in the same run, with twice the rate for integers; keys and values are not in it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.kernels.quantized import FORMS
from benchmarks.report import write_json
from benchmarks.serving.floors import ModelSize
from benchmarks.serving.models import bench_base
from benchmarks.stepping import finish
from benchmarks.world import MachineRates, rates_here
from loray.bases.checkpoint import read_tensors
from loray.bases.registry import BaseModel
from loray.engine.build import build_engine
from loray.engine.engine import Engine
from loray.spec import LINEAR_MODULES, GenerateRequest, SamplingParams, ServeSpec
from loray_kernels import Weight, backend

NEW, PROMPT = 48, 16
# Of a weight of a layer, and of the head, which is int8 with int4 layers, too.
BYTES = {"bf16": (2.0, 2.0), "int8": (1.0, 1.0), "int4": (0.5, 1.0)}


def tensors(base: BaseModel, form: str) -> Iterator[tuple[str, Weight]]:
    for name, tensor in read_tensors(base.path):
        module = name.removesuffix(".weight").rpartition(".")[2]
        yield name, FORMS[form](tensor) if module in LINEAR_MODULES else tensor


def build(base: BaseModel, form: str) -> Engine:
    def no_adapters(*_: Any) -> Any:
        raise AssertionError

    spec = ServeSpec(
        base=base.name, dtype="bfloat16", pool_bytes=256 << 20, max_num_batched_tokens=2048, speculation="off"
    )
    engine = build_engine(spec, base, no_adapters, tensors(base, form))
    engine.warm_up()
    return engine


def requests(base: BaseModel, num: int, length: int, new: int) -> Iterator[GenerateRequest]:
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    for i in range(num):
        ids = tuple(torch.randint(0, base.config.vocab_size, (length,)).tolist())  # which no prefix cache knows
        yield GenerateRequest(str(i), ids, params)


def decode_rate(engine: Engine, base: BaseModel, rows: int) -> float:
    """Tokens/s once all rows decode."""
    for request in requests(base, rows, PROMPT, NEW):
        engine.add(request)
    times = [time.perf_counter() for output in finish(engine) if output.token_id is not None]
    return (len(times) - 2 * rows) / (times[-1] - times[2 * rows - 1])


def prompt_rate(engine: Engine, base: BaseModel, length: int) -> float:
    """Tokens/s up to the first new token."""
    (request,) = requests(base, 1, length, 1)
    began = time.perf_counter()
    engine.add(request)
    for _ in finish(engine):
        pass
    return length / (time.perf_counter() - began)


def floor_rate(size: ModelSize, form: str, rates: MachineRates, tokens: int, *, is_prompt: bool) -> float:
    """Tokens/s of a step with so many tokens."""
    logits, (layer, head) = 1 if is_prompt else tokens, BYTES[form]
    flops = 2.0 * (tokens * size.layer_weights + logits * size.head_weights)
    rate = rates.flops * (1 if form == "bf16" else 2)
    return tokens / max((size.layer_weights * layer + size.head_weights * head) / rates.bandwidth, flops / rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    base, load, threads = bench_base(), os.getloadavg(), torch.get_num_threads()
    rates, isa = rates_here("cpu"), getattr(backend("auto"), "isa", "reference")
    measured = f"{rates.bandwidth / 1e9:.1f} GB/s  {rates.flops / 1e9:.0f} GFLOP/s"
    click.echo(f"load {load[0]:.2f}  threads {threads}  {isa}  {measured}")
    engines = {form: build(base, form) for form in args.forms}
    cases: dict[str, tuple[int, Callable[[Engine], float]]] = {
        f"{rows} at once": (rows, lambda engine, rows=rows: decode_rate(engine, base, rows))  # type: ignore[misc]
        for rows in args.rows
    }
    cases[f"prompt of {args.prompt}"] = args.prompt, lambda engine: prompt_rate(engine, base, args.prompt)
    found: dict[str, dict[str, list[float]]] = {name: {form: [] for form in engines} for name in cases}
    for _ in range(args.repeats):
        for name, (_, measure) in cases.items():
            for form, engine in engines.items():
                found[name][form].append(measure(engine))
    click.echo(f"{'tokens/s':<18}" + "".join(f"{form:>9}{'floor':>8}{'gain':>7}" for form in engines))
    results, size = [], ModelSize.of(base.config)
    for name, by_form in found.items():
        line, first = f"{name:<18}", statistics.median(next(iter(by_form.values())))
        for form, samples in by_form.items():
            ours = statistics.median(samples)
            floor = floor_rate(size, form, rates, cases[name][0], is_prompt=name.startswith("prompt"))
            line += f"{ours:>9.0f}{floor:>8.0f}{ours / first:>7.2f}"
            results.append({"case": name, "form": form, "tokens_per_second": ours, "floor": floor})
        click.echo(line)
    machine = {"load": load, "threads": threads, "isa": isa, **rates._asdict()}
    write_json(args.json, machine | {"cases": results})


if __name__ == "__main__":
    main()
