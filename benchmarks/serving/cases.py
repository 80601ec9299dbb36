"""The cases and presets. A case is a workload on an engine; consecutive cases with equal engines share a process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.serving.adapters import AdapterSet
from benchmarks.serving.workload import MixedLoad, Workload
from loray.bases.config import ModelConfig
from loray.spec import LINEAR_MODULES

OURS = "loray"  # the engine in process
BESIDE, SERVE, UP = "loray-beside", "loray-serve", "loray-up"
OUR_SYSTEMS = (OURS, BESIDE, SERVE, UP)
SHORT, LONG = 32, 2048
SERVED = (BESIDE, SERVE, UP)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The adapters, memory and limits of an engine.

    pool_adapters       adapters of the set's mean size that fit into the pool beside the KV cache, about; None: all
    pool_for_adapters   the same in bytes, instead
    max_model_len       for a peer that asks for it
    """

    adapters: AdapterSet | None = None
    pool_adapters: int | None = None
    pool_for_adapters: int | None = None
    kv_tokens: int = SHORT * 128 + 2 * LONG
    host_bytes: int = 1 << 30
    max_num_seqs: int = 32
    max_num_batched_tokens: int = LONG
    max_model_len: int = 4096

    def pool_bytes(self, config: ModelConfig) -> int:
        """Bytes of the pool in bf16. Rows are packed, so 5 % more than the adapters' bytes suffice."""
        kv = 4 * config.num_layers * config.num_kv_heads * config.head_dim * self.kv_tokens
        if self.adapters is None:
            return kv
        if self.pool_for_adapters is not None:
            return kv + self.pool_for_adapters
        num = self.adapters.num if self.pool_adapters is None else self.pool_adapters
        rows = int(1.05 * num * self.adapters.mean_bytes(config))
        return kv + rows + 2 * self.adapters.pair_bytes(config)  # a pair occupies whole blocks


@dataclass(frozen=True, slots=True)
class Case:
    """`warm_up` passes, then `passes` that count.

    peers        other systems that can run the case
    peer_passes  of systems that are not loray's
    in_process   False: only servers can run it
    """

    name: str
    engine: EngineOptions
    workload: Workload | MixedLoad
    passes: int = 3
    warm_up: int = 1
    peers: tuple[str, ...] = ("peft", "peft-bf16", "vllm", *SERVED)
    peer_passes: int = 1
    in_process: bool = True

    def runs_on(self, system: str) -> bool:
        return self.in_process if system == OURS else system in self.peers


BASE = EngineOptions()
MIXED = EngineOptions(AdapterSet(100))
FEW = EngineOptions(AdapterSet(32), kv_tokens=SHORT * 128)
SEVEN = EngineOptions(AdapterSet(32, modules=LINEAR_MODULES), kv_tokens=SHORT * 128)
_WAVE = Workload(num_requests=SHORT, at_once=SHORT)
_ALONE = Workload(num_requests=1, at_once=1)
_PROMPT = replace(_ALONE, inputs=(LONG, LONG), outputs=(1, 1))


def _wave(name: str, engine: EngineOptions, n: int) -> Case:
    return Case(name, engine, replace(_WAVE, num_adapters=n))


# A single adapter is the third of the set: its rank 32 is close to the mean of 30.
_ONE = replace(_WAVE, num_adapters=1, first_adapter=2)
QUICK = (
    _wave("base", BASE, 0),
    Case("n=1", FEW, _ONE),
    *(_wave(f"n={n}", FEW, n) for n in (8, 32)),
)


def _over_http() -> tuple[Case, ...]:
    """What a user gets, over HTTP, beside the engine in process. Answers that come whole are requested of servers."""

    def case(name: str, engine: EngineOptions, workload: Workload, **more: Any) -> Case:
        return Case(name, engine, workload, peers=("vllm", *SERVED), peer_passes=2, passes=2, **more)

    servers: dict[str, Any] = {"in_process": False, "peers": ("vllm", SERVE, UP)}
    base = case("base", BASE, _WAVE)
    return (
        base,
        replace(base, name="base, whole", workload=replace(_WAVE, streamed=False), **servers),
        case("one stream", BASE, replace(_ALONE, outputs=(128, 128))),
        case("n=32", FEW, replace(_WAVE, num_adapters=32)),
    )


HTTP = _over_http()


def _bases() -> tuple[Case, ...]:
    """A base in any precision beside other servers, with 1, 8 and 32 requests at once."""

    def case(name: str, workload: Workload) -> Case:
        peers = ("vllm", "llama", SERVE)
        return Case(name, BASE, workload, peers=peers, peer_passes=2, passes=2, in_process=False)

    eight = replace(_WAVE, num_requests=16, at_once=8)
    return (
        case("one stream", replace(_ALONE, outputs=(128, 128))),
        case("8 at once", eight),
        case("32 at once", _WAVE),
    )


def _mixed() -> tuple[Case, ...]:
    """A prompt of 8,000 tokens, alone and among others, with the product's own limits of a step."""
    engine = EngineOptions(kv_tokens=10_240, max_num_batched_tokens=512, max_model_len=8192)
    alone = MixedLoad(8000, alone=True)
    beside = MixedLoad(8000, num_short=16, every_s=0.5, stream_tokens=600)
    peers = ("vllm", SERVE, UP)
    return (
        Case("long prompt alone", engine, alone, passes=2, peers=peers),
        Case("long prompt among others", engine, beside, passes=2, warm_up=0, peers=peers),
    )


