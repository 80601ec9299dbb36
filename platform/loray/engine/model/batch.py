"""The batch of one step, with its adapters' tables.

Chunks are in the order (VeRA pair, adapter, arrival), so the tokens of one adapter are neighbours, and so are those of
one pair. The base's tokens come first.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from loray.engine.pool.pool import ResidentAdapter, ResidentProjection
from loray.engine.request import Chunk, Request
from loray.methods.weights import Role
from loray_kernels import (
    AdapterSegments,
    AttentionMeta,
    CapturedStep,
    LayerTables,
    LoraTable,
    Parts,
    RowOverrides,
    RowTables,
    ScaleTable,
    StepDescriptors,
    StepVectors,
    Turn,
    VeraTable,
)

Group = int


class AdapterSpan(NamedTuple):
    """Tokens [start, stop) of the step belong to `adapter`."""

    adapter: ResidentAdapter
    start: int
    stop: int


class PairSpan(NamedTuple):
    """Tokens [start, stop) belong to adapters that share `pair`."""

    pair: ResidentProjection
    start: int
    stop: int


class AdapterBatch:
    """The adapters of a step, and of those after it that have the same adapters at the same tokens. Tables are built
    once for each combination of layer groups, not for each layer.
    """

    def __init__(self, spans: Sequence[AdapterSpan], *, device: torch.device) -> None:
        self.spans = tuple(spans)
        self._rows = tuple(s.adapter.rows for s in spans)
        self.segments = AdapterSegments(tuple(s.start for s in spans), tuple(s.stop for s in spans))
        self.pairs = tuple(_pair_spans(spans))
        self._device = device
        self._tables: dict[int | tuple[Group, ...], LayerTables] = {}  # also by layer

    def is_for(self, spans: Sequence[AdapterSpan]) -> bool:
        """The tables are those of `spans`. The pool replaces the `rows` of adapters that it moves."""
        moved = any(rows is not span.adapter.rows for rows, span in zip(self._rows, spans, strict=False))
        return not moved and self.spans == tuple(spans)

    def layer(self, layer: int) -> LayerTables:
        if layer not in self._tables:
            self._tables[layer] = self._for(tuple(s.adapter.table.layer_group[layer] for s in self.spans))
        return self._tables[layer]

    def flat(self) -> LayerTables:
        return self._for((-1,) * len(self.spans), flat=True)

    def _for(self, groups: tuple[Group, ...], *, flat: bool = False) -> LayerTables:
        # Of a layer, group -1 means that the adapter has nothing there; so the key of the flat tables is empty.
        key = () if flat else groups
        if key not in self._tables:
            self._tables[key] = self._build(groups, flat=flat)
        return self._tables[key]

    def _build(self, groups: tuple[Group, ...], *, flat: bool) -> LayerTables:
        members = [(s, g) for s, g in zip(self.spans, groups, strict=True) if flat or g >= 0]
        found: dict[Role, set[str]] = {}
        for span, group in members:
            for g, module, role in span.adapter.rows:
                if g == group:
                    found.setdefault(role, set()).add(module)
        return LayerTables(
            lora={m: self._lora(m, groups) for m in sorted(found.get("lora_b", ()))},
            vera={m: self._vera(m, groups) for m in sorted(found.get("vera_d", ()))},
            norms={m: self._own_rows(m, "norm", members) for m in sorted(found.get("norm", ()))},
            scales={m: self._scales(m, members) for m in sorted({*found.get("dora", ()), *found.get("scale", ())})},
        )

    def _lora(self, module: str, groups: tuple[Group, ...]) -> LoraTable:
        a_rows, b_rows, starts, scales = [], [], [0], []
        for span, group in zip(self.spans, groups, strict=True):
            b = span.adapter.rows.get((group, module, "lora_b")) if group >= 0 else None
            if b is None:
                starts.append(starts[-1])
                scales.append(0.0)
                continue
            rows = span.adapter.rows  # up_proj of experts may have gate_proj's A
            a_rows.append(rows.get((group, module, "lora_a")) or rows[group, "gate_proj", "lora_a"])
            b_rows.append(b)
            starts.append(starts[-1] + b.segments[0][2].shape[0])
            scales.append(span.adapter.scales[group, module])
        return LoraTable(_concatenate(a_rows), _concatenate(b_rows), tuple(starts), tuple(scales))

    def _vera(self, module: str, groups: tuple[Group, ...]) -> list[VeraTable]:
        """Make a table for each run of neighbouring spans that share a pair and have the module."""
        tables = []
        numbered = list(zip(self.spans, groups, strict=True))

        def pair_of(item: tuple[AdapterSpan, Group]) -> tuple[ResidentProjection | None, int]:
            span, group = item
            has = (group, module, "vera_d") in span.adapter.rows
            return (span.adapter.pair, int(span.adapter.scales.get((group, module), 0))) if has else (None, 0)

        for (pair, first), stretch in groupby(numbered, key=pair_of):
            if pair is not None:
                spans = list(stretch)
                b_OR = pair.b_OR.rows(first, pair.b_OR.data.shape[0]) if first else pair.b_OR
                d = self._token_rows([(s, s.adapter.rows[g, module, "vera_d"]) for s, g in spans])
                b = self._token_rows([(s, s.adapter.rows[g, module, "vera_b"]) for s, g in spans])
                tables.append(VeraTable(pair.a_RI, b_OR, d, b, spans[0][0].start, spans[-1][0].stop))
        return tables

    def _scales(self, module: str, members: Sequence[tuple[AdapterSpan, Group]]) -> list[ScaleTable]:
        """Make a table for each way of scaling outputs: without the base's bias, with it, and in pairs."""
        tables = []
        kinds: tuple[tuple[Role, bool], ...] = (("dora", False), ("scale", False), ("scale", True))
        for role, is_turned in kinds:
            own = [
                (s, g)
                for s, g in members
                if (g, module, role) in s.adapter.rows and ((g, module, "turn") in s.adapter.rows) == is_turned
            ]
            if own and is_turned:
                turn = self._token_rows([(s, s.adapter.rows[g, module, "turn"]) for s, g in own])
                distances = [int(s.adapter.scales[g, module]) for s, g in own for _ in range(s.start, s.stop)]
                turned = Turn(turn, torch.tensor(distances, device=self._device))
                tables.append(ScaleTable(self._own_rows(module, role, own), turn=turned))
            elif own:
                tables.append(ScaleTable(self._own_rows(module, role, own), leaves_bias=role == "dora"))
        return tables

    def _own_rows(self, module: str, role: Role, members: Iterable[tuple[AdapterSpan, Group]]) -> RowOverrides:
        own = [(s, rows) for s, g in members if (rows := s.adapter.rows.get((g, module, role))) is not None]
        tokens = [t for s, _ in own for t in range(s.start, s.stop)]
        return RowOverrides(torch.tensor(tokens, device=self._device), self._token_rows(own))

    def _token_rows(self, single: Sequence[tuple[AdapterSpan, RowTables]]) -> RowTables:
        """Join one-row tables, each repeated for every token of its span."""
        return _concatenate([rows for _, rows in single], [span.stop - span.start for span, _ in single])


