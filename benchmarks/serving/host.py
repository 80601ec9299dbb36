"""The host's time for one decode step on a GPU, without a GPU.

    python -m benchmarks.serving.host --layers 32 --heads 32 --kv-heads 8 --rows 32 --adapters 32 [--json FILE]

The real engine runs a model of the given depth and heads whose widths are small, on the cuda backend with kernels that
do nothing: CuPy's launcher, Triton's kernels, `linear` and `logits`, and replays of captured graphs. Everything else is
the product's. Row i uses LoRA adapter i modulo their number on q, k, v and o; without adapters all rows use the base. A
card adds 3 to 5 µs for each launch. If the host takes longer than the card needs for the same step, the card waits.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import click
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.report import Report, machine_line
from benchmarks.serving.models import RANDOM, random_tensors
from benchmarks.world import describe_machine, load_average
from loray.bases.registry import BaseModel
from loray.engine import build
from loray.engine.engine import Engine
from loray.engine.memory.adapter_manager import Tier
from loray.methods.weights import AdapterWeights, LoraWeights, ModuleKey
from loray.spec import ATTENTION_MODULES, AdapterRef, GenerateRequest, SamplingParams, ServeSpec
from loray_kernels import CapturedDecoding, CapturedStep, Decoding, LinearWeights, PageWriter
from loray_kernels.cuda.graphs import Capture, DecodeGraphs
from loray_kernels.cuda.ops import CudaOps
from loray_kernels.kv import DirectWriter

_RANK = 16
_WARM = 8  # steps of all rows before the first that counts
_STEP_TOKENS = 16384  # of prompts
_COLUMNS = (
    "rows",
    "adapters",
    "host, ms\t.3f",
    "lowest\t.3f",
    "highest\t.3f",
    "launches",
    "kernels in the graph",
    "torch's operations",  # the copy of a step's words to the device, and that of its results back
)
# Of these the device hears nothing.
_SILENT = {f"aten::{name}" for name in ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")}
_SILENT |= {f"aten::{name}" for name in ("detach_", "detach", "_unsafe_view", "resolve_conj", "resolve_neg")}


class StandInOps(CudaOps):
    """The cuda backend on a CPU, with kernels that do nothing. `num_launches`: of kernels and replayed graphs;
    `num_replayed`: kernels in the last graph.
    """

    def __init__(self) -> None:
        self.num_launches = self.num_replayed = 0
        super().__init__(cast(Any, self.launched), cast(Any, _NoTiles(self.launched)))

    def launched(self, *arguments: object) -> None:
        self.num_launches += 1

    def page_writer(self, pool: Tensor) -> PageWriter:
        return DirectWriter(pool)

    def linear(self, x_TI: Tensor, weights: LinearWeights) -> Tensor:
        self.launched()
        return x_TI.new_empty(x_TI.shape[0], weights.out_features)

    def logits(self, x_TD: Tensor, weights: LinearWeights) -> Tensor:
        self.launched()
        return x_TD.new_zeros(x_TD.shape[0], weights.out_features, dtype=torch.float32)

    def captured_decoding(self, forward: Callable[[CapturedStep], Tensor], decoding: Decoding) -> CapturedDecoding:
        return DecodeGraphs(forward, decoding, _Capturer(self))


class _NoTiles:
    """Triton's kernels: every method is one launch."""

    def __init__(self, launched: Callable[..., None]) -> None:
        self._launched = launched

    def __getattr__(self, name: str) -> Callable[..., None]:
        return self._launched


class _Capturer:
    """Runs a step twice, as a capture does, and keeps nothing of it."""

    def __init__(self, ops: StandInOps) -> None:
        self._ops = ops

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Capture]:
        return lambda: self._capture(run)

    def _capture(self, run: Callable[[], Tensor]) -> Capture:
        before = self._ops.num_launches
        run()
        kernels = self._ops.num_launches - before

        def replay() -> None:
            self._ops.launched()
            self._ops.num_replayed = kernels

        return Capture(replay, run())

    def num_bytes(self) -> int:
        return 0

    def release(self) -> None:
        """Nothing was kept."""


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts those of torch that would be launches, copies or reads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func._schema.name not in _SILENT and not func.is_view
        return func(*args, **(kwargs or {}))


