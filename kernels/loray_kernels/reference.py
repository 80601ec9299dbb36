"""The ops in torch: loops over sequences and adapters, gathers by index, intermediates in fp32. Other backends are
tested against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from loray_kernels.decode import CapturedDecoding, CapturedStep, Decoding, Parts, StepDescriptors
from loray_kernels.descriptors import (
    INPUTS,
    MAX_ROWS,
    Columns,
    InputShape,
    LoraRows,
    Pair,
    RowOverrides,
    RowTables,
    StepVectors,
    read_descriptor,
)
from loray_kernels.experts import ExpertGroups, has_expert_lora
from loray_kernels.kv import AttentionMeta, DirectWriter, KvLayout, PageWriter
from loray_kernels.ops import (
    AdapterSegments,
    ExpertWeights,
    LayerWeights,
    LinearWeights,
    LoraTable,
    ProjectionMatrix,
    QuantizedWeight,
    Scoring,
    StepInputs,
    TablesOf,
    VeraTable,
    Weight,
    join_weights,
)
from loray_kernels.sampling import Chooser, Drawn, Draws, ReferenceChooser, TokenSlots, sample


def gather_rows(pool: Tensor, rows: RowTables, layer_offset: int, start: int = 0, stop: int | None = None) -> Tensor:
    """Gather rows start:stop into (rows, width), in the pool's dtype; any values where offsets are negative."""
    parts = []
    for _, width, offsets_R in rows.segments:
        # Row i of this view is the `width` elements from i on: rows overlap, and a row's index is its offset.
        view = pool.as_strided((pool.numel() - width + 1, width), (1, 1))
        parts.append(view.index_select(0, (offsets_R[start:stop] + layer_offset).clamp_(min=0)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def gather_inputs(pool: Tensor, rows: RowTables, layer_offset: int, start: int = 0, stop: int | None = None) -> Tensor:
    """Gather rows of one adapter's A as `gather_rows` does, in fp32; those that are not in the pool are made."""
    first_R = rows.segments[0][2][start:stop]
    if not len(first_R) or first_R[0] >= 0:
        return gather_rows(pool, rows, layer_offset, start, stop).float()
    parts = []
    for _, width, offsets_R in rows.segments:
        period_R1, first_R1 = (~offsets_R[start:stop, None]) >> 32, (~offsets_R[start:stop, None]) & 0xFFFFFFFF
        parts.append((torch.arange(width, device=pool.device) % period_R1 == first_R1).float())
    return torch.cat(parts, dim=1)


def kv_parts(pool: Tensor, layout: KvLayout) -> tuple[Tensor, Tensor | None]:
    """View keys and values as (block, layer, K or V, position, KV head, d), and the scales of int8 as (block, layer,
    K or V, KV head, position).
    """
    heads, tokens, d = layout.num_kv_heads, layout.block_tokens, layout.head_dim
    shares = pool.view(-1, layout.num_layers, layout.layer_share)
    if not layout.int8_per_element:
        return shares.view(*shares.shape[:2], 2, tokens, heads, d), None
    size = 2 * tokens * heads * d
    kv, scales = shares.view(torch.int8)[..., :size], shares.view(torch.float32)[..., size // 4 :]
    return kv.view(*kv.shape[:2], 2, tokens, heads, d), scales.view(*kv.shape[:2], 2, heads, tokens)


def quantize_rows(x_TI: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Round rows so that the largest element is the largest value: q (T, I), and each row's scale, fp32 (T, 1).

    x ≈ scale · q; the scale is max|x| / 127 for int8, / 448 for float8_e4m3fn, and q is x · (127 / max|x|) in fp32,
    rounded to nearest, ties to even. A row of zeros has q = 0; one that is not finite has the scale NaN and q = 0, so
    all that comes of it is NaN.
    """
    most = 127 if dtype is torch.int8 else torch.finfo(dtype).max
    x32_TI = x_TI.float()
    largest_T1 = x32_TI.abs().amax(dim=1, keepdim=True)
    q_TI, scale_T1 = _rounded(x32_TI, largest_T1, largest_T1, most, to_whole=dtype is torch.int8)
    return q_TI.clamp_(-most, most).to(dtype), scale_T1


def quantize_activations(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows as `quantize_rows` does to int8, but with outliers: q, int32 (T, I), and each row's scale.

    A few elements are a hundred times larger than the others of their row, and a scale by them would leave these no
    digits. So a row's 127 is no more than 8 times its mean magnitude, and q goes on beyond it, to 127 · 128 at most.
    There are fewer than I / 8 such elements, and together they are no more than I / 8 times 127. The mean is that of
    |x| · (32767 / max|x|) rounded to whole numbers, whose sum has the same bits in any order.
    """
    x32_TI = x_TI.float()
    largest_T1 = x32_TI.abs().amax(dim=1, keepdim=True)
    whole_TI, _ = _rounded(x32_TI.abs(), largest_T1, largest_T1, 32767, to_whole=True)
    total_T1 = whole_TI.long().sum(dim=1, keepdim=True).float()
    share_T1 = total_T1 / torch.full_like(total_T1, 32767 * x_TI.shape[1])
    limit_T1 = largest_T1 * (share_T1 * 8).clamp_(1 / 128, 1)
    q_TI, scale_T1 = _rounded(x32_TI, largest_T1, limit_T1, 127, to_whole=True)
    return q_TI.int(), scale_T1


def _rounded(
    x_TI: Tensor, largest_T1: Tensor, limit_T1: Tensor, most: float, *, to_whole: bool
) -> tuple[Tensor, Tensor]:
    """x · (most / limit), and limit / most, in fp32."""
    is_finite_T1 = largest_T1.isfinite()
    most_T1 = torch.full_like(largest_T1, most)  # torch would take the inverse of one operand that is a number
    scale_T1 = torch.where(is_finite_T1, limit_T1 / most_T1, torch.nan)
    # So small a maximum that its inverse is infinite counts as zero.
    inverse_T1 = torch.where(largest_T1 >= _LEAST, most_T1 / limit_T1, 0.0)
    q_TI = torch.where(is_finite_T1, x_TI * inverse_T1, 0.0)
    return (q_TI.round_() if to_whole else q_TI), scale_T1


def quantized_linear(
    x_TI: Tensor, weight: QuantizedWeight, bias_O: Tensor | None = None, *, keeps_outliers: bool = True
) -> Tensor:
    """y = x Wᵀ + bias of activations that are rounded row by row, in x's dtype, (T, O).

    With the columns k of a group g:  y = scale_x · Σ_g scale_g · (Σ_k q_x · (q − zero_g)) + bias. For int8 and int4 the
    inner sums are exact, since zeros are whole numbers; what is outside of them is in fp32, in this order, and rounded
    once at the end. Activations are rounded by `quantize_activations`, or by `quantize_rows`, which also rounds those
    that meet weights in float8 to float8.
    """
    is_float = weight.q_OI.dtype.is_floating_point
    if is_float or not keeps_outliers:
        q_TI, scale_T1 = quantize_rows(x_TI, weight.q_OI.dtype if is_float else torch.int8)
    else:
        q_TI, scale_T1 = quantize_activations(x_TI)
    exact = torch.float32 if is_float else torch.float64
    in_groups = (weight.scale_OG.shape[1], weight.group)
    values_GOg = weight.values().to(exact).reshape(-1, *in_groups).transpose(0, 1)
    zeros_GO1 = weight.zeros().to(exact).T.unsqueeze(-1)
    q_GTg = q_TI.to(exact).view(-1, *in_groups).transpose(0, 1)
    sums_GTO = q_GTg @ (values_GOg - zeros_GO1).transpose(1, 2)
    y_TO = torch.zeros_like(sums_GTO[0], dtype=torch.float32)
    for sums_TO, scale_O in zip(sums_GTO.float(), weight.scale_OG.T, strict=True):
        y_TO += sums_TO * scale_O
    y_TO *= scale_T1
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(x_TI.dtype)


class ReferenceOps:
    """The equation of every op, and the op in torch. Intermediates are fp32, and other backends round values where
    these are rounded. A backend overrides what it has kernels for.
    """

    def is_batch_invariant(self, dtype: torch.dtype) -> bool:
        """Say whether a token's result over a pool of `dtype` has the same bits whatever else is in its batch."""
        return False

    def page_writer(self, pool: Tensor) -> PageWriter:
        """Give what writes adapters from host memory into `pool`."""
        return DirectWriter(pool)

    def captured_decoding(
        self, forward: Callable[[CapturedStep], Tensor], decoding: Decoding
    ) -> CapturedDecoding | None:
        """Give what captures `forward`, when it is told to, and replays it; None if this backend captures nothing.

        The launches of `forward` must not depend on a step's values. It gives a row for each sequence.
        """
        return None

    def decoder_layers(
        self, x_TD: Tensor, weights: Sequence[LayerWeights], tables: TablesOf, step: StepInputs, first: int
    ) -> Tensor | None:
        """Compute the layers from `first` on in one call, with the bits of their ops; None if there is no such call.

        May write `x_TD`.
        """
        return None

    def has_kernel(self, weight: QuantizedWeight) -> bool:
        """Say whether `pack_linear` keeps this weight quantised; else it is to be dequantised before."""
        return True

    def pack_linear(self, weights: Sequence[Weight], bias_O: Tensor | None = None) -> LinearWeights:
        """Put matrices of one input side by side, in the layout that `linear` and `logits` read; the originals may be
        freed. ValueError if they are quantised in different ways.
        """
        joined = join_weights(weights)
        return LinearWeights(joined.shape[1], joined.shape[0], joined, bias_O)

    def linear(self, x_TI: Tensor, weights: LinearWeights) -> Tensor:
        """y = x Wᵀ + bias, (T, O); of a quantised weight as `quantized_linear`."""
        if isinstance(weights.data, QuantizedWeight):
            return quantized_linear(x_TI, weights.data, weights.bias_O)
        return F.linear(x_TI, weights.data, weights.bias_O)

    def logits(self, x_TD: Tensor, weights: LinearWeights) -> Tensor:
        """Give the results of `linear`, which are rounded to x's dtype, in fp32."""
        return self.linear(x_TD, weights).float()

    def sample(self, logits_SV: Tensor, draws: Draws, slots: TokenSlots | None = None) -> Drawn:
        """Draw a token for each of the draws' rows, also into `slots`; it is read before the call after the next."""
        drawn = sample(logits_SV, draws)
        if slots is not None:
            slots.tokens[slots.slots_S[list(draws.rows)]] = torch.tensor(drawn[0], device=slots.tokens.device)
        return lambda: drawn

    def chooser(self, logits_SV: Tensor) -> Chooser:
        """Give what chooses tokens of all rows of logits like these, whatever requests change."""
        return ReferenceChooser(self.sample)

    def silu_mul(self, gate_up_TM: Tensor) -> Tensor:
        """silu(gate) · up, (T, M), from (T, 2 M) with gate first."""
        gate_TM, up_TM = gate_up_TM.chunk(2, dim=-1)
        return F.silu(gate_TM) * up_TM

    def gelu_mul(self, gate_up_TM: Tensor) -> Tensor:
        """gelu(gate) · up with GELU's approximation by tanh (GeGLU), shapes as of `silu_mul`."""
        gate_TM, up_TM = gate_up_TM.chunk(2, dim=-1)
        return F.gelu(gate_TM, approximate="tanh") * up_TM

    def clamped_mul(self, gate_up_TM: Tensor, limit: float) -> Tensor:
        """gpt-oss's g · σ(1.702 g) · (u + 1) with g = min(gate, limit) and u = up within ± limit, in fp32; shapes as of
        `silu_mul`.
        """
        gate_TM, up_TM = gate_up_TM.float().chunk(2, dim=-1)
        gate_TM = gate_TM.clamp(max=limit)
        return (gate_TM * torch.sigmoid(1.702 * gate_TM) * (up_TM.clamp(-limit, limit) + 1)).to(gate_up_TM.dtype)

    def choose_experts(self, logits_TE: Tensor, per_token: int, *, normalised: bool) -> tuple[Tensor, Tensor]:
        """Give each token's experts, (T, K), the one with the largest logit first, of equal ones the first; and its
        shares of their results, (T, K) in fp32: a softmax over these logits, or over all unless it is `normalised`.
        """
        sorted_TE, experts_TE = logits_TE.float().sort(dim=1, descending=True, stable=True)
        weights_TE = (sorted_TE - sorted_TE[:, :1]).exp()
        own_TK = weights_TE[:, :per_token]
        return experts_TE[:, :per_token], own_TK / (own_TK if normalised else weights_TE).sum(dim=1, keepdim=True)

    def experts(
        self,
        x_TD: Tensor,
        weights: ExpertWeights,
        pool: Tensor,
        lora: Mapping[str, LoraTable],
        segments: AdapterSegments,
        layer_offset: int,
    ) -> Tensor:
        """Σ share · down(silu(gate x) · up x) over each token's experts, (T, D), with LoRA of gate_proj, up_proj and
        down_proj: of these an adapter has rows for each expert, one after the other.

        An expert's tokens are multiplied with it together. A token's results are rounded to x's dtype and added in fp32
        in the order of its experts, so its sum is the same in any batch if its products are.
        """
        logits_TE = self.logits(x_TD, weights.router)
        experts_TK, shares_TK = self.choose_experts(logits_TE, weights.per_token, normalised=weights.normalised)
        groups = ExpertGroups.of(experts_TK, len(weights.down))
        runs = groups.runs(segments, x_TD.shape[0]) if has_expert_lora(lora) else None

        def products(x_PI: Tensor, matrices: Sequence[LinearWeights], *modules: str) -> Tensor:
            y_PO = x_PI.new_empty(x_PI.shape[0], matrices[0].out_features)
            for rows, matrix in zip(groups.rows, matrices, strict=True):
                if rows.start < rows.stop:
                    y_PO[rows] = self.linear(x_PI[rows], matrix)
            own = [(y, lora[m]) for y, m in zip(y_PO.chunk(len(modules), dim=1), modules, strict=True) if m in lora]
            if runs is not None and own:
                tables = tuple(runs.table(table, len(matrices)) for _, table in own)
                h = self.lora_shrink(x_PI, pool, tables, runs.segments, layer_offset)
                self.lora_expand(tuple(y for y, _ in own), h, pool, tables, runs.segments, layer_offset)
            return y_PO

        gate_up_PM = products(x_TD[groups.tokens_P], weights.gate_up, "gate_proj", "up_proj")
        limit = weights.limit
        middle_PM = self.silu_mul(gate_up_PM) if limit is None else self.clamped_mul(gate_up_PM, limit)
        y_PD = products(middle_PM, weights.down, "down_proj")
        return groups.summed(y_PD, shares_TK)

    def embed(self, table_VD: Tensor, token_ids_T: Tensor, pool: Tensor, own: RowOverrides | None) -> Tensor:
        """x_TD: rows of `table_VD`; for the tokens of `own` their rows, where offsets are not negative."""
        x_TD = F.embedding(token_ids_T, table_VD)
        if own is not None:
            own_ND = gather_rows(pool, own.rows, 0).to(x_TD.dtype)
            x_TD[own.tokens_N] = torch.where(_has_row(own), own_ND, x_TD[own.tokens_N])
        return x_TD

    def rms_norm(
        self,
        x_TD: Tensor,
        weight_D: Tensor,
        eps: float,
        pool: Tensor,
        own: RowOverrides | None,
        layer_offset: int,
        weight_offset: float = 0.0,
    ) -> Tensor:
        """x / rms(x) · weight, rms in fp32; the weight of the tokens of `own` is their row, where offsets are not
        negative. Also for (T, heads, d). With a `weight_offset` the weight is offset + weight, and only the product is
        rounded, as Gemma has it.
        """
        x32_TD = x_TD.float()
        normal_TD = x32_TD * torch.rsqrt(x32_TD.pow(2).mean(-1, keepdim=True) + eps)
        if not weight_offset:
            normal_TD = normal_TD.to(x_TD.dtype)

        def weighted(weight_D: Tensor, normal_TD: Tensor) -> Tensor:
            if weight_offset:
                return ((weight_offset + weight_D.float()) * normal_TD).to(x_TD.dtype)
            return weight_D * normal_TD

        y_TD = weighted(weight_D, normal_TD)
        if own is not None:
            weight_ND = gather_rows(pool, own.rows, layer_offset)
            if x_TD.dim() == 3:  # one weight for every head of a token
                weight_ND = weight_ND.unsqueeze(1)
            own_ND = weighted(weight_ND.to(x_TD.dtype), normal_TD[own.tokens_N])
            has_N1 = _has_row(own).view(-1, *[1] * (x_TD.dim() - 1))
            y_TD[own.tokens_N] = torch.where(has_N1, own_ND, y_TD[own.tokens_N])
        return y_TD

    def add_rms_norm(
        self,
        x_TD: Tensor,
        added_TD: Tensor,
        weight_D: Tensor,
        eps: float,
        pool: Tensor,
        own: RowOverrides | None,
        layer_offset: int,
        weight_offset: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """x + added, and the `rms_norm` of that."""
        sum_TD = x_TD + added_TD
        return sum_TD, self.rms_norm(sum_TD, weight_D, eps, pool, own, layer_offset, weight_offset)

    def rope_kv(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, step: StepInputs, layer: int) -> Tensor:
        """Queries with their halves rotated: x · cos + (−x₂, x₁) · sin. Writes the pool: keys, rotated, and values at
        the step's slots, as `KvLayout` has them. Of a head that is wider than cos and sin only so many elements are
        rotated, the first ones.
        """

        def turned(x_THd: Tensor) -> Tensor:
            x_THd, rest_THd = torch.split(x_THd, [width := step.cos_Td.shape[1], x_THd.shape[2] - width], dim=2)
            first, second = x_THd.chunk(2, dim=-1)
            y_THd = x_THd * step.cos_Td.unsqueeze(1) + torch.cat((-second, first), dim=-1) * step.sin_Td.unsqueeze(1)
            return torch.cat((y_THd, rest_THd), dim=2) if rest_THd.shape[2] else y_THd

        (cache, scales), block_tokens = kv_parts(step.pool, step.layout), step.layout.block_tokens
        block, position = step.attention.slot_mapping_T // block_tokens, step.attention.slot_mapping_T % block_tokens
        for part, x_TKd in enumerate((turned(k_TKd), v_TKd)):
            if scales is not None:
                q, scale = quantize_rows(x_TKd.reshape(-1, step.layout.head_dim))
                x_TKd, scales[block, layer, part, :, position] = q.view(x_TKd.shape), scale.view(x_TKd.shape[:2])
            cache[block, layer, part, position] = x_TKd.to(cache.dtype)
        return turned(q_THd)

    def paged_attention(
        self,
        q_THd: Tensor,
        pool: Tensor,
        layout: KvLayout,
        layer: int,
        meta: AttentionMeta,
        scoring: Scoring,
    ) -> Tensor:
        """Causal attention of each sequence's last tokens over its cache (int8 is dequantised to fp32); (T, H, d)."""
        scale, window, soft_cap, sinks_H = scoring.scale, scoring.window, scoring.soft_cap, scoring.sinks_H
        cache, scales = kv_parts(pool, layout)
        out_THd = torch.empty_like(q_THd)
        group = q_THd.shape[1] // layout.num_kv_heads
        for i, context in enumerate(meta.context_len):
            start, stop = meta.query_start[i], meta.query_start[i + 1]
            num_queries = stop - start
            first = 0 if window is None else max(0, context - num_queries - window + 1)
            begin = first // layout.block_tokens
            blocks = meta.block_table[i][begin : -(-context // layout.block_tokens)]
            kv = cache[blocks, layer].transpose(0, 1)
            if scales is not None:
                kv = kv.float() * scales[blocks, layer].permute(1, 0, 3, 2).unsqueeze(-1)
            kv = kv.reshape(2, -1, layout.num_kv_heads, layout.head_dim)
            begin *= layout.block_tokens
            k_KCd, v_KCd = kv[:, first - begin : context - begin].permute(0, 2, 1, 3)
            # The query heads of one key/value head become queries of it, so that no keys are copied.
            q_KQd = q_THd[start:stop].transpose(0, 1).reshape(layout.num_kv_heads, group * num_queries, -1)
            mask = None
            if num_queries > 1:
                position_Q1 = torch.arange(context - num_queries, context, device=pool.device).repeat(group)[:, None]
                key_C = torch.arange(first, context, device=pool.device)
                mask = key_C <= position_Q1
                if window is not None:
                    mask &= key_C > position_Q1 - window
            if soft_cap is None and sinks_H is None and scales is None:
                k_KCd, v_KCd = k_KCd.to(q_THd.dtype), v_KCd.to(q_THd.dtype)
                attended = F.scaled_dot_product_attention(q_KQd[None], k_KCd[None], v_KCd[None], mask, scale=scale)[0]
            else:
                score_KQC = (q_KQd.float() @ k_KCd.float().mT) * scale
                if soft_cap is not None:
                    score_KQC = soft_cap * torch.tanh(score_KQC / soft_cap)
                if mask is not None:
                    score_KQC = score_KQC.masked_fill(~mask, -math.inf)
                if sinks_H is not None:
                    sinks_KQ1 = sinks_H.float().view(-1, group).repeat_interleave(num_queries, dim=1).unsqueeze(-1)
                    score_KQC = torch.cat((score_KQC, sinks_KQ1), dim=-1)
                attended = (score_KQC.softmax(-1)[..., : k_KCd.shape[1]] @ v_KCd.float()).to(q_THd.dtype)
            out_THd[start:stop] = attended.reshape(-1, num_queries, layout.head_dim).transpose(0, 1)
        return out_THd

    def lora_shrink(
        self, x_TI: Tensor, pool: Tensor, tables: tuple[LoraTable, ...], segments: AdapterSegments, layer_offset: int
    ) -> tuple[Tensor, ...]:
        """h = A x in fp32, one (T, max rank) for each table, in one launch: all tables share the input.

        Where A is not in the pool, h is sums of the input's columns, see `ops`.
        """
        x32_TI = x_TI.float()
        out = []
        for table in tables:
            h_TR = x32_TI.new_zeros(x_TI.shape[0], table.max_rank)
            for n, rank in enumerate(table.ranks):
                if rank:
                    first = table.rank_start[n]
                    a_RI = gather_inputs(pool, table.a, layer_offset, first, first + rank)
                    rows = slice(segments.start[n], segments.stop[n])
                    h_TR[rows, :rank] = x32_TI[rows] @ a_RI.T
            out.append(h_TR)
        return tuple(out)

    def lora_expand(
        self,
        outputs: tuple[Tensor, ...],
        h: tuple[Tensor, ...],
        pool: Tensor,
        tables: tuple[LoraTable, ...],
        segments: AdapterSegments,
        layer_offset: int,
    ) -> None:
        """y += scale · B h for each (y, h, table), accumulated in fp32, in one launch. Writes `outputs`."""
        for y_TO, h_TR, table in zip(outputs, h, tables, strict=True):
            for n, (first, last) in enumerate(pairwise(table.rank_start)):
                if last > first:
                    b_RO = gather_rows(pool, table.b, layer_offset, first, last).float()
                    rows = slice(segments.start[n], segments.stop[n])
                    delta = (h_TR[rows, : last - first] @ b_RO) * table.scale[n]
                    y_TO[rows] = (y_TO[rows].float() + delta).to(y_TO.dtype)

    def add_adapters(
        self,
        x_TI: Tensor,
        y_TO: Tensor,
        bias_O: Tensor | None,
        pool: Tensor,
        descriptors: StepDescriptors,
        field: int,
        layer_offset: int,
    ) -> None:
        """Add what the descriptors have at `field`, which is layer × inputs + the input: LoRA's rows as `lora_shrink`
        and `lora_expand` do, then VeRA's vectors as `vera_shrink` and `vera_expand`, then scales as `scale_rows`
        and `turn_rows`; of these the step's parts. `y_TO`, which is written, has the input's modules side by side.
        """
        shape, vectors = descriptors.table.inputs[field % len(INPUTS)], descriptors.vectors
        if Parts.LORA in descriptors.parts:
            _add_lora(x_TI, y_TO, pool, descriptors, field, layer_offset)
        if Parts.VERA in descriptors.parts:
            assert vectors is not None
            _add_vera(x_TI, y_TO, pool, shape, vectors, field, layer_offset)
        if Parts.SCALE in descriptors.parts:
            assert vectors is not None
            scaling_T = vectors.words[vectors.starts_S + vectors.shape.scaling_word]
            for module, layer, columns in vectors.modules(field, "scale"):
                own, bias = vectors.token_rows(layer, module, "scale"), None if bias_O is None else bias_O[columns]
                turn, y_TM = vectors.token_rows(layer, module, "turn").rows, y_TO[:, columns]
                plain_TM, whole_TM, turned_TM = (y_TM.clone() for _ in range(3))
                self.scale_rows(plain_TM, bias, pool, own, layer_offset)
                self.scale_rows(whole_TM, None, pool, own, layer_offset)
                self.turn_rows(turned_TM, pool, own, turn, scaling_T.clamp(min=1), layer_offset)
                scaling_T1 = scaling_T.unsqueeze(1)
                scaled_TM = torch.where(scaling_T1 == 0, plain_TM, torch.where(scaling_T1 < 0, whole_TM, turned_TM))
                y_TM.copy_(torch.where(_has_row(own), scaled_TM, y_TM))

    def vera_shrink(self, x_TI: Tensor, a_RI: ProjectionMatrix) -> Tensor:
        """z = A[:, :I] x in fp32, (T, R); dense, for all adapters of the pair and all modules of the input."""
        return x_TI.float() @ a_RI.data[:, : x_TI.shape[1]].float().T

    def vera_expand(self, y_TO: Tensor, z_TR: Tensor, pool: Tensor, table: VeraTable, layer_offset: int) -> None:
        """y[start:stop] += b ⊙ (B[:O] (d ⊙ z)) with each token's d and b, and d ⊙ z in y's dtype. Writes `y_TO`."""
        rows = slice(table.start, table.stop)
        d_TR = gather_rows(pool, table.d, layer_offset).float()
        b_TO = gather_rows(pool, table.b, layer_offset).float()
        scaled_TR = (z_TR * d_TR).to(y_TO.dtype).float()
        delta = scaled_TR @ table.b_OR.data[: y_TO.shape[1]].float().T * b_TO
        y_TO[rows] = (y_TO[rows].float() + delta).to(y_TO.dtype)

    def scale_rows(
        self, y_TO: Tensor, bias_O: Tensor | None, pool: Tensor, own: RowOverrides, layer_offset: int
    ) -> None:
        """y += row ⊙ (y − bias) for the tokens of `own`, whose rows are the scale less one: DoRA's, and without a bias
        IA³'s. Writes `y_TO`.
        """
        for part in _parts(own, y_TO):
            tokens_C = own.tokens_N[part]
            y_CO = y_TO[tokens_C].float()
            plain_CO = y_CO if bias_O is None else y_CO - bias_O.float()
            rows_CO = gather_rows(pool, own.rows, layer_offset, part.start, part.stop).float()
            y_TO[tokens_C] = (y_CO + rows_CO * plain_CO).to(y_TO.dtype)

    def turn_rows(
        self, y_TO: Tensor, pool: Tensor, own: RowOverrides, turn: RowTables, distance_N: Tensor, layer_offset: int
    ) -> None:
        """RoAd: y += row ⊙ y + turn ⊙ y′ for the tokens of `own`. In groups of 2 · distance outputs, y′ has in the
        place of each the one that is `distance` away, its partner. Writes `y_TO`.
        """
        columns_O = torch.arange(y_TO.shape[1], device=y_TO.device)
        for part in _parts(own, y_TO):
            tokens_C, distance_C1 = own.tokens_N[part], distance_N[part].unsqueeze(1)
            y_CO = y_TO[tokens_C].float()
            is_second = columns_O // distance_C1 % 2 == 1
            partner_CO = (columns_O + torch.where(is_second, -distance_C1, distance_C1)).clamp(max=y_TO.shape[1] - 1)
            rows_CO, turn_CO = (
                gather_rows(pool, rows, layer_offset, part.start, part.stop).float() for rows in (own.rows, turn)
            )
            y_TO[tokens_C] = (y_CO + rows_CO * y_CO + turn_CO * y_CO.gather(1, partner_CO)).to(y_TO.dtype)


_LEAST = 1e-30  # of the largest element of a row, below which the row counts as zeros
_SCALED_AT_ONCE = 1 << 24  # outputs: a prompt's in fp32, and their partners' numbers, are many times the step's memory


def _parts(own: RowOverrides, y_TO: Tensor) -> Iterator[slice]:
    """Yield the parts of the tokens of `own` that are scaled at once."""
    most = max(1, _SCALED_AT_ONCE // y_TO.shape[1])
    return (slice(start, start + most) for start in range(0, len(own.tokens_N), most))


def _has_row(own: RowOverrides) -> Tensor:
    return own.rows.segments[0][2].unsqueeze(1) >= 0  # (N, 1)


def _row_tables(columns: Columns, offsets: Sequence[Sequence[int]]) -> RowTables:
    return RowTables(tuple((c, w, torch.tensor(own)) for (c, w), own in zip(columns, offsets, strict=True)))


def _add_lora(
    x_TI: Tensor, y_TO: Tensor, pool: Tensor, descriptors: StepDescriptors, field: int, layer_offset: int
) -> None:
    shape = descriptors.table.inputs[field % len(INPUTS)]
    outputs = torch.split(y_TO, [sum(width for _, width in columns) for columns in shape.b], dim=1)
    h_TR = torch.zeros(x_TI.shape[0], MAX_ROWS, device=x_TI.device)
    found: list[tuple[slice, list[LoraRows | None]]] = []
    for start, first, num in descriptors.items_S3.tolist():
        own, column = slice(first, first + num), 0
        found.append((own, read_descriptor(descriptors.table.words, start, field, shape) if num else []))
        for lora in (r for r in found[-1][1] if r is not None):
            a_RI = gather_inputs(pool, _row_tables(shape.a, lora.a), layer_offset)
            h_TR[own, column : column + len(a_RI)] = x_TI[own].float() @ a_RI.T
            column += len(a_RI)
    for own, modules in found:
        column = 0
        for y_TM, rows, columns in zip(outputs, modules, shape.b, strict=False):
            if rows is not None:
                b_RM = gather_rows(pool, _row_tables(columns, rows.b), layer_offset).float()
                num = len(rows.a[0])
                own_TR = h_TR[own, column : column + num]
                y_TM[own] = (y_TM[own].float() + rows.scale * (own_TR @ b_RM)).to(y_TM.dtype)
                column += num


def _add_vera(
    x_TI: Tensor, y_TO: Tensor, pool: Tensor, shape: InputShape, vectors: StepVectors, field: int, layer_offset: int
) -> None:
    ops = ReferenceOps()
    for words, first, num in (item for item in vectors.items_S3.tolist() if item[2]):
        pair = Pair(*vectors.words[words : words + len(Pair._fields)].tolist())
        a_RI = pool[pair.a : pair.a + pair.rank * pair.width].view(pair.rank, pair.width)[:, shape.pair_column :]
        z_NR = ops.vera_shrink(x_TI[first : first + num], ProjectionMatrix(a_RI))
        for token, z_1R in enumerate(torch.split(z_NR, 1), first):
            for i, (module, layer, columns) in enumerate(vectors.modules(field, "vera_b")):
                b_at = pair.b + shape.pair_rows[i] * pair.rank
                d, b = (
                    [(c, w, offsets_S[token : token + 1]) for c, w, offsets_S in own.rows.segments]
                    for own in (vectors.token_rows(layer, module, role) for role in ("vera_d", "vera_b"))
                )
                if int(d[0][2]) >= 0:
                    y_1O = y_TO[token : token + 1, columns]
                    b_OR = ProjectionMatrix(pool[b_at : b_at + y_1O.shape[1] * pair.rank].view(-1, pair.rank))
                    own_d = RowTables(((0, pair.rank, d[0][2]),))
                    table = VeraTable(b_OR, b_OR, own_d, RowTables(tuple(b)), 0, 1)
                    ops.vera_expand(y_1O, z_1R, pool, table, layer_offset)