def _concatenate(tables: Sequence[RowTables], repeats: Sequence[int] | None = None) -> RowTables:
    """Join the segments one by one: tables of equal width have equal segments. `repeats`: of each table's one row."""
    segments = []
    for i, (column, width, _) in enumerate(tables[0].segments):
        offsets = [table.segments[i][2] for table in tables]
        if repeats is not None:
            offsets = [o if n == 1 else o.expand(n) for o, n in zip(offsets, repeats, strict=True)]
        segments.append((column, width, torch.cat(offsets)))
    return RowTables(tuple(segments))


def _pair_spans(spans: Sequence[AdapterSpan]) -> Iterable[PairSpan]:
    for pair, stretch in groupby(spans, key=lambda s: s.adapter.pair):
        if pair is not None:
            members = list(stretch)
            yield PairSpan(pair, members[0].start, members[-1].stop)


class ChunkInput(NamedTuple):
    """A chunk as a pass reads it, or a part of one: the tokens of one adapter or of the base.

    token_ids   of its tokens, from position `start` on; blocks: of its request
    num_sampled  its last tokens whose logits are needed: what follows each of them is sampled
    scored      its tokens whose logits are needed, since their successors are in the prompt
    chunk       None on ranks beside the first, which have no requests
    """

    adapter: ResidentAdapter | None
    start: int
    token_ids: Sequence[int]
    blocks: Sequence[int]
    num_sampled: int
    scored: range
    chunk: Chunk | None = None

    @classmethod
    def of(cls, chunk: Chunk, adapter: ResidentAdapter | None) -> ChunkInput:
        request, start = chunk.request, chunk.start
        num_sampled = 1 + len(chunk.guesses) if chunk.is_last and request.spec.params.max_tokens > 0 else 0
        token_ids = [*request.tokens(start, start + chunk.num_tokens), *chunk.guesses]
        return cls(adapter, start, token_ids, request.blocks, num_sampled, chunk.scored, chunk)


