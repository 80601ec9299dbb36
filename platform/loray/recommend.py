"""Which method suits a task: by the quality that was measured of each, and by what each costs.

Quality is quoted: nothing here predicts it. Costs depend on the base and the device.

Training costs are the plan (`loray.planning`) of a recipe with the method's defaults and one row per step. The pool's
density is computed with the engine's allocator. Serving costs are a lower bound, as in docs/guide/methods.md: the time
that adapters add to a decode step of the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel

from loray.bases.checkpoint import expected_shapes
from loray.bases.config import ModelConfig
from loray.engine.memory.adapter_layout import OF_INPUTS, AdapterShape, Matrix
from loray.engine.memory.blocks import BlockAllocator
from loray.engine.memory.limits import pool_geometry
from loray.errors import SpecError, UnsupportedError
from loray.methods import METHODS, method_of
from loray.planning.compute import estimate_time, plan_traffic
from loray.planning.devices import Device
from loray.planning.memory import plan_memory
from loray.planning.run import RunShape, count_base, count_trained, shape_of
from loray.spec import (
    DTYPE_BYTES,
    LINEAR_MODULES,
    AdapterSpec,
    LongLoraSpec,
    RopeScaling,
    ServeSpec,
    TrainSpec,
    VeraSpec,
    format_size,
)

GIB = 1 << 30
NUM_ROWS = 32  # rows of a decode step, each with another adapter
NUM_SERVED = 1000

_BF16 = DTYPE_BYTES["bfloat16"]
_MAX_BLOCKS = 256  # of the pool that is filled to count how many adapters fit
_SHARE_FOR_ADAPTERS = 0.5  # of the memory beside the weights; the rest is KV cache


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to the two questions.

    context_length  tokens of the longest row
    num_tasks       number of adapters
    """

    context_length: int
    num_tasks: int

    def __post_init__(self) -> None:
        # A row of one token has nothing to be trained on.
        for name, value, least in (("context length", self.context_length, 2), ("number of tasks", self.num_tasks, 1)):
            if value < least:
                raise SpecError(f"the {name} is {value}; it must be at least {least}")


@dataclass(frozen=True, slots=True)
class Quote:
    """A published comparison measured what a method scores on a task, from 0 to 100.

    method  as recipes name it
    spread  the largest distance of a seed from the mean; None: one run
    """

    source: str
    task: str
    method: str
    settings: str
    trained_parameters: int
    score: float
    spread: float | None = None


