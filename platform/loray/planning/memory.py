"""Memory of a run, item by item: of a worker's device, in a step and while it measures, and of a node beside it.

Each item is in memory at some of the moments; the peak of the plan is the moment with the largest sum. Weights,
gradients and optimizer states are replicated or sharded (Rajbhandari et al., *ZeRO*, 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from loray.methods import method_of
from loray.methods.base import SavedTensors
from loray.planning.devices import Device
from loray.planning.run import SHARDS_WEIGHTS, RunShape
from loray.planning.sequence import DensePlan
from loray.spec import DTYPE_BYTES, LINEAR_MODULES, MLP_MODULES, TrainSpec

_FP32 = DTYPE_BYTES["float32"]

WHAT = {
    "loss": "end of the forward pass",
    "backward": "that of the last layer, which comes first",
    "gradients": "end of the backward pass",
    "update": "AdamW",
}
MOMENTS = tuple(WHAT)

CHECKPOINT = "a checkpoint, as rank 0 writes it"  # in the host's memory, while steps go on
GRADIENT_BUCKET_BYTES = 25 << 20  # fp32 gradients that are reduced together: 25 MiB, as in torch's DDP

_DEEPSPEED_LIVE = 1_000_000_000  # elements: stage3_max_live_parameters
_DEEPSPEED_PREFETCH = 50_000_000  # elements: stage3_prefetch_bucket_size
_FSDP_LAYERS = 3  # the current layer, the next one, and the flat buffer that the next one is gathered in


@dataclass(frozen=True, slots=True)
class Item:
    """An item is in memory at some moments. `block` are the bytes of its largest tensor."""

    name: str
    nbytes: int
    moments: tuple[str, ...] = MOMENTS
    block: int = 0


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of a worker's device in a step, or of a node, at each of the moments."""

    items: tuple[Item, ...]
    moments: tuple[str, ...] = MOMENTS

    def at(self, moment: str) -> int:
        return sum(item.nbytes for item in self.items if moment in item.moments)

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=self.at)

    @property
    def peak_bytes(self) -> int:
        return self.at(self.peak_moment)

    @property
    def dominant(self) -> Item:
        """The largest item at the peak."""
        return max((i for i in self.items if self.peak_moment in i.moments), key=lambda item: item.nbytes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "moments": {moment: self.at(moment) for moment in self.moments},
            "peak_moment": self.peak_moment,
            "peak_bytes": self.peak_bytes,
            "dominant": self.dominant.name,
        }


def plan_memory(run: RunShape, device: Device) -> MemoryPlan:
    """Plan the memory of one worker's device in a step."""
    items = [*_weights(run), *_optimizer(run, device), *_communication(run)]
    return with_overheads([*items, *passing_items(run, device)], device)


def with_overheads(items: Iterable[Item], device: Device) -> MemoryPlan:
    """Add what the device's allocator keeps and loses, and its libraries."""
    items = tuple(items)
    passing = MemoryPlan(tuple(item for item in items if item.moments != MOMENTS))
    # An item counts at every moment where the allocator keeps its freed blocks.
    kept = [replace(i, moments=MOMENTS) if 0 < i.block < device.keeps_freed_below else i for i in items if i.nbytes]
    fragments = Item("fragmentation", int(device.fragmentation * passing.peak_bytes))
    return MemoryPlan((*kept, fragments, Item("framework", device.framework_bytes)))


def _weights(run: RunShape) -> Iterator[Item]:
    """Trained embeddings do not replace the base's: a tied output head keeps them, and without one they show which
    rows training changed.
    """
    e, trained = run.element_bytes, run.trained
    rows = 0 if run.model.tie_word_embeddings else trained.embedding
    pair = method_of(run.adapter).pair_elements(run.adapter, run.model)
    pair_bytes = pair * (_FP32 if e == _FP32 else _FP32 + e)  # in fp32, and in the base's dtype
    yield Item("base weights", _share(run.base_bytes - e * (trained.norms + rows), run.weight_shards))
    yield Item("base's embedding rows, to compare", e * rows)
    yield Item("VeRA's pair", pair_bytes)
    yield Item("initial A and B", e * run.model.num_layers * method_of(run.adapter).frozen(run.adapter, run.model))
    yield Item("trained parameters", _share(e * trained.total, run.weight_shards))


