"""The host's time for one decode step on a GPU, without a GPU.

    python -m benchmarks.serving.host --layers 32 --heads 32 --kv-heads 8 --rows 32 --adapters 32 [--json FILE]

The real engine runs a model of the given depth and heads whose widths are small, on the cuda backend with kernels that
do nothing: CuPy's launcher, Triton's kernels, `linear` and `logits`, and replays of captured graphs. Everything else is
the product's. Row i uses adapter i modulo their number, of `--method` on q, k, v and o; without adapters all rows use
the base. A step of all rows is timed `--steps` times, then one is counted. A card adds 3 to 5 µs for each launch. If
the host takes longer than the card needs for the same step, the card waits. Before, all decode steps are captured:
`recording_s` is the host's part of that.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
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
from loray.bases.config import ModelConfig
from loray.bases.registry import BaseModel
from loray.engine import build
from loray.engine.engine import Engine
from loray.engine.memory.adapter_manager import Stage
from loray.methods.weights import AdapterWeights, EmbeddingRows, LoraWeights, ModuleKey, SharedProjection, VeraWeights
from loray.spec import ATTENTION_MODULES, AdapterRef, GenerateRequest, RopeParameters, SamplingParams, ServeSpec
from loray_kernels import CapturedDecoding, CapturedStep, Decoding, LinearWeights, PageWriter
from loray_kernels.cuda.graphs import Capture, DecodeGraphs, StepWords
from loray_kernels.cuda.kernels import Gather
from loray_kernels.cuda.ops import CudaOps
from loray_kernels.cuda.sampling import Readback
from loray_kernels.kv import DirectWriter

_METHODS = ("lora", "vera", "longlora")
_WARM = 8  # steps of all rows before the first that counts
_STEP_TOKENS = 16384  # of prompts
_SYNCHRONISES = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select"}
_NO_LAUNCH = {
    *("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided"),
    *("aten::detach_", "aten::detach", "aten::_unsafe_view", "aten::resolve_conj", "aten::resolve_neg"),
}


@dataclasses.dataclass
class Counts:
    """Of one step. `launches`: kernels, torch's operations and replayed graphs; `replayed_kernels`: those in graphs,
    without torch's operations. `copies` and `copied_bytes`: from the host to the device. `reads`: tensors or numbers
    read back, each of which waits for the device.
    """

    launches: int = 0
    replayed_kernels: int = 0
    copies: int = 0
    copied_bytes: int = 0
    reads: int = 0

    def copied(self, tensor: Tensor) -> None:
        self.copies += 1
        self.copied_bytes += tensor.nbytes


class StandInOps(CudaOps):
    """The cuda backend on a CPU, with kernels that do nothing. A capture runs a step twice and keeps nothing of it."""

    def __init__(self) -> None:
        self.counts, self.num_captured, self.capture_s = Counts(), 0, 0.0
        super().__init__(Gather(self.launched), cast(Any, _NoTiles(self)))

    def launched(self, *arguments: object) -> None:
        self.counts.launches += 1

    def page_writer(self, pool: Tensor) -> PageWriter:
        return DirectWriter(pool)

    def linear(self, x_TI: Tensor, weights: LinearWeights) -> Tensor:
        self.launched()
        return x_TI.new_empty(x_TI.shape[0], weights.out_features)

    def logits(self, x_TD: Tensor, weights: LinearWeights) -> Tensor:
        self.launched()
        return x_TD.new_zeros(x_TD.shape[0], weights.out_features, dtype=torch.float32)

    def captured_decoding(self, forward: Callable[[CapturedStep], Tensor], decoding: Decoding) -> CapturedDecoding:
        return DecodeGraphs(forward, decoding, self)

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Capture]:
        return lambda: self._capture(run)

    def _capture(self, run: Callable[[], Tensor]) -> Capture:
        began, before = time.perf_counter(), self.counts.launches
        run()
        kernels = self.counts.launches - before
        out = run()
        self.num_captured += 1
        self.capture_s += time.perf_counter() - began

        def replay() -> None:
            self.counts.launches += 1
            self.counts.replayed_kernels += kernels

        return Capture(replay, out)

    def num_bytes(self) -> int:
        return 0

    def release(self) -> None:
        """Nothing was kept."""


class _NoTiles:
    """Triton's kernels: every method is one launch."""

    def __init__(self, ops: StandInOps) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Callable[..., None]:
        return self._ops.launched


