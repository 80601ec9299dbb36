"""FLOPs, traffic and time of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from loray.bases.config import ModelConfig
from loray.errors import SpecError
from loray.methods import method_of
from loray.methods.base import shapes
from loray.planning.devices import Device
from loray.planning.run import RunShape, count_quantized, halo_plan
from loray.planning.sequence import ring_elements, ulysses_elements
from loray.recipes.resolve import quarter
from loray.spec import AdapterSpec

# Products of attention's backward pass per product of its forward pass: two products have four gradients, and flash
# attention computes the scores once more.
ATTENTION_GRADIENTS = 2.0
ATTENTION_BACKWARD = ATTENTION_GRADIENTS + 0.5
# Bytes per element that eager modules read and write. Each operation reads and writes its whole tensor once.
_LOSS_FP32_PASSES = 48  # to fp32, maximum, difference, exponential, sum, softmax in place (twice), scatter, from fp32
_ADAMW_BYTES = 80  # gradient, master, moments and two temporaries

# -- traffic ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExchangeVolume:
    """The exchange of one layer's forward pass over a micro-batch of rows of N = `num_tokens`, for P = `sequence` and
    G = `group_size`; to compare, also that of dense attention by Ulysses and by a ring.

    halo_bytes  bytes that the rank sends that sends most; the backward pass sends as many back
    num_hops    distance to the furthest receiver: 1 for the next rank
    """

    num_tokens: int
    sequence: int
    group_size: int
    num_hops: int
    halo_bytes: int
    ulysses_bytes: int
    ring_bytes: int


@dataclass(frozen=True, slots=True)
class TrafficPlan:
    """Bytes that one worker sends in one optimizer step. `exchange` is None where rows are not split, or attention is
    dense.

    halo_bytes      keys and values in the forward pass and gradients in the backward pass, of all layers and
                    micro-batches
    dense_bytes     what dense attention exchanges over a sequence group, in both passes and in recomputation
    gradient_bytes  reduction of gradients over all workers, and where they are sharded the gather of the updated
                    parameters
    gather_bytes    weights, which are gathered for each use
    """

    exchange: ExchangeVolume | None
    halo_bytes: int
    dense_bytes: int
    gradient_bytes: int
    gather_bytes: int


def exchange(run: RunShape, sequence: int, group_size: int) -> ExchangeVolume:
    """Compute the exchange for P = `sequence` and G = `group_size`. Raises SpecError where P does not divide N."""
    plan = halo_plan(run.model, run.padded_length, sequence, group_size)
    model, e = run.model, run.element_bytes * run.num_sequences
    shape = (plan.num_tokens, sequence)
    return ExchangeVolume(
        num_tokens=plan.num_tokens,
        sequence=sequence,
        group_size=group_size,
        num_hops=plan.num_hops,
        halo_bytes=max(plan.elements_sent(rank, model.head_dim) for rank in range(sequence)) * e,
        ulysses_bytes=ulysses_elements(*shape, model.num_heads, model.num_kv_heads, model.head_dim) * e,
        ring_bytes=ring_elements(*shape, model.num_kv_heads, model.head_dim) * e,
    )


def exchanges(run: RunShape, group_sizes: Sequence[int], largest: int = 32) -> list[list[ExchangeVolume]]:
    """List, for each P = 2, 4, … up to `largest` that divides N, the exchange for each group size."""
    rows = []
    for power in range(1, largest.bit_length()):
        try:
            rows.append([exchange(run, 1 << power, group_size) for group_size in group_sizes])
        except SpecError:
            break
    return rows


def group_sizes(run: RunShape) -> list[int]:
    """List the G of the run, a quarter of the row, and at most 8192, without repetition."""
    fixed = min(8192, quarter(run.row_length))
    return list(dict.fromkeys([run.group_size or fixed, quarter(run.row_length), fixed]))


def plan_traffic(run: RunShape) -> TrafficPlan:
    """Count what one worker sends in a step."""
    trained, e = run.trained.total, run.element_bytes
    share = (run.num_workers - 1) / run.num_workers
    mine = exchange(run, run.sequence, run.group_size) if run.sequence > 1 and run.group_size else None
    halo_bytes = 0
    if mine is not None and (plan := run.halo) is not None:
        width, ranks = run.model.head_dim, range(plan.num_ranks)
        # In both passes; recomputation uses kept halos.
        most = max(plan.elements_sent(rank, width) + plan.elements_received(rank, width) for rank in ranks)
        halo_bytes = most * e * run.num_sequences * run.model.num_layers * run.accumulation
    weights = e * (run.base.total + trained) if run.weight_shards > 1 else 0
    match run.strategy:
        case "ddp":
            gradient_bytes = 2 * share * 4 * trained
        case "zero2":
            gradient_bytes = share * (4 + e) * trained
        case _:
            gradient_bytes = share * 4 * trained
    gather_bytes = int((2 + run.extra_forwards) * share * weights * run.accumulation)
    return TrafficPlan(mine, halo_bytes, _dense_bytes(run), int(gradient_bytes), gather_bytes)


def _dense_bytes(run: RunShape) -> int:
    """The bytes of the rank that sends most."""
    if (plan := run.shared_dense) is None:
        return 0
    head_dim, forward_passes = run.model.head_dim, 1 + run.checkpointing
    most = max(
        forward_passes * plan.forward_elements(rank, head_dim) + plan.backward_elements(rank, head_dim)
        for rank in range(plan.num_ranks)
    )
    return most * run.element_bytes * run.num_sequences * run.model.num_layers * run.accumulation


# -- FLOPs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of one worker in one optimizer step. `forward` and `backward` exclude the recomputation.

    reference        forward pass of a step's rows through what preferences are compared with. It is made once for each
                     row, before the first step, and is not part of `total`
    attention        S2-Attn or dense attention of the run, in one forward pass
    dense_attention  dense causal attention over the same rows, in the forward pass
    """

    forward: float
    backward: float
    recompute: float
    attention: float
    dense_attention: float
    reference: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recompute


