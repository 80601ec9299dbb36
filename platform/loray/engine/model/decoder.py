"""`Decoder`: a base's weights, RoPE, and the pass of a batch through them.

Shapes: T tokens, R rows of logits, D hidden, V vocabulary, I input width, O output width, h half of head_dim.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loray.bases.checkpoint import expected_shapes
from loray.bases.config import ModelConfig
from loray.bases.weights import unfused
from loray.engine.model.batch import AdapterBatch, Batch, ChunkInput, build_batch, logits_part
from loray.engine.model.decode_batch import DecodeBatch, DecodeSteps, Resident
from loray.engine.model.layers import LOCAL, ForwardContext, Layer, Linears, RMSNorm, through
from loray.engine.pool.device_memory import SCORED_BYTES
from loray.engine.pool.pool import Pool, PoolDescriptors, input_shapes
from loray.engine.request import Chunk
from loray.errors import IntegrityError
from loray.spec import RopeParameters
from loray.telemetry import get_logger
from loray_kernels import (
    AdapterSegments,
    CapturedDecoding,
    CapturedStep,
    CaptureLimits,
    CaptureState,
    Decoding,
    InputShape,
    LoraTable,
    Ops,
    ProjectionMatrix,
    QuantizedWeight,
    RowTables,
    TokenSlots,
    VeraTable,
    Weight,
)
from loray_kernels.reference import quantize_rows

_log = get_logger(__name__)
_EMBEDDING = "model.embed_tokens.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_TOKENS = 32  # a tile
_NUM_ROWS = (16, 32, 64)
_PAIR_RANKS = (64, 24)
_Columns = tuple[tuple[int, int], ...]

L = TypeVar("L")

# -- compiling ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def compile_adapters(ops: Ops, pool: Tensor, inputs: Sequence[InputShape]) -> None:
    """Run the ops of prompts with adapters once with each of their kernels. `inputs`: of the rank's part of the base.

    Which kernel an op takes depends on the base, on how many rows of A an adapter has for an input: 16, 32, or more,
    and on whether the rank of a VeRA pair is a multiple of 16. All rows are the pool's first elements, and nothing that
    is kept is written.
    """
    for shape in inputs:
        x_TI = pool.new_zeros(_TOKENS, _width(shape.a))
        outputs = torch.split(pool.new_zeros(_TOKENS, sum(map(_width, shape.b))), [_width(b) for b in shape.b], dim=1)
        for num_rows in _NUM_ROWS:
            _run_lora(ops, pool, shape, num_rows // len(shape.b), x_TI, outputs)
        for rank in _PAIR_RANKS:
            _run_vera(ops, pool, shape, rank, x_TI, outputs[0])


def _run_lora(ops: Ops, pool: Tensor, shape: InputShape, rank: int, x_TI: Tensor, outputs: tuple[Tensor, ...]) -> None:
    segments = AdapterSegments((0,), (_TOKENS,))
    tables = tuple(
        LoraTable(_first_rows(shape.a, rank, pool), _first_rows(b, rank, pool), (0, rank), (1.0,)) for b in shape.b
    )
    h = ops.lora_shrink(x_TI, pool, tables, segments, 0)
    ops.lora_expand(outputs, h, pool, tables, segments, 0)


def _run_vera(ops: Ops, pool: Tensor, shape: InputShape, rank: int, x_TI: Tensor, y_TO: Tensor) -> None:
    a_RI = ProjectionMatrix(pool.new_zeros(rank, x_TI.shape[1]))
    b_OR = ProjectionMatrix(pool.new_zeros(y_TO.shape[1], rank))
    d, b = _first_rows(((0, rank),), _TOKENS, pool), _first_rows(shape.b[0], _TOKENS, pool)
    z_TR = ops.vera_shrink(x_TI, a_RI)
    ops.vera_expand(y_TO, z_TR, pool, VeraTable(a_RI, b_OR, d, b, 0, _TOKENS), 0)


def _first_rows(columns: _Columns, num: int, pool: Tensor) -> RowTables:
    at = torch.zeros(num, dtype=torch.int64, device=pool.device)
    return RowTables(tuple((column, width, at) for column, width in columns))


def _width(columns: _Columns) -> int:
    return sum(width for _, width in columns)


# -- loading -----------------------------------------------------------------------------------------------------------


def load_layers(
    tensors: Iterable[tuple[str, Weight]],
    config: ModelConfig,
    take: Callable[[str, Weight], Weight],
    make: Callable[[int, Mapping[str, Any]], L],
) -> tuple[list[L], Mapping[str, Any]]:
    """Make the layers, each when the last of its tensors has been taken; also returns the tensors of no layer.

    A layer packs its matrices into other memory; what it was made from is given up with it. In the order of a
    checkpoint, by name, a layer's tensors follow each other. Tensors that the decoder does not read are not taken.
    IntegrityError if one is missing.
    """
    missing = set(expected_shapes(config))
    if config.tie_word_embeddings:
        missing.discard("lm_head.weight")
    left = Counter(_layer_of(name) for name in missing)
    taken: defaultdict[int | None, dict[str, Weight]] = defaultdict(dict)
    layers: dict[int, L] = {}
    for name, tensor in unfused(tensors, config):
        if name not in missing:
            continue
        missing.remove(name)
        layer = _layer_of(name)
        taken[layer][name] = take(name, tensor)
        left[layer] -= 1
        if layer is not None and not left[layer]:
            layers[layer] = make(layer, taken.pop(layer))
    if missing:
        raise IntegrityError(f"the checkpoint lacks the tensor {min(missing)!r}; add the base again")
    return [layers[i] for i in range(config.num_layers)], taken[None]


def _layer_of(name: str) -> int | None:
    found = _LAYER.match(name)
    return None if found is None else int(found[1])


def _take(name: str, tensor: Weight, ops: Ops, dtype: torch.dtype, device: torch.device) -> Weight:
    """The tensor on the device. Matrices are packed into other memory later. The others are copied if they are views of
    a mapped checkpoint: one view would keep all of the checkpoint in memory. A quantised weight is dequantised where
    `ops` have no kernel for it.
    """
    if isinstance(tensor, QuantizedWeight):
        tensor = tensor.to(device)
        if name != _EMBEDDING:
            if ops.has_kernel(tensor):
                return tensor
            _warn_dequantized(tensor.kind, dtype)
        return tensor.dequantized(slice(None), dtype)
    taken = tensor.to(device=device, dtype=dtype)
    is_used_as_it_is = tensor.dim() == 1 or name == _EMBEDDING
    return taken.clone() if is_used_as_it_is and taken.data_ptr() == tensor.data_ptr() else taken


@cache
def _warn_dequantized(kind: str, dtype: torch.dtype) -> None:
    _log.warning(
        "weights that are %s are dequantised to %s: no kernel here multiplies them as they are, so they take as much "
        "memory as if they were not quantised; CPUs and GPUs multiply what loray base add NAME --quantise int8 makes",
        kind,
        str(dtype).removeprefix("torch."),
    )


# -- RoPE --------------------------------------------------------------------------------------------------------------


class Frequencies(NamedTuple):
    """Inverse frequencies, fp32 (head_dim/2), and the factor of cos and sin (YaRN's attention temperature)."""

    inverse_d: Tensor
    attention_factor: float


def frequencies(rope: RopeParameters, head_dim: int) -> Frequencies:
    """Compute the frequencies that transformers has, bit for bit; its functions compute most scaled kinds."""
    if rope.rope_type in ("default", "linear"):
        exponent_d = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        inverse_d = 1.0 / (rope.rope_theta**exponent_d)
        return Frequencies(inverse_d / rope.factor if rope.rope_type == "linear" and rope.factor else inverse_d, 1.0)
    from transformers import LlamaConfig  # takes seconds, and few bases are of another kind
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # The supported kinds do not use the model's context length; transformers warns if it does not fit.
    context = round((rope.original_max_position_embeddings or 1 << 20) * (rope.factor or 1))
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=head_dim,
        rope_parameters=rope.to_hf(),
        max_position_embeddings=context,
    )
    inverse_d, attention_factor = ROPE_INIT_FUNCTIONS[rope.rope_type](config, torch.device("cpu"))
    return Frequencies(inverse_d, float(attention_factor))


