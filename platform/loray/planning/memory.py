"""A worker's memory, item by item, at the moments of a step at which it can peak.

Each item is in memory at some of the moments; the peak of the plan is the moment with the largest sum. Weights,
gradients and optimizer states are replicated or sharded (Rajbhandari et al., *ZeRO*, 2020).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from loray.planning import activations
from loray.planning.counts import count_vera_pair
from loray.planning.devices import Device
from loray.planning.exchange.dense import DensePlan
from loray.planning.run import Run
from loray.spec import DTYPE_BYTES, LINEAR_MODULES, DoraSpec

Moment = Literal["loss", "backward", "gradients", "update"]
WHAT: dict[Moment, str] = {
    "loss": "end of the forward pass",
    "backward": "that of the last layer, which comes first",
    "gradients": "end of the backward pass",
    "update": "AdamW",
}
MOMENTS: tuple[Moment, ...] = tuple(WHAT)

CHECKPOINT = "a checkpoint, as rank 0 writes it"  # in the host's memory, while steps go on
GRADIENT_BUCKET_BYTES = 25 << 20  # fp32 gradients that are reduced together: 25 MiB, as in torch's DDP

_FP32 = DTYPE_BYTES["float32"]
_DEEPSPEED_LIVE = 1_000_000_000  # elements: stage3_max_live_parameters
_DEEPSPEED_PREFETCH = 50_000_000  # elements: stage3_prefetch_bucket_size
_FSDP_LAYERS = 3  # the current layer, the next one, and the flat buffer that the next one is gathered in


@dataclass(frozen=True, slots=True)
class Item:
    """`block` are the bytes of the item's largest tensor."""

    name: str
    nbytes: int
    moments: tuple[Moment, ...] = MOMENTS
    block: int = 0


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    items: tuple[Item, ...]

    def at(self, moment: Moment) -> int:
        return sum(item.nbytes for item in self.items if moment in item.moments)

    @property
    def peak_moment(self) -> Moment:
        return max(MOMENTS, key=self.at)

    @property
    def peak_bytes(self) -> int:
        return self.at(self.peak_moment)

    @property
    def dominant(self) -> Item:
        """The largest item at the peak."""
        return max((i for i in self.items if self.peak_moment in i.moments), key=lambda item: item.nbytes)


def plan_memory(run: Run, device: Device) -> MemoryPlan:
    items = [*_weights(run), *_optimizer(run, device), *_communication(run), *_activations(run), *_loss(run, device)]
    passing = [item for item in items if item.moments != MOMENTS]
    kept = [_after_freeing(item, device) for item in items if item.nbytes]
    return MemoryPlan((*kept, *_fragments(passing, device), Item("framework", device.framework_bytes)))


def _after_freeing(item: Item, device: Device) -> Item:
    """The item counts at every moment where the allocator keeps its freed blocks."""
    return replace(item, moments=MOMENTS) if 0 < item.block < device.keeps_freed_below else item


def _fragments(passing: list[Item], device: Device) -> Iterator[Item]:
    """Free memory between blocks, as a share of the most that the step's own items take."""
    most = max(sum(item.nbytes for item in passing if moment in item.moments) for moment in MOMENTS)
    yield Item("fragmentation", int(device.fragmentation * most))


def _weights(run: Run) -> Iterator[Item]:
    """Trained embeddings do not replace the base's: a tied output head keeps them, and without one they show which
    rows training changed.
    """
    e, trained = run.element_bytes, run.trained
    rows = 0 if run.model.tie_word_embeddings else trained.embedding
    pair = count_vera_pair(run.model, run.adapter)
    pair_bytes = pair * (_FP32 if e == _FP32 else _FP32 + e)  # in fp32, and in the base's dtype
    yield Item("base weights", _share(run.base_bytes - e * (trained.norms + rows), run.weight_shards))
    yield Item("base's embedding rows, to compare", e * rows)
    yield Item("VeRA's pair", pair_bytes)
    yield Item("trained parameters", _share(e * trained.total, run.weight_shards))