def attention_pairs(num_tokens: int, group_size: int | None, num_heads: int) -> int:
    """Count (query i, key j) pairs with i ≥ j inside a segment, summed over the segments and heads of one row."""
    if group_size is None:
        return num_heads * _causal(num_tokens)
    plain, middle = num_heads // 2, min(group_size // 2, num_tokens)
    cut = _grouped(num_tokens, group_size)
    shifted = _causal(middle) + _grouped(num_tokens - middle, group_size)
    return plain * cut + (num_heads - plain) * shifted


class _Products(NamedTuple):
    """FLOPs of the forward pass by kind of product."""

    linears: float
    head: float
    adapter: float
    attention: float


def _products(
    model: ModelConfig, adapter: AdapterSpec, *, num_tokens: float, num_targets: float, num_pairs: float
) -> _Products:
    """A matrix of n elements takes 2n FLOPs per token; a (query, key) pair takes 4 · head_dim per layer."""
    head = model.vocab_size * model.hidden_size
    return _Products(
        linears=2.0 * (model.num_active_elements - head) * num_tokens,
        head=2.0 * head * num_targets,
        adapter=2.0 * method_of(adapter).factors(adapter, model) * model.num_layers * num_tokens,
        attention=4.0 * model.head_dim * model.num_layers * num_pairs,
    )


def count_flops(run: RunShape) -> Flops:
    """Count the FLOPs of a step.

    Base weights are frozen: their backward pass computes gradients of inputs alone, one product instead of two. The
    loss computes the gradient of hidden states in its forward pass. Checkpointing computes every layer once more.
    """
    num_tokens = run.tokens_per_worker * run.accumulation
    rows, heads = run.num_sequences * run.accumulation / run.sequence, run.model.num_heads
    pairs = rows * attention_pairs(run.padded_length, run.group_size, heads)
    dense = rows * attention_pairs(run.padded_length, None, heads)
    p = _products(run.model, run.adapter, num_tokens=num_tokens, num_targets=num_tokens, num_pairs=pairs)
    method = method_of(run.adapter)
    layers = p.linears + p.adapter + p.attention
    layers += 2.0 * method.step_products(run.adapter, run.model) * run.accumulation
    return Flops(
        forward=(1 + run.extra_forwards) * layers + (2 + run.extra_forwards) * p.head,
        backward=p.linears + method.products_backward * p.adapter + ATTENTION_BACKWARD * p.attention,
        recompute=layers if run.checkpointing else 0.0,
        attention=p.attention,
        dense_attention=4.0 * run.model.head_dim * run.model.num_layers * dense,
        reference=(1 + run.extra_forwards) * (layers + p.head) if run.has_reference else 0.0,
    )


def model_flops_per_token(
    model: ModelConfig,
    adapter: AdapterSpec,
    length_counts: Mapping[int, int],
    *,
    group_size: int | None,
    target_share: float = 1.0,
    extra_forwards: int = 0,
) -> float:
    """Count model FLOPs per token of forward and backward pass, the mean over rows, of which `length_counts` have so
    many tokens, and of further forward passes. MFU is computed from it.

    MFU (Chowdhery et al., 2022, PaLM, appendix B) counts the operations of the model's equations, without
    recomputation. The frozen output head is applied to `target_share` of the tokens, those with a label. Attention
    covers the causal pairs of S2-Attn with `group_size`, those of the whole row without.
    """
    pairs = sum(k * attention_pairs(n, group_size, model.num_heads) for n, k in length_counts.items())
    num_tokens = float(sum(k * n for n, k in length_counts.items()))
    p = _products(model, adapter, num_tokens=num_tokens, num_targets=target_share * num_tokens, num_pairs=pairs)
    total = 2 * (p.linears + p.head)
    total += (1 + method_of(adapter).products_backward) * p.adapter + (1 + ATTENTION_GRADIENTS) * p.attention
    total += extra_forwards * sum(p)
    return total / num_tokens