class _Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts torch's operations: those that would be launches, and copies of tensors that Python's numbers became."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "aten::lift_fresh":
            self._counts.copied(args[0])
        elif name in _SYNCHRONISES:
            self._counts.reads += 1
        elif name not in _NO_LAUNCH and not func.is_view:
            self._counts.launches += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _counting(ops: StandInOps) -> Iterator[Counts]:
    """Counts of what runs inside, which takes several times as long as otherwise."""
    counts = ops.counts = Counts()
    tolist, send, read = Tensor.tolist, StepWords.send, Readback.read

    def counted_tolist(tensor: Tensor) -> Any:
        counts.reads += 1
        return tolist(tensor)

    def counted_read(readback: Readback, *arguments: Any) -> Any:
        counts.reads += 1
        counts.launches -= 1  # the copy to the host, which has been counted as one of torch's operations
        return read(readback, *arguments)

    def counted_send(words: StepWords, staged: Tensor) -> None:
        send(words, staged)
        counts.launches -= 1  # the copy that has just been counted as one of torch's operations
        counts.copied(staged)

    patches = ((Tensor, "tolist", counted_tolist), (StepWords, "send", counted_send), (Readback, "read", counted_read))
    for owner, name, replacement in patches:
        setattr(owner, name, replacement)
    try:
        with _Dispatched(counts):
            yield counts
    finally:
        for owner, name, original in ((Tensor, "tolist", tolist), (StepWords, "send", send), (Readback, "read", read)):
            setattr(owner, name, original)
        ops.counts = Counts()  # of later steps


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, _engine(args, Path(folder)) as (engine, ops):
        for request in _requests(args, engine.base):
            engine.add(request)
        _start(engine, args.rows)
        prompts = _prompts(args, engine.base)
        for _ in range(_WARM):
            _step(engine, args, prompts)
        gc.collect()
        gc.freeze()  # as a replica does, see serve_apps.python_gc
        host_ms = [_step(engine, args, prompts) for _ in range(args.steps)]
        with _counting(ops) as counts:
            _step(engine, args, prompts)
        gc.unfreeze()
    figures: dict[str, Any] = {
        name: getattr(args, name) for name in ("rows", "adapters", "method", "context", "prompt")
    }
    figures |= {
        "host_ms": round(statistics.median(host_ms), 3),
        "host_ms_lowest": round(min(host_ms), 3),
        "host_ms_highest": round(max(host_ms), 3),
        "recorded_steps": ops.num_captured,
        "recording_s": round(ops.capture_s, 2),
        **dataclasses.asdict(counts),
    }
    machine = describe_machine()
    report = Report(machine, list(figures), [list(figures.values())], " ".join(sys.argv[1:] if argv is None else argv))
    click.echo(machine_line(machine, load=f"{load_average():.2f}") + "\n" + report.text())
    report.write(args.json)
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=32, help="of the model (default %(default)s)")
    add("--heads", type=int, default=32, help="for queries (default %(default)s)")
    add("--kv-heads", type=int, default=8, help="for keys and values (default %(default)s)")
    add("--rows", type=int, default=32, help="requests that decode (default %(default)s)")
    add("--adapters", type=int, default=32, help="of the rows; 0: all rows use the base (default %(default)s)")
    add("--method", choices=(*_METHODS, "mixed"), default="lora", help="of the adapters; mixed: by turns (%(default)s)")
    add("--rank", type=int, default=16, help="of the adapters (default %(default)s)")
    add("--context", type=int, default=128, help="tokens of each prompt (default %(default)s)")
    add("--prompt", type=int, default=0, help="tokens of a prompt that each step has beside the rows (default: none)")
    add("--temperature", type=float, default=0.0, help="of all requests (default %(default)s, greedy)")
    add("--steps", type=int, default=50, help="that are timed (default %(default)s)")
    add("--json", type=Path, help="write the figures there too")
    return parser


@contextmanager
def _engine(args: argparse.Namespace, folder: Path) -> Iterator[tuple[Engine, StandInOps]]:
    heads = {"num_heads": args.heads, "num_kv_heads": args.kv_heads, "head_dim": 8}
    tiny = RANDOM["tiny-random"]
    config = dataclasses.replace(tiny, num_layers=args.layers, **heads, max_position_embeddings=1 << 17)
    base = BaseModel("host", folder, hashlib.sha256(repr(config).encode()).hexdigest(), config, source="random")
    tokens = args.context + _max_tokens(args)
    num_tokens = args.rows * (tokens + 32) + args.prompt + 32
    kv_bytes = 4 * config.num_layers * config.num_kv_heads * config.head_dim * num_tokens
    widths = sum(sum(config.module_shape(module)) for module in ATTENTION_MODULES)
    adapter_bytes = 2 * (config.num_layers * (args.rank * widths + 2 * config.hidden_size) + 65 * config.hidden_size)
    methods = _METHODS if args.method == "mixed" else (args.method,)
    kinds = [_weights(config, args.rank, method) for method in methods]
    of_digest = {ref.digest: kinds[i % len(kinds)] for i, ref in enumerate(_refs(args, base))}
    spec = ServeSpec(
        base=base.name,
        pool_bytes=kv_bytes + 2 * args.adapters * adapter_bytes + (8 << 20),
        host_bytes=2 << 30,
        max_model_len=max(tokens, args.prompt) + 16,
        max_num_seqs=args.rows + bool(args.prompt),
        max_num_batched_tokens=max(_STEP_TOKENS, args.rows + args.prompt),
        itl_slo_ms=1e6,  # steps are limited by tokens alone
        graph_record_s=1e6,  # all steps are captured before the start
        enable_prefix_caching=False,
    )
    ops = StandInOps()
    tensors = random_tensors(config, torch.device("cpu"), torch.bfloat16)
    with patch.object(build, "backend", lambda name, device: ops):
        engine = build.build_engine(spec, base, lambda ref: of_digest[ref.digest], tensors)
    try:
        engine.warm_up()
        yield engine, ops
    finally:
        engine.close()