def _optimizer(run: RunShape, device: Device) -> Iterator[Item]:
    trained, shards = run.trained, run.optimizer_shards
    masters = 0 if run.dtype == "float32" and run.strategy == "ddp" else trained.total
    yield Item("gradients, fp32", _share(_FP32 * trained.total, shards))
    yield Item("master weights, fp32", _share(_FP32 * masters, shards))
    yield Item("AdamW moments, fp32", _share(2 * _FP32 * trained.total, shards))
    updated = trained.total if device.foreach_optimizer else 2 * trained.largest
    yield Item("AdamW temporaries", _share(_FP32 * updated, shards), ("update",), _FP32 * trained.largest)
    if device.is_host:
        yield Item(CHECKPOINT, run.checkpoint_bytes)


def gathered_weights(run: RunShape) -> int:
    """Count the bytes of the base's weights that fsdp2 has gathered at once."""
    base = run.base
    return run.element_bytes * (_FSDP_LAYERS * base.layer + base.embedding + base.head + base.final_norm)


def _communication(run: RunShape) -> Iterator[Item]:
    """Gradients that are being reduced, and gathered weights."""
    e, base, trained = run.element_bytes, run.base, run.trained
    if run.strategy == "ddp":
        yield Item("largest gradient, to be added", e * trained.largest, ("gradients",), e * trained.largest)
        return
    largest = (e + _FP32) * trained.largest
    yield Item("largest gradient, to be scattered in fp32", largest, ("gradients",), _FP32 * trained.largest)
    match run.strategy:
        case "fsdp2":
            yield Item("gathered weights", gathered_weights(run))
            if run.accumulation > 1:  # scattered after the last micro-batch
                yield Item("gradients of earlier micro-batches, fp32", _FP32 * trained.total)
        case "zero3":
            live = min(base.total + trained.total, _DEEPSPEED_LIVE + _DEEPSPEED_PREFETCH)
            yield Item("gathered weights", e * (live + min(live, _DEEPSPEED_PREFETCH)))  # shards are copied together
            yield Item("gradient bucket", GRADIENT_BUCKET_BYTES)
        case _:
            yield Item("gradient bucket", GRADIENT_BUCKET_BYTES)


def passing_items(run: RunShape, device: Device, adapter: SavedTensors | None = None) -> Iterator[Item]:
    """Plan what a micro-batch takes in its passes. `adapter` is what autograd keeps of a layer for adapters; None: what
    it keeps for the run's.
    """
    yield from _activations(run, device, adapter)
    yield from _loss(run, device)