def _causal(length: int) -> int:
    return length * (length + 1) // 2


def _grouped(num_tokens: int, group_size: int) -> int:
    groups, last = divmod(num_tokens, group_size)
    return groups * _causal(group_size) + _causal(last)


# -- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepEstimate:
    """Seconds of one optimizer step.

    communication_s  communication that does not overlap with computation
    mfu              model FLOPs utilisation: forward and backward, no recomputation, as a share of the peak
    reference_s      what the reference takes before the first step, for as many rows as a step has; 0 without one
    """

    matmul_s: float
    attention_s: float
    memory_s: float
    optimizer_s: float
    communication_s: float
    tokens_per_s: float
    mfu: float
    reference_s: float = 0.0

    @property
    def step_s(self) -> float:
        return self.matmul_s + self.attention_s + self.memory_s + self.optimizer_s + self.communication_s


def estimate_time(run: RunShape, device: Device, traffic: TrafficPlan) -> StepEstimate:
    """Estimate the seconds of a step on a device."""
    flops = count_flops(run)
    passes = 1 + ATTENTION_BACKWARD + run.checkpointing + run.extra_forwards
    peak = device.flops * device.product_shares.get(run.dtype, 1.0)
    matmul_rate = peak * device.matmul_share
    matmul_s = (flops.total - passes * flops.attention) / matmul_rate
    share = device.dense_attention_share if run.group_size is None else device.attention_share
    shared = run.shared_dense
    one_attention_s = flops.attention / (peak * share) * (1.0 if shared is None else shared.imbalance)
    attention_s = passes * one_attention_s
    memory_s = _eager_bytes(run) / device.bandwidth
    optimizer_s = _ADAMW_BYTES * run.trained.total / run.optimizer_shards / device.bandwidth
    halo_s, gather_s, gradient_s = (
        nbytes / device.link_bandwidth for nbytes in (traffic.halo_bytes, traffic.gather_bytes, traffic.gradient_bytes)
    )
    compute_s = matmul_s + attention_s + memory_s
    dense_s = traffic.dense_bytes / device.link_bandwidth
    communication_s = max(0.0, halo_s - attention_s) + dense_s + max(0.0, gather_s - compute_s) + gradient_s
    step_s = compute_s + optimizer_s + communication_s
    reference_s = 0.0
    if run.has_reference:
        eager_s = memory_s / (3 + run.checkpointing + run.extra_forwards)  # of these passes one is made
        passes = 1 + run.extra_forwards
        reference_s = (flops.reference - passes * flops.attention) / matmul_rate + passes * (one_attention_s + eager_s)
    return StepEstimate(
        matmul_s=matmul_s,
        attention_s=attention_s,
        memory_s=memory_s,
        optimizer_s=optimizer_s,
        communication_s=communication_s,
        tokens_per_s=run.tokens_per_step / step_s,
        mfu=(flops.forward + flops.backward) / (step_s * device.flops),
        reference_s=reference_s,
    )


def _eager_bytes(run: RunShape) -> float:
    """Bytes of everything but matrix products: norms in fp32, RoPE, residuals, the adapter's sum, SiLU, the loss. The
    backward pass takes twice the forward pass.
    """
    model, e = run.model, run.element_bytes
    norm = 4 * e + 28  # read, written in fp32, squared, averaged, scaled, written, weighted
    width = model.layers[0].num_norms * norm * model.hidden_size + 6 * e * model.hidden_size
    width += 10 * e * (model.num_heads + model.num_kv_heads) * model.head_dim
    width += 5 * e * sum(out for out, _ in shapes(run.adapter, model).values())
    width += 5 * e * model.num_active_mlps * model.intermediate_size
    if model.experts is not None:  # tokens are put together by expert, and their results are added up
        width += 4 * e * model.num_active_mlps * model.hidden_size
    layers = width * model.num_layers * (3 + run.checkpointing + run.extra_forwards)
    loss = (_LOSS_FP32_PASSES + 3 * e) * model.vocab_size * (1 + run.extra_forwards / 2)  # half of it is the gradient
    dequantized = 0.0
    if run.quantization is not None:  # every pass reads each weight and writes it in the base's dtype
        passes = 2 + run.checkpointing + run.extra_forwards
        dequantized = (run.quantization.bytes_per_element + e) * count_quantized(model) * passes
    return float((layers + loss) * run.tokens_per_worker + dequantized) * run.accumulation