def main(argv: Sequence[str] | None = None) -> Report:
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, _engine(args, Path(folder)) as (engine, ops):
        for request in _requests(args, engine.base):
            engine.add(request)
        _start(engine, args.rows)
        for _ in range(_WARM):
            engine.step()
        gc.collect()
        gc.freeze()  # as a replica does, see serve_apps.python_gc
        before, ms = ops.num_launches, []
        for _ in range(args.steps):
            began = time.perf_counter()
            num_tokens = len(engine.step())
            ms.append(1e3 * (time.perf_counter() - began))
            if num_tokens != args.rows:
                raise SystemExit(f"a step gave {num_tokens} tokens, not one for each of its requests")
        launches = (ops.num_launches - before) / args.steps
        with _Operations() as operations:
            engine.step()
        gc.unfreeze()
    machine = describe_machine()
    times = (statistics.median(ms), min(ms), max(ms))
    row = [args.rows, args.adapters, *times, launches, ops.num_replayed, operations.num]
    report = Report(machine, _COLUMNS, [row], " ".join(sys.argv[1:] if argv is None else argv))
    click.echo(machine_line(machine, load=f"{load_average():.2f}") + "\n" + report.text())
    report.write(args.json)
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=32, help="of the model (default %(default)s)")
    add("--heads", type=int, default=32, help="for queries (default %(default)s)")
    add("--kv-heads", type=int, default=8, help="for keys and values (default %(default)s)")
    add("--rows", type=int, default=32, help="requests that decode (default %(default)s)")
    add("--adapters", type=int, default=32, help="of the rows; 0: all rows use the base (default %(default)s)")
    add("--context", type=int, default=128, help="tokens of each prompt (default %(default)s)")
    add("--steps", type=int, default=50, help="that are timed (default %(default)s)")
    add("--json", type=Path, help="write the figures there too")
    return parser


@contextmanager
def _engine(args: argparse.Namespace, folder: Path) -> Iterator[tuple[Engine, StandInOps]]:
    heads = {"num_heads": args.heads, "num_kv_heads": args.kv_heads, "head_dim": 8}
    tiny = RANDOM["tiny-random"]
    config = dataclasses.replace(tiny, layers=tiny.layers[:1] * args.layers, **heads, max_position_embeddings=1 << 17)
    base = BaseModel("host", folder, hashlib.sha256(repr(config).encode()).hexdigest(), config, source="random")
    tokens = args.context + _max_tokens(args)
    kv_bytes = 4 * config.num_layers * config.num_kv_heads * config.head_dim * (args.rows * (tokens + 32) + 32)
    shapes = {module: config.module_shape(module) for module in ATTENTION_MODULES}
    # Kernels that do nothing read no weights, so all are zeros, and one adapter stands for all.
    lora = {m: LoraWeights(torch.zeros(_RANK, n), torch.zeros(out, _RANK), 1.0) for m, (out, n) in shapes.items()}
    layers = range(config.num_layers)
    weights = AdapterWeights({ModuleKey(layer, m): own for m, own in lora.items() for layer in layers})
    adapter_bytes = 2 * config.num_layers * _RANK * sum(map(sum, shapes.values()))
    spec = ServeSpec(
        base=base.name,
        pool_bytes=kv_bytes + 2 * args.adapters * adapter_bytes + (8 << 20),
        host_bytes=2 << 30,
        max_model_len=tokens + 16,
        max_num_seqs=args.rows,
        max_num_batched_tokens=max(_STEP_TOKENS, args.rows),
        itl_slo_ms=1e6,  # steps are limited by tokens alone
        graph_record_s=1e6,  # all steps are captured before the start
        enable_prefix_caching=False,
    )
    ops, tensors = StandInOps(), random_tensors(config, torch.device("cpu"), torch.bfloat16)
    with patch.object(build, "backend", lambda name, device: ops):
        engine = build.build_engine(spec, base, lambda ref, packer: packer.pack(weights), tensors)
    try:
        engine.warm_up()
        yield engine, ops
    finally:
        engine.close()


def _max_tokens(args: argparse.Namespace) -> int:
    """So many that no row ends: the first have decoded while other prompts were computed."""
    return int(args.steps + _WARM + 32 + 2 * args.rows * args.context // _STEP_TOKENS)


def _requests(args: argparse.Namespace, base: BaseModel) -> Iterator[GenerateRequest]:
    params = SamplingParams(max_tokens=_max_tokens(args), temperature=0, ignore_eos=True)
    fields: dict[str, Any] = {"version": 1, "method": "lora", "base_fingerprint": base.fingerprint, "nbytes": 1 << 16}
    fields["context_length"] = base.config.max_position_embeddings
    for row in range(args.rows):
        name = f"adapter-{row % args.adapters}" if args.adapters else None
        digest = hashlib.sha256(str(name).encode()).hexdigest()
        ref = AdapterRef(digest=digest, name=name, **fields) if name else None
        prompt = tuple((31 * k + 7 * row) % 400 + 100 for k in range(args.context))
        yield GenerateRequest(str(row), prompt, params, ref)


def _start(engine: Engine, rows: int) -> None:
    """Until every row decodes. All adapters are loaded first, so that prompts are computed together."""
    at = engine.adapter_manager.at
    while engine.adapter_manager.poll() or at[Tier.QUEUED] or at[Tier.LOADING]:
        time.sleep(0.001)
    outputs: Sequence[Any] = ()
    while len(outputs) != rows or len(engine.scheduler.running) != rows:
        outputs = engine.step()
        if error := next((output.error for output in outputs if output.error is not None), None):
            raise error


if __name__ == "__main__":
    main()