def _activations(run: RunShape, device: Device, adapter: SavedTensors | None) -> Iterator[Item]:
    tokens, layers = run.tokens_per_worker, run.model.num_layers
    kept = saved_by_layer(run, on_gpu=not device.is_host, adapter=adapter)
    rope = 2 * run.element_bytes * run.model.head_dim
    alive: tuple[str, ...] = ("loss", "backward")
    if run.checkpointing:
        per_token = layer_input(run)
        yield Item("layer inputs", per_token * tokens * layers, alive, per_token * tokens)
        for part in kept:
            name = f"one layer, recomputed: {part.name}"
            yield Item(name, part.nbytes * tokens, ("backward",), part.block * tokens)
    else:
        for part in kept:
            yield Item(f"activations: {part.name}", part.nbytes * tokens * layers, alive, part.block * tokens)
    if run.quantization is not None:
        shapes = (run.model.module_shape(module) for module in LINEAR_MODULES)
        matrix = run.element_bytes * max(out * width for out, width in shapes)
        yield Item("a matrix, dequantized", matrix, ("backward",), matrix)
    if (experts := run.model.experts) is not None and {*MLP_MODULES} & {*run.adapter.target_modules}:
        matrices = sum(math.prod(run.model.module_shape(m)) for m in MLP_MODULES if m in run.adapter.target_modules)
        changed = run.element_bytes * experts.num * matrices
        yield Item("experts with the adapter in them", changed * (1 if run.checkpointing else layers), alive, changed)
    gradients = layer_gradients(run)
    yield Item(gradients.name, gradients.nbytes * tokens, ("backward",), gradients.block * tokens)
    yield Item("RoPE's cosines and sines", rope * tokens, alive, rope * tokens // 2)
    windows = [layer.window for layer in run.model.layers if layer.window is not None]
    if run.model.attention_soft_cap is not None or any(window < run.row_length for window in windows):
        mask = run.num_sequences * run.padded_length**2
        yield Item("masks of attention with a window or a soft cap", mask, alive, mask)
    if (shared := run.shared_dense) is not None:
        yield from _shared_dense(run, shared)
    elif run.sequence > 1:
        yield from _halo(run, alive)


def _halo(run: RunShape, alive: tuple[str, ...]) -> Iterator[Item]:
    """The halo of every layer is kept until the backward pass, also with checkpointing, whose recomputation uses it.

    The kernel gets the halo in front of the keys of its segment, and as many queries of zeros.
    """
    plan, e, layers = run.halo, run.element_bytes * run.num_sequences, run.model.num_layers
    assert plan is not None, "dense attention has no halo"
    head_dim, ranks = run.model.head_dim, range(plan.num_ranks)
    halo = e * max(plan.elements_received(rank, head_dim) for rank in ranks)
    queries = (sum(plan.halo(r, half).num_tokens * len(half.query_heads) for half in plan.halves) for r in ranks)
    padded = 2 * e * head_dim * max(queries)
    yield Item("halos", halo * layers, alive, halo)
    if run.checkpointing:
        yield Item("one layer, recomputed: attention over its halo", halo + padded, ("backward",), padded)
    else:
        yield Item("activations: attention over halos", (halo + padded) * layers, alive, padded)


def _shared_dense(run: RunShape, plan: DensePlan) -> Iterator[Item]:
    """The gradients of q, k and v of one layer, as they are sent, received and put together; and what the worker with
    most heads holds beyond an equal share of them: queries and outputs where workers do not divide the heads, keys and
    values that serve several workers.
    """
    width = run.tokens_per_worker * run.model.head_dim
    e, heads = run.element_bytes, plan.most_heads * plan.num_ranks
    kv_heads = max(len(plan.kv_heads(rank)) for rank in range(plan.num_ranks)) * plan.num_ranks
    part = e * (heads + 2 * kv_heads) * width
    yield Item("ulysses: gradients of q, k and v", 3 * part, ("backward",), part)
    more = e * 2 * (heads - plan.num_heads + kv_heads - plan.num_kv_heads) * width
    if run.checkpointing:
        yield Item("one layer, recomputed: heads beyond an equal share", more, ("backward",), more // 2)
    else:
        layers = run.model.num_layers
        yield Item("activations: heads beyond an equal share", more * layers, ("loss", "backward"), more // 2)


def _loss(run: RunShape, device: Device) -> Iterator[Item]:
    """The final norm's fp32 copy; hidden states, those with a label, and their gradients; one chunk of logits in fp32
    and its exponentials.
    """
    tokens, row = run.tokens_per_worker, layer_input(run)
    nbytes = (_FP32 * run.model.hidden_size + 3 * row) * tokens
    yield Item("hidden states and their gradients", nbytes, ("loss", "backward"), row * tokens)
    chunk = min(device.loss_chunk, tokens * run.model.vocab_size)
    yield Item("a chunk of logits", 2 * _FP32 * chunk, ("loss",), _FP32 * chunk)


def _share(nbytes: int, shards: int) -> int:
    return -(-nbytes // shards)


# -- what autograd keeps of a layer -----------------------------------------------------------------------------------
#
# Base weights are frozen, so their linear layers keep no input. Autograd keeps the fp32 copies that RMSNorms compute
# with, the inputs of LoRA modules (once for modules with the same input), the queries, keys, values and output of the
# attention kernel, and the operands of SiLU and of the product of gate and up. Nothing is quadratic in the row
# length, but for attention with a soft cap, and a mask where layers have a window.


def saved_by_layer(
    run: RunShape, *, on_gpu: bool = False, adapter: SavedTensors | None = None
) -> tuple[SavedTensors, ...]:
    """List what autograd keeps of a layer for its backward pass; `adapter` None: for the run's adapter.

    A GPU's kernel keeps its output. Where the two halves of the heads are joined, or padding is set to 0, the next
    module keeps another tensor of that size.
    """
    model, e, is_shared = run.model, run.element_bytes, run.sequence > 1
    adapter = adapter or method_of(run.adapter).saved(run.adapter, model, element_bytes=e, is_shared=is_shared)
    # x in fp32 (for its square and for the product with 1/rms), 1/rms, and the operand of a trained weight.
    widths = [(1, model.hidden_size)] * model.layers[0].num_norms
    widths += [(model.num_heads + model.num_kv_heads, model.head_dim)] if model.layers[0].qk_norm else []
    trained = e if run.adapter.train_norms else 0
    norms = sum(count * (_FP32 * (width + 1) + trained * width) for count, width in widths)
    # q, k, v after RoPE, the output, and the log-sum-exp of every softmax in fp32.
    q, kv = e * model.num_heads * model.head_dim, e * model.num_kv_heads * model.head_dim
    is_copied = on_gpu and not is_shared and (run.group_size is not None or run.num_sequences > 1)
    is_copied = is_copied and "o_proj" in run.adapter.target_modules
    attention = 2 * (q + kv) + _FP32 * model.num_heads + is_copied * q
    if model.attention_soft_cap is not None or model.layers[0].has_sinks:
        # Op by op: capped scores, weights in fp32, and again in the dtype.
        attention += model.num_heads * run.padded_length * (2 * e + _FP32)
    mlp = e * model.num_active_mlps * model.intermediate_size  # of each of gate, silu(gate) and up
    # Of experts also their results, which shares multiply, and what the router computes in fp32.
    routed = 0
    if model.experts is not None:
        routed = e * model.num_active_mlps * model.hidden_size + 2 * _FP32 * model.experts.num
    kept = (
        SavedTensors("norms", norms, _FP32 * model.hidden_size),
        SavedTensors("attention", attention, q),
        adapter,
        SavedTensors("mlp", 3 * mlp + routed, mlp),
    )
    return tuple(part for part in kept if part.nbytes)


def layer_input(run: RunShape) -> int:
    """Count the bytes per token of a layer's input. Checkpointing keeps nothing else of the layer until its backward
    pass.
    """
    return run.element_bytes * run.model.hidden_size


def layer_gradients(run: RunShape) -> SavedTensors:
    """Count the gradients of activations that exist at once in a layer's backward pass, at most: those of up,
    silu(gate), their product, the residual stream and the layer's output; of experts also their inputs and results.
    """
    model, hidden = run.model, layer_input(run)
    width = run.element_bytes * model.num_active_mlps * model.intermediate_size
    routed = 0 if model.experts is None else 2 * model.num_active_mlps * hidden
    return SavedTensors("gradients of activations", 3 * width + 2 * hidden + routed, width)


# -- measuring --------------------------------------------------------------------------------------------------------

MEASURED_AT_ONCE = 4096  # tokens of short windows that share a pass


def num_shards(spec: TrainSpec | RunShape) -> int:
    """Count the workers over which the weights of a measured model are spread. A base that training quantizes is
    measured as it is served, in four times the memory, which one worker need not have.
    """
    strategy = spec.strategy if isinstance(spec, RunShape) else spec.parallel.strategy
    return spec.num_workers if strategy in SHARDS_WEIGHTS or spec.quantization is not None else 1


def measuring_bytes(run: RunShape, device: Device) -> int:
    """Compute the peak of a worker in its longest pass; 0 where the recipe measures nothing.

    Of a layer there are at once its input in two dtypes, queries, keys, values and output of attention, and gate, up
    and their product; then the hidden states twice, and a chunk of logits.
    """
    if run.measured_length is None:
        return 0
    e, model, shards = run.element_bytes, run.model, num_shards(run)
    weights = -(-e * (run.base.total + run.trained.total) // shards)
    if shards > 1:
        weights += gathered_weights(run)
    tokens = -(-max(MEASURED_AT_ONCE, run.measured_length) // run.sequence)
    heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    mlp = 3 * model.intermediate_size + (0 if model.experts is None else 2 * model.hidden_size)
    layer = (2 * e + _FP32) * model.hidden_size + e * max(heads, model.num_active_mlps * mlp)
    logits = 2 * _FP32 * min(device.loss_chunk, tokens * model.vocab_size)
    passing = tokens * layer + logits
    return weights + passing + int(device.fragmentation * passing) + device.framework_bytes


# -- a node beside its GPUs -------------------------------------------------------------------------------------------
#
# Where workers have no GPUs, a worker's own memory is the host's, and this adds nothing. Files that are mapped (the
# base, tokens, the optimizer's state of a checkpoint) are not counted: the system drops their pages when it needs them.

HOST_MOMENTS = ("loading", "training", "publishing")

_TOKENISED_BYTES = 64 * (8 << 20)  # parts of data files that the driver has given to tasks
_BATCH_BYTES = 4 * 8  # of a token: id, label, position and mask, as 64-bit integers


@dataclass(frozen=True, slots=True)
class HostPlan(MemoryPlan):
    """The memory of a node. `usable_bytes` is None where nothing is known of it."""

    num_workers: int = 1
    usable_bytes: int | None = None

    @property
    def fits(self) -> bool:
        return self.usable_bytes is None or self.peak_bytes <= self.usable_bytes


def plan_host(run: RunShape, device: Device) -> HostPlan | None:
    """Plan the node with the driver and rank 0, which holds most. None where workers compute in the host's memory."""
    if device.is_host:
        return None
    num_workers = min(run.num_workers, device.workers_per_node)
    items = (
        Item("processes of workers and driver", (num_workers + 1) * device.process_bytes, HOST_MOMENTS),
        *_host_base(run, num_workers),
        *_host_data(run, num_workers),
        Item(CHECKPOINT, run.checkpoint_bytes, ("training",)),
    )
    usable = None if device.host_memory_bytes is None else int(device.host_memory_bytes * device.usable_share)
    return HostPlan(tuple(item for item in items if item.nbytes), HOST_MOMENTS, num_workers, usable)


def _host_base(run: RunShape, num_workers: int) -> Iterator[Item]:
    """Strategies that shard the base read it tensor by tensor, and so does one that is quantized; the others build it
    whole. What is whole then moves to the device.
    """
    e, model = run.element_bytes, run.model
    shapes = [(model.vocab_size, model.hidden_size), *(model.module_shape(module) for module in LINEAR_MODULES)]
    largest = max(out * width for out, width in shapes)
    if model.experts is not None:  # gate and up of all of a layer's are one tensor
        largest = max(largest, 2 * model.experts.num * model.intermediate_size * model.hidden_size)
    if run.weight_shards > 1 or run.quantization is not None:
        yield Item("a tensor of the base, as each worker reads it", num_workers * e * largest, ("loading",))
    if run.weight_shards == 1:
        yield Item("the base, as each worker reads it", num_workers * run.base_bytes, ("loading",))
    rows = 0 if model.tie_word_embeddings else run.trained.embedding
    trained = e * (run.trained.total + rows)
    yield Item("trained parameters, before they move", num_workers * trained, ("loading",))
    if run.measured_length is None:
        return
    if num_shards(run) > 1:
        yield Item("a tensor of the base, to be measured", num_workers * e * largest, ("publishing",))
    else:
        yield Item("the base, to be measured", num_workers * e * run.base.total, ("publishing",))


def _host_data(run: RunShape, num_workers: int) -> Iterator[Item]:
    """The tokens of training data are mapped files."""
    yield Item("parts of the data, while they are tokenised", _TOKENISED_BYTES, ("loading",))
    tokens = run.accumulation * run.num_sequences * run.padded_length
    yield Item("a step's batches", num_workers * _BATCH_BYTES * tokens, ("training",))