class Rope:
    """cos and sin of each token with the parameters of its model: the base's, or its LongLoRA adapter's in place of the
    base's first one.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._dtype, self._device = dtype, device
        self._known: dict[RopeParameters, Frequencies] = {}

    def prepare(self, rope: RopeParameters) -> None:
        """Compute the frequencies of an adapter before a step needs them. May be called from any thread.

        Raises IntegrityError where they cannot be computed, are not finite or are 0.
        """
        try:
            inverse_d, factor = self._frequencies(rope)
        except Exception as e:
            raise IntegrityError(f"its RoPE parameters {rope.to_hf()} cannot be computed: {e!r}") from e
        if not (inverse_d.isfinite().all() and (inverse_d > 0).all() and math.isfinite(factor)):
            raise IntegrityError(f"its RoPE parameters {rope.to_hf()} give frequencies that are not finite, or 0")

    def numbers(self, rope: RopeParameters) -> npt.NDArray[np.float32]:
        """Give inverse frequencies and the factor of cos and sin, (head_dim/2 + 1,), for an adapter's descriptor."""
        inverse_d, factor = self._frequencies(rope)
        return np.append(inverse_d.float().cpu().numpy(), np.float32(factor))

    def __call__(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], ...]:
        """Compute cos and sin, (T, d), for each RoPE of the base."""
        positions_T = batch.positions_T.float()
        others = (self._turns(*self._angles(positions_T, rope)) for rope in self._config.other_ropes)
        if (vectors := batch.own_vectors) is None:
            angles_Th, factor_T = self._angles(positions_T, self._config.rope)
        else:
            inverse_Th, factor_T = vectors.rope(*self._frequencies(self._config.rope))
            angles_Th = positions_T.unsqueeze(1) * inverse_Th
        for span in batch.adapters.spans:
            if span.adapter.rope is not None:
                own = slice(span.start, span.stop)
                angles_Th[own], factor_T[own] = self._angles(positions_T[own], span.adapter.rope)
        return self._turns(angles_Th, factor_T), *others

    def _turns(self, angles_Th: Tensor, factor_T: Tensor) -> tuple[Tensor, Tensor]:
        factor_T1 = factor_T.unsqueeze(1)
        cos_Th, sin_Th = ((f(angles_Th) * factor_T1).to(self._dtype) for f in (torch.cos, torch.sin))
        return torch.cat((cos_Th, cos_Th), dim=-1), torch.cat((sin_Th, sin_Th), dim=-1)

    def _angles(self, positions_T: Tensor, rope: RopeParameters) -> tuple[Tensor, Tensor]:
        inverse_d, factor = self._frequencies(rope)
        return torch.outer(positions_T, inverse_d), torch.full_like(positions_T, factor)

    def _frequencies(self, rope: RopeParameters) -> Frequencies:
        found = self._known.get(rope)
        if found is None:
            inverse_d, factor = frequencies(rope, self._config.rotary_dim)
            found = self._known[rope] = Frequencies(inverse_d.to(self._device), factor)
        return found


