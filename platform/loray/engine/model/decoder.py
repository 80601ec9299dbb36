"""The decoder: Llama, Mistral, Qwen2, Qwen3 over the pool's paged KV cache. One pass serves a heterogeneous batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from loray.bases.config import ModelConfig
from loray.engine.memory.device import SCORED_BYTES
from loray.engine.model.batch import AdapterBatch, Batch, build_batch
from loray.engine.model.compiling import compile_adapters
from loray.engine.model.decoding import DecodeBatch, DecodeSteps, Resident
from loray.engine.model.kept import kept_part
from loray.engine.model.layers import LOCAL, Layer, Linears, RMSNorm, Step, through
from loray.engine.model.loading import load_layers
from loray.engine.model.rope import Rope
from loray.engine.pool.pool import Pool
from loray.engine.pool.records import AdapterRecords, input_shapes
from loray.engine.scheduling.plan import Chunk
from loray.spec import RopeParameters
from loray_kernels import (
    Decoding,
    InputShape,
    Ops,
    Recorded,
    RecordedDecoding,
    RecordedStep,
    RecordLimits,
    TokenSeats,
)

_EMBEDDING = "model.embed_tokens.weight"


class Decoder:
    """`tensors` are a checkpoint's, by name; see `loading`. `ops` packs the matrices and runs every pass."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Iterable[tuple[str, Tensor]],
        ops: Ops,
        *,
        dtype: torch.dtype,
        device: torch.device,
        linears: Linears = LOCAL,
    ) -> None:
        self.config = config
        self.ops = ops
        self.recorded: Recorded | None = None  # how far recording came before the start
        self._recorded: RecordedDecoding | None = None
        self._steps: DecodeSteps | None = None
        self._adapters: AdapterBatch | None = None  # of the last step
        self._rope = Rope(config, dtype=dtype, device=device)
        self._layers, others = load_layers(
            tensors,
            config,
            lambda name, tensor: _take(name, tensor, dtype, device),
            lambda layer, own: Layer(layer, config, own, ops, linears),
        )
        self.embedding_VD = others[_EMBEDDING]
        self._head = ops.pack_linear(self.embedding_VD if config.tie_word_embeddings else others["lm_head.weight"])
        self._norm = RMSNorm(None, "norm", others["model.norm.weight"], config.rms_norm_eps)

    def prepare_rope(self, rope: RopeParameters) -> None:
        """See Rope.prepare."""
        self._rope.prepare(rope)

    @property
    def records(self) -> bool:
        """Decode steps can be recorded."""
        return self._recorded is not None

    def use_recordings(self, pool: Pool, *, num_seats: int, max_blocks: int) -> None:
        """From now on decode steps over `pool` are those that can be recorded, if the backend supports it. Before
        adapters are placed.

        num_seats   requests that run at once
        max_blocks  the most that a request for the base may have
        """

        def forward(step: RecordedStep) -> Tensor:
            return self._forward(Batch.of_recorded(step), pool, lambda logits_RV: None)

        self._recorded = self.ops.recorded(forward, self._decoding(pool, num_seats, max_blocks))
        if self._recorded is not None:
            pool.records = AdapterRecords(
                self._recorded.directory,
                self._recorded.vectors,
                block_size=pool.geometry.block_size,
                rope=self._rope.numbers,
            )
            self._steps = DecodeSteps(num_seats=num_seats, max_blocks=max_blocks, max_rows=self._recorded.max_rows)

    def _decoding(self, pool: Pool, num_seats: int, max_blocks: int) -> Decoding:
        return Decoding(pool.layout, num_seats, max_blocks, self._inputs(pool), pool.tensor.device)

    def _inputs(self, pool: Pool) -> tuple[InputShape, ...]:
        return input_shapes(self.config, pool.layout.layer_share)

    def compile_adapters(self, pool: Pool) -> None:
        """Compile the kernels of prompts with adapters, see `compiling`."""
        compile_adapters(self.ops, pool.tensor, self._inputs(pool))

    @torch.inference_mode()
    def record(self, limits: RecordLimits, on_progress: Callable[[Recorded], None]) -> Recorded | None:
        """Record decode steps; None if there is nothing to record. Before the first step."""
        if self._recorded is not None:
            self.recorded = self._recorded.record(limits, on_progress)
        return self.recorded

    def batch(self, chunks: Sequence[Chunk], resident: Resident, pool: Pool) -> Batch | DecodeBatch | None:
        """The batch of `chunks` for one pass, or of some of them, whose turn it is; None if it needs tokens that are in
        flight. `resident` gives the adapter of a chunk's request, which is pinned.
        """
        if self._steps is not None:
            found = self._steps.batch(chunks, resident)
            if isinstance(found, DecodeBatch):
                return found
            if any(chunk.request.num_in_flight for chunk in found):
                return None
            chunks = found
        return self._eager(chunks, resident, pool)

    def seats(self, batch: Batch | DecodeBatch) -> TokenSeats | None:
        """Where the tokens of the last step, `batch`, are drawn to, so that the next one takes them from there; None if
        it cannot.
        """
        return None if self._recorded is None or isinstance(batch, Batch) else self._recorded.seats

    def _eager(self, chunks: Sequence[Chunk], resident: Resident, pool: Pool) -> Batch:
        batch = build_batch(
            chunks,
            resident,
            block_tokens=pool.geometry.block_tokens,
            hidden_size=self.config.hidden_size,
            device=pool.tensor.device,
            earlier=self._adapters,
        )
        self._adapters = batch.adapters
        return batch

    def forget_steps(self) -> None:
        """A step has failed: nothing is kept from step to step but what `pool` holds."""
        self._adapters = None
        if self._steps is not None:
            self._steps.forget()

    @torch.inference_mode()
    def forward(
        self, batch: Batch | DecodeBatch, pool: Pool, on_scored: Callable[[Tensor], None] = lambda logits_RV: None
    ) -> Tensor:
        """Logits (batch.logits_T, vocabulary), fp32, valid until the next call. Writes the step's keys and values into
        `pool`.

        `on_scored` is given those of batch.scored_T, 16 MiB at a time, in order.
        """
        pool.wait_for(batch.residents)
        if isinstance(batch, Batch):
            return self._forward(batch, pool, on_scored)
        assert self._recorded is not None
        return self._recorded(batch.step)

    def _forward(self, batch: Batch, pool: Pool, on_scored: Callable[[Tensor], None]) -> Tensor:
        ops = self.ops
        cos_Td, sin_Td = self._rope(batch)
        step = Step.of(batch, pool, ops, cos_Td, sin_Td)
        x_TD = ops.embed(self.embedding_VD, batch.token_ids_T, pool.tensor, batch.own_rows)
        kept, added_TD = kept_part(batch), None
        layers = self._layers if kept is None else self._layers[:-1]
        if (wait_for := batch.wait_for_layer) is None:
            x_TD = through(layers, x_TD, step)
        else:
            for layer in layers:
                wait_for(layer.number)
                x_TD = through((layer,), x_TD, step)
        if kept is not None:
            last = self._layers[-1]
            if wait_for is not None:
                wait_for(last.number)
            part = step.of_kept(kept)
            x_TD, added_TD = last(x_TD, None, step, part)
            batch, step = kept, part
        _, x_TD = self._norm.of_sum(x_TD, added_TD, step)
        if batch.scored_T is not None:
            for rows_R in torch.split(batch.scored_T, max(1, SCORED_BYTES // (4 * self.config.vocab_size))):
                on_scored(self._logits(x_TD[rows_R]))
        return self._logits(x_TD[batch.logits_T])

    def _logits(self, x_RD: Tensor) -> Tensor:
        return self.ops.logits(x_RD, self._head)


def _take(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor on the device. Matrices are packed into other memory later. The others are copied if they are views of
    a mapped checkpoint: one view would keep all of the checkpoint in memory.
    """
    taken = tensor.to(device=device, dtype=dtype)
    is_used_as_it_is = tensor.dim() == 1 or name == _EMBEDDING
    return taken.clone() if is_used_as_it_is and taken.data_ptr() == tensor.data_ptr() else taken