class Scored(NamedTuple):
    """The tokens that follow tokens [start, stop) of `request` are known: they are in its prompt."""

    request: Request
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Batch:
    """All that the model needs for one step. T tokens.

    chunks           of the step; one that has tokens of the base and of its adapter in two parts
    own_rows         tokens that have an embedding row of their adapter's
    last, logits_T   tokens whose logits are needed, on host and device: the last one of each of `sampled`, which its
                     guesses follow
    sampled          the chunks that reach their request's newest token, for which the next token is sampled
    scored           parts of prompts for whose next tokens log-probabilities are requested
    scored_T         their tokens; None: there are none
    descriptors      of a captured step: its adapters, instead of `adapters`
    logits_tokens_T  of a part of a batch, see `logits_part`: the tokens of the batch that it has
    """

    token_ids_T: Tensor
    positions_T: Tensor
    attention: AttentionMeta
    adapters: AdapterBatch
    own_rows: RowOverrides | None
    last: tuple[int, ...]
    logits_T: Tensor
    sampled: tuple[Chunk, ...]
    chunks: tuple[Chunk, ...] = ()
    scored: tuple[Scored, ...] = ()
    scored_T: Tensor | None = None
    descriptors: StepDescriptors | None = None
    logits_tokens_T: Tensor | None = None

    @property
    def residents(self) -> Sequence[ResidentAdapter]:
        """The adapters of the batch, each once."""
        return [span.adapter for span in self.adapters.spans]

    @property
    def own_vectors(self) -> StepVectors | None:
        """The vectors of a captured step in which adapters have norms, embedding rows or a RoPE."""
        own = self.descriptors
        return own.vectors if own is not None and Parts.OWN in own.parts else None

    @classmethod
    def of_captured(cls, step: CapturedStep) -> Batch:
        """Make the batch of a captured step, which has no requests to sample for."""
        device = step.token_ids_S.device
        return cls(
            token_ids_T=step.token_ids_S,
            positions_T=step.positions_S,
            attention=step.attention,
            adapters=AdapterBatch((), device=device),
            own_rows=step.own_rows,
            last=tuple(range(step.token_ids_S.shape[0])),
            logits_T=torch.arange(step.token_ids_S.shape[0], device=device),
            sampled=(),
            descriptors=step.descriptors,
        )