# huggingface/peft, method_comparison/MetaMathQA/results at commit 5d602fdbff04, runs of July 2026: Llama-3.2-3B in
# bfloat16, 5,000 steps of four rows of MetaMathQA, seed 0. Training all weights scores 47.2.
PEFT = "PEFT 0.19.2, Llama-3.2-3B"
_PEFT_TASK = "GSM8K, accuracy"
# docs/benchmarks/quality.md has the setting and the commit.
OURS = "loray, SmolLM2-135M"
QUOTES = (
    Quote(PEFT, _PEFT_TASK, "lora", "LoRA r32 on q, v", 9_175_040, 47.8),
    Quote(PEFT, _PEFT_TASK, "lora", "LoRA r10 on gate, up, down", 9_461_760, 49.4),
    Quote(PEFT, _PEFT_TASK, "lora", "rsLoRA r64 on q, v", 18_350_080, 51.3),
    Quote(PEFT, _PEFT_TASK, "dora", "DoRA r32 on q, v", 9_289_728, 46.9),
    Quote(PEFT, _PEFT_TASK, "vera", "VeRA r256 on q, v", 129_024, 35.4),
    Quote(PEFT, _PEFT_TASK, "miss", "MiSS r64 on q, v", 7_340_032, 48.7),
    Quote(PEFT, _PEFT_TASK, "ia3", "IA³ on all linear layers", 630_784, 45.5),
    Quote(PEFT, _PEFT_TASK, "road", "RoAd on q, v", 229_376, 38.5),
    Quote(OURS, "E2E, BLEU", "lora", "LoRA r16 on q, v", 921_600, 51.3, 4.1),
    Quote(OURS, "E2E, BLEU", "lora", "LoRA r16 on q, k, v, o", 1_843_200, 49.3, 2.3),
    Quote(OURS, "E2E, BLEU", "lora", "LoRA r16 on all linear layers", 4_884_480, 53.8, 0.8),
    Quote(OURS, "E2E, BLEU", "lora", "rsLoRA r16 on q, v", 921_600, 49.4, 3.2),
    Quote(OURS, "E2E, BLEU", "vera", "VeRA r256 on q, v", 38_400, 52.9, 2.0),
    Quote(OURS, "E2E, BLEU", "ia3", "IA³ on q, k, v, o", 46_080, 51.5, 2.4),
    Quote(OURS, "AG News, exact match", "lora", "LoRA r16 on q, v", 921_600, 66.3, 15.3),
    Quote(OURS, "AG News, exact match", "lora", "LoRA r16 on q, k, v, o", 1_843_200, 68.0, 3.4),
    Quote(OURS, "AG News, exact match", "lora", "LoRA r16 on all linear layers", 4_884_480, 72.4, 2.0),
    Quote(OURS, "AG News, exact match", "lora", "rsLoRA r16 on q, v", 921_600, 71.4, 6.1),
    Quote(OURS, "AG News, exact match", "vera", "VeRA r256 on q, v", 38_400, 68.7, 5.8),
    Quote(OURS, "AG News, exact match", "ia3", "IA³ on q, k, v, o", 46_080, 72.1, 1.7),
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """The costs of one method with its default settings.

    problem                 why it cannot be trained there; then the figures of training are None
    trained_parameters      adapter_bytes: as published, in bf16, an own embedding whole
    training_bytes          peak of one worker, over one row of the asked context; step_s: seconds of that step
    checkpointing           was needed to fit
    adapters_per_gib        of pool, beside VeRA's pair, which they share
    served_pool_bytes       of pool for 1,000 adapters at once; served_devices: how many that takes, where half of what
                            the base's weights leave is for adapters
    throughput              of the base's, in decode steps with 32 rows on 32 adapters, at most
    """

    method: str
    settings: str
    problem: str | None
    trained_parameters: int
    adapter_bytes: int
    training_bytes: int | None
    step_s: float | None
    tokens_per_s: float | None
    checkpointing: bool
    adapters_per_gib: float
    served_pool_bytes: int
    served_devices: int
    throughput: float


def estimate_methods(answers: Answers, model: ModelConfig, device: Device) -> list[Estimate]:
    """Estimate all methods; for a context longer than the base's also VeRA with LongLoRA's attention
    and RoPE.
    """
    return [_estimate(name, recipe, model, device) for name, recipe in candidates(answers.context_length, model)]


def recipe_of(
    adapter: BaseModel,
    context_length: int,
    *,
    rope_scaling: RopeScaling | None = None,
    attention: Literal["dense", "s2"] | None = None,
    checkpointing: bool = False,
) -> TrainSpec:
    """Return a recipe that trains `adapter` on one row of `context_length` a step. `attention` None: the method's."""
    return TrainSpec.model_validate(
        {
            "name": "estimate",
            "adapter": adapter.model_dump(),
            "rope_scaling": rope_scaling,
            **({} if attention is None else {"attention": {"type": attention}}),
            "data": {"train": "unused", "max_length": context_length},
            "batch": {"rows": 1},
            "optimizer": {"learning_rate": 1e-4},
            "max_steps": 1,
            "gradient_checkpointing": checkpointing,
        }
    )


def adapters_in(adapter: AdapterSpec, model: ModelConfig, pool_bytes: int) -> int:
    """Return the number of such adapters that the bf16 pool of an idle engine holds, together with VeRA's pair."""
    geometry = pool_geometry(ServeSpec(pool_bytes=pool_bytes), model)
    allocator = BlockAllocator(geometry)
    demand = adapter_shape(adapter, model).demand(geometry)
    pair = method_of(adapter).pair_elements(adapter, model)
    if pair and allocator.allocate_run(geometry.blocks_for_elements(pair)) is None:
        return 0
    number = 0
    while all(allocator.allocate_rows(kind, rows) is not None for kind, rows in demand.items()):
        number += 1
    return number


def adapter_shape(adapter: AdapterSpec, model: ModelConfig) -> AdapterShape:
    """Return the adapter's rows in the pool, with all rows of a trained embedding, since training may change any."""
    own: list[Matrix] = []
    for module, role, rows, width in method_of(adapter).matrices(adapter, model):
        for part, outputs in model.fused.get(module, {module: slice(0, width)}).items():
            own.append(Matrix(part, role, rows, width if role in OF_INPUTS else outputs.stop - outputs.start))
    flat: list[Matrix] = []
    if adapter.train_norms:
        layer = "model.layers.0."
        for path, (width, *_) in expected_shapes(replace(model, layers=model.layers[:1])).items():
            if path.startswith(layer) and path.endswith("norm.weight"):
                own.append(Matrix(path.removeprefix(layer).removesuffix(".weight"), "norm", 1, width))
        flat.append(Matrix("norm", "norm", 1, model.hidden_size))
    if adapter.train_embeddings:
        flat.append(Matrix("embed_tokens", "embedding", model.vocab_size, model.hidden_size))
    return AdapterShape.of(dict.fromkeys(range(model.num_layers), own), flat)


def candidates(context_length: int, model: ModelConfig) -> Iterator[tuple[str, TrainSpec]]:
    """Yield (method, a recipe of it with default settings) for each estimated method."""
    for method in METHODS.values():
        if method.name != "longlora":
            adapter: Any = method.spec.model_validate({})
            yield method.name, recipe_of(_with_whole_modules(adapter, model), context_length)
    window = model.max_position_embeddings
    original = min(window, max(1, context_length // 2))
    stretched = RopeScaling(factor=max(1.001, context_length / original), original_context=original)
    yield "longlora", recipe_of(LongLoraSpec(), context_length, rope_scaling=stretched)
    if context_length > window:
        both = recipe_of(VeraSpec(train_norms=True), context_length, rope_scaling=stretched, attention="s2")
        yield "vera + longlora", both


def _with_whole_modules(adapter: AdapterSpec, model: ModelConfig) -> AdapterSpec:
    """Add to the target modules the other parts of those that are one module on this base."""
    parts = {part: tuple(fused) for fused in model.fused.values() for part in fused}
    modules = dict.fromkeys(m for module in adapter.target_modules for m in parts.get(module, (module,)))
    return adapter.model_copy(update={"target_modules": tuple(modules)})


def _estimate(name: str, recipe: TrainSpec, model: ModelConfig, device: Device) -> Estimate:
    adapter, trained = recipe.adapter, count_trained(model, recipe.adapter)
    problem, run, training_bytes, time = None, None, None, None
    try:
        run, training_bytes = _fitting(recipe, model, device)
        time = estimate_time(run, device, plan_traffic(run))
        if training_bytes > device.usable_bytes:
            problem = "does not fit on one such device; see loray plan for several"
    except (SpecError, UnsupportedError) as e:
        problem = str(e)
    rank = method_of(adapter).rank(adapter)
    is_whole = set(adapter.target_modules) == set(LINEAR_MODULES)
    modules = "all linear" if is_whole else ", ".join(m.removesuffix("_proj") for m in adapter.target_modules)
    extras = " + norms" * adapter.train_norms + " + embeddings" * adapter.train_embeddings
    per_gib = _per_gib(adapter, model)
    served = int(NUM_SERVED / per_gib * GIB)
    left = device.usable_bytes - device.framework_bytes - count_base(model).total * _BF16
    return Estimate(
        method=name,
        settings=f"{f'r{rank} on ' if rank else ''}{modules}{extras}",
        problem=problem,
        trained_parameters=trained.total,
        adapter_bytes=trained.total * _BF16,
        training_bytes=training_bytes,
        step_s=None if time is None else time.step_s,
        tokens_per_s=None if time is None else time.tokens_per_s,
        checkpointing=run is not None and run.checkpointing,
        adapters_per_gib=per_gib,
        served_pool_bytes=served,
        served_devices=-(-served // max(1, int(left * _SHARE_FOR_ADAPTERS))),
        throughput=_throughput(adapter, model, device),
    )


def _fitting(recipe: TrainSpec, model: ModelConfig, device: Device) -> tuple[RunShape, int]:
    """The run, with checkpointing where it does not fit without, and the peak memory of a worker."""
    run = shape_of(recipe, model, dtype=device.training_dtype)
    if (peak := plan_memory(run, device).peak_bytes) > device.usable_bytes:
        run = replace(run, checkpointing=True)
        peak = plan_memory(run, device).peak_bytes
    return run, peak


def _per_gib(adapter: AdapterSpec, model: ModelConfig) -> float:
    """Counted in a pool of up to some hundred blocks, so that it is fast for any block size."""
    geometry = pool_geometry(ServeSpec(pool_bytes=GIB), model)
    block_bytes = geometry.block_size * _BF16
    pair = geometry.blocks_for_elements(method_of(adapter).pair_elements(adapter, model)) * block_bytes
    least = 32 * adapter_shape(adapter, model).num_blocks(geometry) * block_bytes
    room = max(least, min(GIB, _MAX_BLOCKS * block_bytes))
    return float(adapters_in(adapter, model, room + pair) * GIB / room)


def _throughput(adapter: AdapterSpec, model: ModelConfig, device: Device) -> float:
    rate = device.flops * device.matmul_share
    elements, layers, method = model.num_matrix_elements, model.num_layers, method_of(adapter)
    base = max(elements * _BF16 / device.bandwidth, 2.0 * NUM_ROWS * model.num_active_elements / rate)
    read = NUM_ROWS * count_trained(model, adapter).adapter + layers * method.pair_reads(adapter, model)
    computing = 2.0 * NUM_ROWS * method.factors(adapter, model) * layers / rate
    return float(base / (base + max(computing, read * _BF16 / device.bandwidth)))


@dataclass(frozen=True, slots=True)
class Recommendation:
    answers: Answers
    base: str
    device: str
    quotes: tuple[Quote, ...]
    estimates: tuple[Estimate, ...]
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON, in bytes, seconds, tokens and shares."""
        return asdict(self)


def recommend(answers: Answers, base: str, model: ModelConfig, device: Device) -> Recommendation:
    estimates = estimate_methods(answers, model, device)
    said = remarks(answers, estimates, model)
    return Recommendation(answers, base, device.name, QUOTES, tuple(estimates), tuple(said))


def remarks(answers: Answers, estimates: Sequence[Estimate], model: ModelConfig) -> Iterator[str]:
    yield (
        "methods combine: S-LoRA is how adapters are served, not how they are trained. The engine serves all methods "
        "and ranks in one batch, so VeRA trained and S-LoRA served is one choice, not two"
    )
    window, context = model.max_position_embeddings, answers.context_length
    if context > window:
        yield (
            f"the base reads {window:,} tokens: for {context:,} its RoPE must be scaled, which LongLoRA does and the "
            "other methods alone do not"
        )
    else:
        yield f"the base reads {window:,} tokens as it is: {context:,} need no LongLoRA, which saves attention alone"
    by_method = {estimate.method: estimate for estimate in estimates}
    lora, vera = by_method["lora"], by_method["vera"]
    if answers.num_tasks > 1:
        yield (
            f"{answers.num_tasks:,} adapters are {format_size(answers.num_tasks * lora.adapter_bytes)} as LoRA and "
            f"{format_size(answers.num_tasks * vera.adapter_bytes)} as VeRA; {NUM_SERVED:,} in the pool at once take "
            f"{format_size(lora.served_pool_bytes)} and {format_size(vera.served_pool_bytes)}, and a batch on "
            f"{NUM_ROWS} of them reaches at most {lora.throughput:.0%} and {vera.throughput:.0%} of the base's speed"
        )