def _hundred(name: str, alpha: float | None) -> Case:
    return Case(name, MIXED, replace(_WAVE, num_requests=128, num_adapters=100, alpha=alpha), passes=2)


def _one(name: str, engine: EngineOptions, workload: Workload, rank64: bool = False) -> Case:
    """Adapter 3 of a mixed set has rank 64."""
    if rank64:
        workload = replace(workload, num_adapters=1, first_adapter=3)
    return Case(name, engine, workload, passes=5, peers=("vllm", *SERVED))


# The pool holds about 100 of these adapters, and host memory all (5.5 GB) once each has been requested. 16 requests
# wait behind the 32 that run, so that their adapters can be prefetched.
MANY = EngineOptions(AdapterSet(2000, ranks=(8, 16)), pool_adapters=100, host_bytes=8 << 30)


def _many(name: str, n: int, alpha: float | None) -> Case:
    workload = replace(_WAVE, num_requests=144, num_adapters=n, alpha=alpha, at_once=48)
    return Case(name, MANY, workload, passes=2, peers=())


ACCEPTANCE = (
    QUICK[0],
    _one("one stream", BASE, _ALONE),
    _one("prompt of 2048", BASE, _PROMPT),
    *QUICK[1:],
    _hundred("n=100 round robin", None),
    _hundred("n=100 α=0.3", 0.3),
    _one("one stream, rank 64", MIXED, _ALONE, rank64=True),
    _one("prompt of 2048, rank 64", MIXED, _PROMPT, rank64=True),
    Case("seven modules, n=1", SEVEN, _ONE, peers=()),
    replace(_wave("seven modules, n=32", SEVEN, 32), peers=()),
    Case(
        "n=2000, each once from the store",
        MANY,
        Workload(2000, num_adapters=2000, at_once=48, inputs=(16, 16), outputs=(1, 1)),
        passes=1,
        warm_up=0,
        peers=(),
    ),
    _many("n=5", 5, 1.0),
    _many("n=100 resident", 100, 1.0),
    _many("n=2000 α=0.3", 2000, 0.3),
    _many("n=2000 uniform", 2000, 1.0),
)

# VeRA: as many adapters as rows, on q and v, and on q, k, v and o.
_VERA = {
    "q, v": EngineOptions(AdapterSet(32, (256,), ("q_proj", "v_proj"), method="vera"), kv_tokens=SHORT * 128),
    "q, k, v, o": EngineOptions(AdapterSet(32, (256,), method="vera"), kv_tokens=SHORT * 128),
}
VERA = (QUICK[0], *(replace(_wave(f"VeRA on {name}", engine, 32), peers=()) for name, engine in _VERA.items()))

# 200 adapters over 64 MiB of pool, requested uniformly after each has been requested once.
_DENSITY = {
    "LoRA r64": AdapterSet(200, (64,)),
    "LoRA r16": AdapterSet(200, (16,)),
    "VeRA r256": AdapterSet(200, (256,), method="vera"),
}


def _density(name: str, adapters: AdapterSet) -> tuple[Case, ...]:
    engine = EngineOptions(adapters, pool_for_adapters=64 << 20, kv_tokens=SHORT * 128, host_bytes=8 << 30)
    each = Workload(adapters.num, num_adapters=adapters.num, at_once=48, inputs=(16, 16), outputs=(1, 1))
    load = replace(_WAVE, num_requests=288, num_adapters=adapters.num, alpha=1.0, at_once=48)
    return (
        Case(f"{name}, each once", engine, each, passes=1, warm_up=0, peers=()),
        Case(f"{name}, uniform", engine, load, passes=2, peers=()),
    )


DENSITY = tuple(case for name, adapters in _DENSITY.items() for case in _density(name, adapters))


def gpu(counts: tuple[int, ...] = (5, 100, 400, 1000, 2000)) -> tuple[Case, ...]:
    """Llama-3-8B's shape: rank 16 on q, k, v, o (13.6 MB), 64 requests at once, 256 + 128 tokens; base and n adapters.

    The pool holds 400 of them beside 64 × 512 tokens of KV cache: some 10 GB.
    """
    adapters = AdapterSet(max(counts), ranks=(16,))
    engine = EngineOptions(adapters, pool_adapters=400, kv_tokens=64 * 512, host_bytes=32 << 30, max_num_seqs=64)
    wave = Workload(256, at_once=80, inputs=(256, 256), outputs=(128, 128))
    base = Case("base", replace(engine, adapters=None), wave, passes=2, peers=("vllm",))
    return (
        base,
        *(Case(f"n={n}", engine, replace(wave, num_adapters=n, alpha=1.0), passes=2, peers=("vllm",)) for n in counts),
    )


OVER_HTTP = ("http", "bases", "mixed")  # presets that all of loray's systems run, if none is named
PRESETS: Mapping[str, tuple[Case, ...]] = {
    "http": HTTP,
    "bases": _bases(),
    "mixed": _mixed(),
    "quick": QUICK,
    "acceptance": ACCEPTANCE,
    "vera": VERA,
    "density": DENSITY,
    "gpu": gpu(),
    "tiny": (Case("n=3", EngineOptions(AdapterSet(3, ranks=(4, 8))), Workload(6, num_adapters=3, at_once=3)),),
}