def _weights(config: ModelConfig, rank: int, method: str) -> AdapterWeights:
    """An adapter on q, k, v and o. Kernels that do nothing read no weights, so all are zeros."""
    shapes = {module: config.module_shape(module) for module in ATTENTION_MODULES}
    layers = range(config.num_layers)
    if method == "vera":
        widest = max(max(shape) for shape in shapes.values())
        pair = SharedProjection(torch.zeros(256, widest), torch.zeros(widest, 256), "pair")
        vera = {m: VeraWeights(torch.zeros(256), torch.zeros(out)) for m, (out, _) in shapes.items()}
        return AdapterWeights({ModuleKey(layer, m): own for m, own in vera.items() for layer in layers}, pair)
    lora = {m: LoraWeights(torch.zeros(rank, width), torch.zeros(out, rank), 1.0) for m, (out, width) in shapes.items()}
    modules = {ModuleKey(layer, m): own for m, own in lora.items() for layer in layers}
    if method == "lora":
        return AdapterWeights(modules)
    hidden, names = config.hidden_size, ("input_layernorm", "post_attention_layernorm")
    norms = {f"layers.{layer}.{name}": torch.ones(hidden) for layer in layers for name in names}
    return AdapterWeights(
        modules,
        norms=norms | {"norm": torch.ones(hidden)},
        embedding=EmbeddingRows(tuple(range(64)), torch.zeros(64, hidden)),
        rope=RopeParameters(rope_type="linear", rope_theta=10000.0, factor=2.0),
    )


def _max_tokens(args: argparse.Namespace) -> int:
    """So many that no row ends: the first have decoded while other prompts were computed."""
    return int(args.steps + _WARM + 32 + 2 * args.rows * args.context // _STEP_TOKENS)


def _step(engine: Engine, args: argparse.Namespace, prompts: Iterator[GenerateRequest]) -> float:
    """Milliseconds of a step of all rows, and of a prompt beside them if that is asked."""
    if args.prompt:
        engine.add(next(prompts))
    began = time.perf_counter()
    num_tokens = len(engine.step())
    ms = 1e3 * (time.perf_counter() - began)
    if num_tokens != args.rows + bool(args.prompt):
        raise SystemExit(f"a step gave {num_tokens} tokens, not one for each of its requests")
    return ms


def _prompts(args: argparse.Namespace, base: BaseModel) -> Iterator[GenerateRequest]:
    """Each for another adapter, and of one token of output."""
    refs, params = _refs(args, base), SamplingParams(max_tokens=1, temperature=0)
    for i in count():
        prompt = tuple((17 * k + 5 * i) % 400 + 100 for k in range(args.prompt))
        yield GenerateRequest(f"prompt {i}", prompt, params, refs[i % len(refs)] if refs else None)


def _requests(args: argparse.Namespace, base: BaseModel) -> Iterator[GenerateRequest]:
    most = _max_tokens(args)
    params = SamplingParams(max_tokens=most, temperature=args.temperature, seed=1, ignore_eos=True, min_tokens=0)
    refs = _refs(args, base)
    for row in range(args.rows):
        prompt = tuple((31 * k + 7 * row) % 400 + 100 for k in range(args.context))
        yield GenerateRequest(str(row), prompt, params, refs[row % len(refs)] if refs else None)


def _refs(args: argparse.Namespace, base: BaseModel) -> list[AdapterRef]:
    return [
        AdapterRef(
            digest=hashlib.sha256(str(i).encode()).hexdigest(),
            name=f"adapter-{i}",
            version=1,
            method="lora",
            base_fingerprint=base.fingerprint,
            context_length=base.config.max_position_embeddings,
            nbytes=1 << 16,
        )
        for i in range(args.adapters)
    ]


def _start(engine: Engine, rows: int) -> None:
    """Until every row decodes. All adapters are loaded first, so that prompts are computed together."""
    at = engine.adapter_manager.table.at
    while engine.adapter_manager.poll() or at[Stage.QUEUED] or at[Stage.LOADING]:
        time.sleep(0.001)
    while True:
        outputs = engine.step()
        for output in outputs:
            if output.error is not None:
                raise output.error
        if len(outputs) == rows and len(engine.scheduler.running) == rows:
            return


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