def build_batch(
    inputs: Sequence[ChunkInput],
    *,
    block_tokens: int,
    hidden_size: int,
    device: torch.device,
    earlier: AdapterBatch | None = None,
) -> Batch:
    """Make the batch of chunks for one pass. `earlier` are the adapters of an earlier step, whose tables are used again
    if they fit.
    """
    tokens, positions, slots = list[int](), list[int](), list[int]()
    query_start = [0]
    context: list[int] = []
    blocks, num_blocks = list[int](), list[int]()
    spans: list[AdapterSpan] = []
    own: list[tuple[int, int]] = []
    last: list[int] = []
    sampled: list[Chunk] = []
    scored: list[Scored] = []
    scored_tokens: list[int] = []
    for adapter, start, ids, own_blocks, num_sampled, tokens_to_score, chunk in sorted(inputs, key=_order):
        at, stop = len(tokens), start + len(ids)
        tokens.extend(ids)
        positions.extend(range(start, stop))
        slots.extend(own_blocks[p // block_tokens] * block_tokens + p % block_tokens for p in range(start, stop))
        query_start.append(len(tokens))
        context.append(stop)
        blocks.extend(own_blocks)
        num_blocks.append(len(own_blocks))
        if adapter is not None:
            if spans and spans[-1].adapter is adapter:
                spans[-1] = AdapterSpan(adapter, spans[-1].start, len(tokens))
            else:
                spans.append(AdapterSpan(adapter, at, len(tokens)))
            if adapter.token_row:
                own.extend((at + i, adapter.token_row[t]) for i, t in enumerate(ids) if t in adapter.token_row)
        if tokens_to_score:
            scored_tokens.extend(at + t - start for t in tokens_to_score)
            if chunk is not None:
                scored.append(Scored(chunk.request, tokens_to_score.start, tokens_to_score.stop))
        if num_sampled:
            last.extend(range(len(tokens) - num_sampled, len(tokens)))
            if chunk is not None:
                sampled.append(chunk)

    def tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    tables = torch.split(tensor(blocks), num_blocks)  # one copy to the device for all
    own_rows = None
    if own:
        tokens_N, offsets_N = tensor([t for t, _ in own]), tensor([offset for _, offset in own])
        own_rows = RowOverrides(tokens_N, RowTables(((0, hidden_size, offsets_N),)))
    return Batch(
        token_ids_T=tensor(tokens),
        positions_T=tensor(positions),
        attention=AttentionMeta(tuple(query_start), tuple(context), tables, tensor(slots)),
        adapters=earlier if earlier is not None and earlier.is_for(spans) else AdapterBatch(spans, device=device),
        own_rows=own_rows,
        last=tuple(last),
        logits_T=tensor(last),
        sampled=tuple(sampled),
        chunks=tuple(i.chunk for i in inputs if i.chunk is not None),
        scored=tuple(scored),
        scored_T=tensor(scored_tokens) if scored_tokens else None,
    )


def _order(chunk: ChunkInput) -> tuple[str, str]:
    if (adapter := chunk.adapter) is None:
        return ("", "")
    return (adapter.pair.digest if adapter.pair is not None else "", adapter.ref.digest)


def logits_part(batch: Batch) -> Batch | None:
    """Make the batch of the tokens whose logits are needed; None where it would save too little.

    Of a prompt only the last token's logits are needed, so in the last layer its other tokens need keys and values and
    nothing else: no attention, no output projection and no MLP. The part has one token if none is needed, since ops
    take no empty batch; it has no logits.
    """
    num = batch.token_ids_T.shape[0]
    tokens = batch.last or (num - 1,)
    if batch.scored_T is not None or 2 * len(tokens) > num:
        return None
    device, attention = batch.token_ids_T.device, batch.attention
    logits_tokens_T = torch.tensor(tokens, dtype=torch.int64, device=device)
    ends = attention.query_start[1:]
    sequences = [bisect_right(ends, token) for token in tokens]
    spans = [
        AdapterSpan(a, bisect_left(tokens, start), bisect_left(tokens, stop)) for a, start, stop in batch.adapters.spans
    ]
    return Batch(
        token_ids_T=batch.token_ids_T[logits_tokens_T],
        positions_T=batch.positions_T[logits_tokens_T],
        attention=AttentionMeta(
            tuple(range(len(tokens) + 1)),
            tuple(attention.context_len[i] - (ends[i] - 1 - token) for i, token in zip(sequences, tokens, strict=True)),
            tuple(attention.block_table[i] for i in sequences),
            attention.slot_mapping_T[logits_tokens_T],
        ),
        adapters=AdapterBatch([span for span in spans if span.stop > span.start], device=device),
        own_rows=None,
        logits_T=torch.arange(len(batch.last), device=device),
        last=tuple(range(len(batch.last))),
        sampled=batch.sampled,
        logits_tokens_T=logits_tokens_T,
    )
