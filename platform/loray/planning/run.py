"""`RunShape`, the numbers of a run that its costs depend on, and the elements of base and adapter."""

from __future__ import annotations

from dataclasses import dataclass

from loray.bases.config import ModelConfig
from loray.methods import method_of
from loray.planning.sequence import DensePlan, HaloPlan, padded_length
from loray.recipes.resolve import Resolved, check_token_budget, resolve
from loray.spec import (
    ATTENTION_MODULES,
    DTYPE_BYTES,
    LINEAR_MODULES,
    AdapterSpec,
    DType,
    QuantizationSpec,
    StrategyName,
    TrainSpec,
)


@dataclass(frozen=True, slots=True)
class BaseCounts:
    """Elements of a base's parameters.

    head         output head; 0 where it is tied to the input embedding
    layer        one decoder layer, norms included
    layer_norms  the RMSNorms of one layer
    """

    embedding: int
    head: int
    layer: int
    layer_norms: int
    final_norm: int
    num_layers: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.num_layers * self.layer + self.final_norm

    @property
    def norms(self) -> int:
        return self.num_layers * self.layer_norms + self.final_norm


@dataclass(frozen=True, slots=True)
class TrainedCounts:
    """Elements of the parameters that an adapter trains. `largest` is the largest tensor among them.

    adapter    matrices and vectors of the adapter's modules
    embedding  the input embedding; 0 where it is not trained
    norms      all RMSNorms; 0 where they are not trained
    """

    adapter: int
    embedding: int
    norms: int
    largest: int

    @property
    def total(self) -> int:
        return self.adapter + self.embedding + self.norms


def count_base(model: ModelConfig) -> BaseCounts:
    """Count the elements of a base, whose layers are taken as equal."""
    layer = model.layers[0]
    norms = layer.num_norms * model.hidden_size + (2 * model.head_dim if layer.qk_norm else 0)
    biases = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim if layer.qkv_bias else 0
    biases += model.hidden_size * layer.o_bias + model.num_heads * layer.has_sinks
    if layer.experts is not None and layer.experts.bias:
        biases += layer.experts.num * (1 + 2 * model.intermediate_size + model.hidden_size)
    embedding = model.vocab_size * model.hidden_size
    matrices = model.num_matrix_elements - embedding  # the output head is as large as the input embedding
    return BaseCounts(
        embedding=embedding,
        head=0 if model.tie_word_embeddings else embedding,
        layer=matrices // model.num_layers + norms + biases,
        layer_norms=norms,
        final_norm=model.hidden_size,
        num_layers=model.num_layers,
    )


def count_quantized(model: ModelConfig) -> int:
    """Count the elements of the decoder's linear layers, which a quantized base has in 4 bits. Experts are none: they
    stay in the base's dtype.
    """
    shapes = (model.module_shape(m) for m in (LINEAR_MODULES if model.experts is None else ATTENTION_MODULES))
    return model.num_layers * sum(out * width for out, width in shapes)


def count_trained(model: ModelConfig, adapter: AdapterSpec) -> TrainedCounts:
    """Count the elements that an adapter trains."""
    base = count_base(model)
    tensors = list(method_of(adapter).trained(adapter, model))
    embedding = base.embedding if adapter.train_embeddings else 0
    norms = base.norms if adapter.train_norms else 0
    return TrainedCounts(model.num_layers * sum(tensors), embedding, norms, max(embedding, *tensors))


SHARDS_WEIGHTS: tuple[StrategyName, ...] = ("zero3", "fsdp2")


