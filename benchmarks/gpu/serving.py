"""An engine with random weights and random adapters, stepped in this process: requests in, times out."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks.serving.floors import ModelSize
from benchmarks.serving.models import RANDOM, random_tensors
from benchmarks.world import MachineRates
from loray.bases.config import ModelConfig
from loray.bases.registry import BaseModel
from loray.engine.build import build_engine
from loray.engine.engine import Engine
from loray.engine.request import TokenOutput
from loray.methods.weights import AdapterWeights, LoraWeights, ModuleKey
from loray.spec import ATTENTION_MODULES, AdapterRef, GenerateRequest, SamplingParams, ServeSpec
from loray.text.grammar import GrammarCompiler
from loray_kernels.cuda.sampling import Readback

_FIRST_TOKEN, _VOCABULARY = 100, 400  # of prompts
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


class Loop(NamedTuple):
    """Of a closed loop. `first_s`: seconds to the first token of each request, in the order of their ends."""

    tokens_per_s: float
    first_s: list[float]

    def row(self) -> dict[str, Any]:
        ordered = sorted(self.first_s)
        return {
            "tokens_per_s": round(self.tokens_per_s, 1),
            "requests": len(ordered),
            "ttft_p50_ms": round(1e3 * statistics.median(ordered), 1),
            "ttft_p99_ms": round(1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 1),
        }


class Server:
    """Owns an engine, which nothing else steps. `step_s`: seconds of each step that computed something; `host_s`: those
    in which it did not wait for results.
    """

    def __init__(self, engine: Engine, shape: Shape) -> None:
        self.engine, self._shape, self._num = engine, shape, 0
        self.recorded = engine.warm_up()
        self.step_s: list[float] = []
        self.host_s: list[float] = []
        self.waited_s = 0.0

    def add(self, num_tokens: int, adapter: int | None, max_tokens: int) -> str:
        """A request with a prompt that no other has; its id."""
        self._num += 1
        prompt = tuple(_FIRST_TOKEN + (31 * k + 7 * self._num) % _VOCABULARY for k in range(num_tokens))
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, min_tokens=0)
        ref = None if adapter is None else _ref(self._shape, self.engine.base, adapter)
        self.engine.add(GenerateRequest(str(self._num), prompt, params, ref))
        return str(self._num)

    def step(self) -> list[TokenOutput]:
        began, waited_s = time.perf_counter(), self.waited_s
        outputs = self.engine.step()
        if not self.engine.idle:
            self.step_s.append(time.perf_counter() - began)
            self.host_s.append(self.step_s[-1] - (self.waited_s - waited_s))
        for output in outputs:
            if output.error is not None:
                raise output.error
        if self.engine.idle and self.engine.has_work:
            time.sleep(0.0002)  # threads that load need the interpreter
        return outputs

    def first_token_s(self, num_tokens: int, adapter: int | None) -> float:
        """Of one more request of one token, beside whatever runs."""
        began = time.perf_counter()
        name = self.add(num_tokens, adapter, 1)
        while not any(output.request_id == name for output in self.step()):
            pass
        return time.perf_counter() - began

    @contextmanager
    def decoding(self, rows: int, adapters: int, max_tokens: int) -> Iterator[None]:
        """`rows` requests decode, row i with adapter i modulo `adapters`; they are cancelled at the end. The adapters
        are loaded before: rows that wait for theirs would let others run out of tokens.
        """
        waiting = {self.add(1, i, 1) for i in range(min(adapters, rows))}
        while waiting:
            waiting -= {output.request_id for output in self.step()}
        names = [self.add(self._shape.context, i % adapters if adapters else None, max_tokens) for i in range(rows)]
        decoding: set[str] = set()
        while len(decoding) < rows:
            decoding |= {output.request_id for output in self.step()}
        try:
            yield
        finally:
            for name in names:
                self.engine.cancel(name)
            self.engine.step()

    def loop(
        self, at_once: int, adapter_of: Callable[[int], int | None], seconds: float, prompt: int, outputs: int
    ) -> Loop:
        """Requests number i on `adapter_of(i)`, `at_once` of them, until the time is over and those that run have
        ended.
        """
        began = time.perf_counter()
        added: dict[str, float] = {}
        first: list[float] = []
        num, num_tokens = 0, 0
        while True:
            while len(added) < at_once and time.perf_counter() - began < seconds:
                added[self.add(prompt, adapter_of(num), outputs)] = time.perf_counter()
                num += 1
            if not added:
                return Loop(num_tokens / (time.perf_counter() - began), first)
            for output in self.step():
                num_tokens += 1
                if added[output.request_id] > 0:
                    first.append(time.perf_counter() - added[output.request_id])
                    added[output.request_id] = 0.0
                if output.finish_reason is not None:
                    del added[output.request_id]


@contextmanager
def server(shape: Shape, folder: Path, **fields: Any) -> Iterator[Server]:
    """`fields`: of the serve spec. Nothing is kept of prompts."""
    config, device = shape.config, torch.device(shape.device)
    fingerprint = hashlib.sha256(repr(config).encode()).hexdigest()
    base = BaseModel("gpu", folder, fingerprint, config, source="random")
    templates = {rank: _adapter(shape, rank) for rank in shape.ranks}
    ranks = shape.ranks
    own: dict[str, Any] = {
        "pool_bytes": shape.pool_bytes,
        "host_bytes": shape.host_bytes,
        "max_num_batched_tokens": shape.step_tokens,
        "graph_record_s": shape.graph_record_s,
    }
    spec = ServeSpec(
        base=base.name,
        device=shape.device,
        itl_slo_ms=1e6,  # steps are limited by tokens alone
        enable_prefix_caching=False,
        max_queued=1 << 20,
        max_loading=1 << 20,
        load_timeout_s=600,
        **(own | fields),
    )
    tensors = random_tensors(config, device, torch.bfloat16)
    with patch.object(GrammarCompiler, "warm", lambda self: None):  # no answer is held to a grammar
        engine = build_engine(
            spec, base, lambda ref, packer: packer.pack(templates[ranks[int(ref.name) % len(ranks)]]), tensors
        )
    made, read = Server(engine, shape), Readback.read

    def timed(readback: Readback, *arguments: Any) -> Any:
        began = time.perf_counter()
        words = read(readback, *arguments)
        made.waited_s += time.perf_counter() - began
        return words

    try:
        with patch.object(Readback, "read", timed):
            yield made
    finally:
        engine.close()


def _ref(shape: Shape, base: BaseModel, number: int) -> AdapterRef:
    return AdapterRef(
        digest=hashlib.sha256(str(number).encode()).hexdigest(),
        name=str(number),
        version=1,
        method="lora",
        base_fingerprint=base.fingerprint,
        context_length=base.config.max_position_embeddings,
        nbytes=shape.adapter_bytes(shape.ranks[number % len(shape.ranks)]),
    )


def _adapter(shape: Shape, rank: int) -> AdapterWeights:
    """On the host, in bf16. All layers have the same tensors, which are packed for each."""
    generator = torch.Generator().manual_seed(rank)

    def matrix(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).mul_(0.02).to(torch.bfloat16)

    own = {}
    for module in ATTENTION_MODULES:
        out, width = shape.config.module_shape(module)
        own[module] = LoraWeights(matrix(rank, width), matrix(out, rank), 1.0)
    layers: Sequence[int] = range(shape.config.num_layers)
    return AdapterWeights({ModuleKey(layer, m): weights for m, weights in own.items() for layer in layers})