# -- the decoder -------------------------------------------------------------------------------------------------------


class Decoder:
    """A base's decoder. `tensors` are a checkpoint's, by name; `ops` packs the matrices and runs every pass."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Iterable[tuple[str, Weight]],
        ops: Ops,
        *,
        dtype: torch.dtype,
        device: torch.device,
        linears: Linears = LOCAL,
    ) -> None:
        self.config = config
        self.ops = ops
        self.capture_state: CaptureState | None = None  # how far capturing came before the start
        self._captures: CapturedDecoding | None = None
        self._steps: DecodeSteps | None = None
        self._adapters: AdapterBatch | None = None  # of the last step
        self.rope = Rope(config, dtype=dtype, device=device)
        self._layers, others = load_layers(
            tensors,
            config,
            lambda name, tensor: _take(name, tensor, ops, dtype, device),
            lambda layer, own: Layer(layer, config, own, ops, linears),
        )
        self.embedding_VD: Tensor = others[_EMBEDDING]
        head: Weight = self._tied_head() if config.tie_word_embeddings else others["lm_head.weight"]
        self._head = ops.pack_linear([head])
        self._norm = RMSNorm(None, "norm", others["model.norm.weight"], config)
        self._embedding_scale = float(torch.tensor(config.embedding_scale, dtype=dtype))

    def _tied_head(self) -> Weight:
        """Return the embedding as the output head, of which a backend makes a matrix of its own. A checkpoint that ties
        them cannot round one alone; where it rounds its layers to integers, the head is rounded to int8 here.
        """
        if self._layers[0].weights.qkv.are_integers:
            rounded = QuantizedWeight(*quantize_rows(self.embedding_VD))
            if self.ops.has_kernel(rounded):
                return rounded
        return self.embedding_VD

    @property
    def can_capture(self) -> bool:
        """The backend captures decode steps, see `use_captures`."""
        return self._captures is not None

    @property
    def is_batch_invariant(self) -> bool:
        """A token's logits have the same bits whatever else is in its batch."""
        return self.ops.is_batch_invariant(self.embedding_VD.dtype)

    def use_captures(self, pool: Pool, *, num_slots: int, max_blocks: int) -> None:
        """Make decode steps over `pool` those that can be captured, if the backend supports it. Before adapters are
        placed. Those of experts are not captured: which tokens an expert has is known on the host alone.

        num_slots   requests that run at once
        max_blocks  the most that a request for the base may have
        """

        def forward(step: CapturedStep) -> Tensor:
            return self._forward(Batch.of_captured(step), pool)

        if self.config.experts is None:
            self._captures = self.ops.captured_decoding(forward, self._decoding(pool, num_slots, max_blocks))
        if self._captures is not None:
            pool.descriptors = PoolDescriptors(
                self._captures.descriptors,
                self._captures.vectors,
                block_size=pool.geometry.block_size,
                rope=self.rope.numbers,
            )
            self._steps = DecodeSteps(num_slots=num_slots, max_blocks=max_blocks, max_rows=self._captures.max_rows)

    def _decoding(self, pool: Pool, num_slots: int, max_blocks: int) -> Decoding:
        return Decoding(pool.layout, num_slots, max_blocks, self._inputs(pool), pool.tensor.device)

    def _inputs(self, pool: Pool) -> tuple[InputShape, ...]:
        return input_shapes(self.config, pool.layout.layer_share)

    def compile_adapters(self, pool: Pool) -> None:
        """Compile the kernels of prompts with adapters."""
        compile_adapters(self.ops, pool.tensor, self._inputs(pool))

    @torch.inference_mode()
    def capture(self, limits: CaptureLimits, on_progress: Callable[[CaptureState], None]) -> CaptureState | None:
        """Capture decode steps; None if there is nothing to capture. Before the first step."""
        if self._captures is not None:
            self.capture_state = self._captures.capture(limits, on_progress)
        return self.capture_state

    def batch(self, chunks: Sequence[Chunk], resident: Resident, pool: Pool) -> Batch | DecodeBatch | None:
        """Make the batch of `chunks` for one pass, or of some of them, whose turn it is; None if it needs tokens that
        are in flight. `resident` gives the adapter of a chunk's request, which is pinned.
        """
        if self._steps is not None:
            found = self._steps.batch(chunks, resident)
            if isinstance(found, DecodeBatch):
                return found
            if any(chunk.request.num_in_flight for chunk in found):
                return None
            chunks = found
        parts = [part for chunk in chunks for part in chunk.parts]
        return self.eager([ChunkInput.of(part, resident(part)) for part in parts], pool)

    def slots(self, batch: Batch | DecodeBatch) -> TokenSlots | None:
        """The slots to which the tokens of the last step, `batch`, are drawn, so that the next one takes them from
        there; None if it cannot.
        """
        return None if self._captures is None or isinstance(batch, Batch) else self._captures.slots

    def eager(self, inputs: Sequence[ChunkInput], pool: Pool) -> Batch:
        """Make the batch of a step that is computed launch by launch."""
        batch = build_batch(
            inputs,
            block_tokens=pool.geometry.block_tokens,
            hidden_size=self.config.hidden_size,
            device=pool.tensor.device,
            earlier=self._adapters,
        )
        self._adapters = batch.adapters
        return batch

    def forget_steps(self) -> None:
        """Keep nothing from step to step but what the pool holds: a step has failed."""
        self._adapters = None
        if self._steps is not None:
            self._steps.forget()

    @torch.inference_mode()
    def forward(
        self,
        batch: Batch | DecodeBatch,
        pool: Pool,
        on_scored: Callable[[Tensor], None] = lambda logits_RV: None,
        on_pooled: Callable[[Tensor], None] = lambda x_PD: None,
    ) -> Tensor:
        """Compute the logits, fp32 (batch.logits_T, vocabulary), valid until the next call. Writes the step's keys and
        values into `pool`.

        `on_scored` is given those of batch.scored_T, 16 MiB at a time, in order; `on_pooled` the hidden states of
        batch.pooled_T after the final norm, (P, hidden size).
        """
        pool.wait_for(batch.residents)
        if isinstance(batch, Batch):
            return self._forward(batch, pool, on_scored, on_pooled)
        assert self._captures is not None
        return self._captures(batch.step)

    def _forward(
        self,
        batch: Batch,
        pool: Pool,
        on_scored: Callable[[Tensor], None] = lambda logits_RV: None,
        on_pooled: Callable[[Tensor], None] = lambda x_PD: None,
    ) -> Tensor:
        ops = self.ops
        step = ForwardContext.of(batch, pool, ops, self.rope(batch))
        x_TD = ops.embed(self.embedding_VD, batch.token_ids_T, pool.tensor, batch.own_rows)
        if self._embedding_scale != 1.0:
            x_TD *= self._embedding_scale
        part, added_TD = logits_part(batch), None
        x_TD = through(self._layers if part is None else self._layers[:-1], x_TD, step)
        if part is not None:
            logits_step = step.for_logits(part)
            x_TD, added_TD = self._layers[-1](x_TD, None, step, logits_step)
            batch, step = part, logits_step
        _, x_TD = self._norm.of_sum(x_TD, added_TD, step)
        if batch.pooled_T is not None:
            on_pooled(x_TD[batch.pooled_T])
        if batch.scored_T is not None:
            for rows_R in torch.split(batch.scored_T, max(1, SCORED_BYTES // (4 * self.config.vocab_size))):
                on_scored(self._logits(x_TD[rows_R]))
        return self._logits(x_TD[batch.logits_T])

    def _logits(self, x_RD: Tensor) -> Tensor:
        logits_RV, cap = self.ops.logits(x_RD, self._head), self.config.logit_soft_cap
        return logits_RV if cap is None else logits_RV.div_(cap).tanh_().mul_(cap)