@dataclass(frozen=True, slots=True)
class RunShape:
    """The work of one worker in a step, and how workers share it.

    row_length       N of the longest row, in tokens, before padding
    num_rows         rows of a micro-batch
    row_size         sequences of a row that are learned: two where it is a pair
    extra_forwards   further sequences of a row, for each learned one, that only pass forward
    has_reference    each row is compared with a reference, in a pass before the first step
    group_size       S2-Attn's G, None where attention is dense
    usual_group      G of LongLoRA's paper
    context          tokens of the context that the adapter is trained for
    quantization     of the base, None where it stays in `dtype`
    measured_length  tokens of the longest window or prompt that is measured before publishing; None: nothing is
    is_cut_to_fit    `num_rows` are those of a step, which the plan cuts into micro-batches
    """

    model: ModelConfig
    adapter: AdapterSpec
    dtype: DType
    row_length: int
    num_rows: int
    accumulation: int
    group_size: int | None
    usual_group: int
    context: int
    checkpointing: bool
    num_workers: int
    sequence: int
    strategy: StrategyName
    quantization: QuantizationSpec | None
    measured_length: int | None
    row_size: int = 1
    extra_forwards: int = 0
    has_reference: bool = False
    is_cut_to_fit: bool = False

    @property
    def num_sequences(self) -> int:
        """Sequences of a micro-batch."""
        return self.num_rows * self.row_size

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def padded_length(self) -> int:
        """N after padding, a multiple of P."""
        return padded_length(self.row_length, self.sequence)

    @property
    def tokens_per_worker(self) -> int:
        """Tokens of a micro-batch that one worker holds: rows · N / P."""
        return self.num_sequences * self.padded_length // self.sequence

    @property
    def num_data_groups(self) -> int:
        """Number of sequence groups. Each trains on rows of its own."""
        return self.num_workers // self.sequence

    @property
    def tokens_per_step(self) -> int:
        return self.num_sequences * self.row_length * self.accumulation * self.num_data_groups

    @property
    def weight_shards(self) -> int:
        return self.num_workers if self.strategy in SHARDS_WEIGHTS else 1

    @property
    def optimizer_shards(self) -> int:
        return 1 if self.strategy == "ddp" else self.num_workers

    @property
    def base(self) -> BaseCounts:
        return count_base(self.model)

    @property
    def trained(self) -> TrainedCounts:
        return count_trained(self.model, self.adapter)

    @property
    def base_bytes(self) -> int:
        """The bytes of all of the base's parameters, as a worker that holds them whole has them."""
        if self.quantization is None:
            return self.element_bytes * self.base.total
        quantized = count_quantized(self.model)
        rest = self.element_bytes * (self.base.total - quantized)
        return rest + int(self.quantization.bytes_per_element * quantized)

    @property
    def checkpoint_bytes(self) -> int:
        """Rank 0's copy of fp32 masters and moments, and of the adapter in the base's dtype, while it is written."""
        rounded = 0 if self.dtype == "float32" else self.element_bytes
        return (3 * DTYPE_BYTES["float32"] + rounded) * self.trained.total

    @property
    def halo(self) -> HaloPlan | None:
        """The halos of S2-Attn; None where attention is dense."""
        if self.group_size is None:
            return None
        return halo_plan(self.model, self.padded_length, self.sequence, self.group_size)

    @property
    def shared_dense(self) -> DensePlan | None:
        """The exchange of dense attention; None where attention is S2-Attn, or rows are not split."""
        if self.group_size is not None or self.sequence == 1:
            return None
        return DensePlan(self.padded_length, self.sequence, self.model.num_heads, self.model.num_kv_heads)


def halo_plan(model: ModelConfig, num_tokens: int, num_ranks: int, group_size: int) -> HaloPlan:
    return HaloPlan(num_tokens, num_ranks, group_size, model.num_heads, model.num_kv_heads)


def shape_of(spec: TrainSpec, model: ModelConfig, *, dtype: DType = "bfloat16") -> RunShape:
    """Take the numbers of a recipe, in `dtype` where it leaves the dtype to the device. Raises SpecError or
    UnsupportedError where the driver would refuse it, too.
    """
    resolved = resolve(spec, model)
    objective, row_length = spec.objective, resolved.row_length
    longest = row_length * objective.sequences_per_row
    check_token_budget(spec.batch, longest)
    is_cut_to_fit = spec.batch.accumulation == "auto"
    return RunShape(
        model=model,
        adapter=spec.adapter,
        dtype=dtype if spec.dtype == "auto" else spec.dtype,
        row_length=row_length,
        num_rows=spec.batch.rows or (spec.batch.tokens or 0) // longest,
        accumulation=1 if is_cut_to_fit else spec.batch.chosen_accumulation,
        group_size=resolved.group_size,
        usual_group=resolved.usual_group,
        context=resolved.context,
        checkpointing=spec.gradient_checkpointing,
        num_workers=spec.num_workers,
        sequence=spec.parallel.sequence,
        strategy=spec.parallel.strategy,
        quantization=spec.quantization,
        measured_length=_measured_length(spec, resolved),
        row_size=objective.sequences_per_row - objective.extra_forwards,
        extra_forwards=objective.extra_forwards,
        has_reference=objective.has_reference,
        is_cut_to_fit=is_cut_to_fit,
    )


def _measured_length(spec: TrainSpec, resolved: Resolved) -> int | None:
    perplexity = spec.evaluation.perplexity
    lengths = [length for task in spec.evaluation.retrieval for length in task.context_lengths]
    if perplexity is not None:
        lengths += perplexity.context_lengths or (resolved.original_context, resolved.context)
    return max(lengths, default=None)