def _optimizer(run: Run, device: Device) -> Iterator[Item]:
    trained, shards = run.trained, run.optimizer_shards
    masters = 0 if run.dtype == "float32" and run.strategy == "ddp" else trained.total
    yield Item("gradients, fp32", _share(_FP32 * trained.total, shards))
    yield Item("master weights, fp32", _share(_FP32 * masters, shards))
    yield Item("AdamW moments, fp32", _share(2 * _FP32 * trained.total, shards))
    updated = trained.total if device.foreach_optimizer else 2 * trained.largest
    yield Item("AdamW temporaries", _share(_FP32 * updated, shards), ("update",), _FP32 * trained.largest)
    if device.is_host:
        yield Item(CHECKPOINT, run.checkpoint_bytes)


def gathered_weights(run: Run) -> int:
    """Bytes of the base's weights that fsdp2 has gathered at once."""
    base = run.base
    return run.element_bytes * (_FSDP_LAYERS * base.layer + base.embedding + base.head + base.final_norm)


def _communication(run: Run) -> Iterator[Item]:
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


def _activations(run: Run) -> Iterator[Item]:
    tokens, layers = run.tokens_per_worker, run.model.num_layers
    kept = activations.of_layer(run)
    rope = 2 * run.element_bytes * run.model.head_dim
    alive: tuple[Moment, ...] = ("loss", "backward")
    if run.checkpointing:
        per_token = activations.layer_input(run)
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
        yield Item("a matrix, dequantised", matrix, ("backward",), matrix)
    if isinstance(run.adapter, DoraSpec):  # B A of a unit matrix, W + s B A, and what comes between
        shapes = (run.model.module_shape(module) for module in run.adapter.target_modules)
        largest = run.element_bytes * max(out * width for out, width in shapes)
        yield Item("W + s B A of a module", 4 * largest, ("backward",) if run.checkpointing else (), largest)
    gradients = activations.layer_gradients(run)
    yield Item(gradients.name, gradients.nbytes * tokens, ("backward",), gradients.block * tokens)
    yield Item("RoPE's cosines and sines", rope * tokens, alive, rope * tokens // 2)
    if (shared := run.shared_dense) is not None:
        yield from _shared_dense(run, shared)
    elif run.sequence > 1:
        yield from _halo(run, alive)


def _halo(run: Run, alive: tuple[Moment, ...]) -> Iterator[Item]:
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


def _shared_dense(run: Run, plan: DensePlan) -> Iterator[Item]:
    """The buffers of one layer's backward pass. Autograd keeps what it keeps on one worker, and with ulysses the keys
    and values that several ranks hold.

    ulysses  gradients of q, k and v as they are sent, received and put together
    ring     keys and values held and received, their gradients sent and received, and fp32 sums of the gradients of
             keys and values (of one block and of all) and of queries
    """
    width = run.tokens_per_worker * run.model.head_dim
    e, heads, kv_heads = run.element_bytes, plan.num_heads, plan.num_kv_heads
    if plan.exchange == "ring":
        kv = 2 * kv_heads * width
        yield Item("ring: keys, values and gradients", (4 * e + 2 * _FP32) * kv, ("backward",), _FP32 * kv)
        yield Item("ring: gradients of queries", (_FP32 + e) * heads * width, ("backward",), _FP32 * heads * width)
        return
    held = max(len(plan.kv_heads(rank)) for rank in range(plan.num_ranks)) * plan.num_ranks
    part = e * (heads + 2 * held) * width
    yield Item("ulysses: gradients of q, k and v", 3 * part, ("backward",), part)
    more = e * 2 * (held - kv_heads) * width
    if run.checkpointing:
        yield Item("one layer, recomputed: key-value heads of several ranks", more, ("backward",), more // 2)
    else:
        yield Item(
            "activations: key-value heads of several ranks",
            more * run.model.num_layers,
            ("loss", "backward"),
            more // 2,
        )


def _loss(run: Run, device: Device) -> Iterator[Item]:
    """The final norm's fp32 copy; hidden states, those with a label, and their gradients; one chunk of logits in fp32
    and its exponentials.
    """
    tokens, row = run.tokens_per_worker, activations.layer_input(run)
    nbytes = (_FP32 * run.model.hidden_size + 3 * row) * tokens
    yield Item("hidden states and their gradients", nbytes, ("loss", "backward"), row * tokens)
    chunk = min(device.loss_chunk, tokens * run.model.vocab_size)
    yield Item("a chunk of logits", 2 * _FP32 * chunk, ("loss",), _FP32 * chunk)


def _share(nbytes: int, shards: int) -> int:
    return -(-nbytes // shards)
