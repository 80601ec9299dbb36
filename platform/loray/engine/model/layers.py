"""The decoder's layers, applied to a step's tokens with the adapters of the batch.

Shapes: T tokens, I input width, O output width, D hidden, H heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loray.bases.config import ModelConfig
from loray.engine.model.batch import Batch
from loray.engine.pool.pool import Pool, ResidentProjection
from loray_kernels import (
    INPUTS,
    ExpertWeights,
    LayerWeights,
    LinearWeights,
    Ops,
    RowOverrides,
    Scoring,
    StepInputs,
    VeraTable,
    Weight,
)


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """The objects that all layers of one pass share; `inputs`, by RoPE, is the part that a backend needs."""

    batch: Batch
    pool: Pool
    ops: Ops
    inputs: tuple[StepInputs, ...]

    @classmethod
    def of(cls, batch: Batch, pool: Pool, ops: Ops, ropes: Iterable[tuple[Tensor, Tensor]]) -> ForwardContext:
        """`ropes`: cos and sin of each token."""
        shared = pool.tensor, pool.layout, batch.attention, batch.adapters.segments
        return cls(batch, pool, ops, tuple(StepInputs(*shared, cos_Td, sin_Td) for cos_Td, sin_Td in ropes))

    def for_logits(self, part: Batch) -> ForwardContext:
        """Make the context of a part of the batch, see `logits_part`."""
        own_T = part.logits_tokens_T
        return ForwardContext.of(
            part, self.pool, self.ops, ((own.cos_Td[own_T], own.sin_Td[own_T]) for own in self.inputs)
        )

    def offset(self, layer: int) -> int:
        return layer * self.pool.geometry.layer_share


class Linear:
    """Base modules that share an input, as one matrix. LoRA and VeRA of each module are added to its columns, then they
    are scaled (DoRA, IA³, RoAd).

    Where the module is spread over several ranks, `parallel.decoder` overrides the hooks below.
    """

    def __init__(self, layer: int, weights: Mapping[str, Weight], biases: Mapping[str, Tensor], ops: Ops) -> None:
        self._layer = layer
        self.modules = tuple(weights)
        self._field = layer * len(INPUTS) + INPUTS.index(self.modules)
        self._widths = [w.shape[0] for w in weights.values()]
        self._biases = dict(biases)
        bias_O = torch.cat([biases[m] for m in weights]) if biases else None
        # Several are copied when they are joined; one may be a view, which would keep the whole checkpoint in memory.
        own = list(weights.values()) if len(weights) > 1 else [w.clone() for w in weights.values()]
        self.weights = ops.pack_linear(own, bias_O)

    def __call__(self, x_TI: Tensor, step: ForwardContext) -> Tensor:
        """(T, O), the modules side by side."""
        y_TO = step.ops.linear(x_TI, self.weights)
        if (found := step.batch.descriptors) is not None:
            bias_O, pool, offset = self.weights.bias_O, step.pool.tensor, step.offset(self._layer)
            step.ops.add_adapters(x_TI, y_TO, bias_O, pool, found, self._field, offset)
            return y_TO
        outputs = dict(zip(self.modules, torch.split(y_TO, self._widths, dim=1), strict=True))
        self.add_lora(x_TI, outputs, step)
        self.add_vera(x_TI, outputs, step)
        self.scale_outputs(outputs, step)
        return y_TO

    def add_lora(self, x_TI: Tensor, outputs: Mapping[str, Tensor], step: ForwardContext) -> None:
        found = step.batch.adapters.layer(self._layer).lora
        own = [m for m in self.modules if m in found]
        if not own:
            return
        pool, segments, offset = step.pool.tensor, step.batch.adapters.segments, step.offset(self._layer)
        tables = tuple(found[m] for m in own)
        h = step.ops.lora_shrink(x_TI, pool, tables, segments, offset)
        step.ops.lora_expand(tuple(outputs[m] for m in own), h, pool, tables, segments, offset)

    def add_vera(self, x_TI: Tensor, outputs: Mapping[str, Tensor], step: ForwardContext) -> None:
        tables = step.batch.adapters.layer(self._layer).vera
        own = [(m, table) for m in self.modules for table in tables.get(m, ())]
        for span in step.batch.adapters.pairs if own else ():
            inside = [(m, t) for m, t in own if span.start <= t.start and t.stop <= span.stop]
            if not inside:
                continue
            z_TR = self.shrink_vera(x_TI[span.start : span.stop], span.pair, step)
            for module, table in inside:
                z_own_TR, y_TO = z_TR[table.start - span.start : table.stop - span.start], outputs[module]
                table = self.local_vera_table(table, y_TO.shape[1])
                step.ops.vera_expand(y_TO, z_own_TR, step.pool.tensor, table, step.offset(self._layer))

    def scale_outputs(self, outputs: Mapping[str, Tensor], step: ForwardContext) -> None:
        found = step.batch.adapters.layer(self._layer).scales
        pool, offset = step.pool.tensor, step.offset(self._layer)
        for module in self.modules if found else ():
            for table in found.get(module, ()):
                if table.turn is not None:
                    step.ops.turn_rows(outputs[module], pool, table.own, *table.turn, offset)
                else:
                    bias_O = self._biases.get(module) if table.leaves_bias else None
                    step.ops.scale_rows(outputs[module], bias_O, pool, table.own, offset)

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def shrink_vera(self, x_TI: Tensor, pair: ResidentProjection, step: ForwardContext) -> Tensor:
        """Compute z = A x, (T, R) in fp32."""
        return step.ops.vera_shrink(x_TI, pair.a_RI)

    def local_vera_table(self, table: VeraTable, width: int) -> VeraTable:
        """Give the table for this rank's `width` columns of the output."""
        return table


class Linears(NamedTuple):
    """The makers of linear modules, with Linear's arguments: q, k, v, gate and up are `column`, o and down `row`.
    `add_up` adds up the ranks' parts of what experts give, in place.
    """

    column: Callable[[int, Mapping[str, Weight], Mapping[str, Tensor], Ops], Linear]
    row: Callable[[int, Mapping[str, Weight], Mapping[str, Tensor], Ops], Linear]
    add_up: Callable[[Tensor], None]


LOCAL = Linears(Linear, Linear, lambda y_TD: None)  # every module completely on this rank


class RMSNorm:
    """`name` is the path below its layer, as in adapters; layer None is the final norm."""

    def __init__(self, layer: int | None, name: str, weight_D: Tensor, config: ModelConfig) -> None:
        self._layer, self._name = layer, name
        self.weight_D, self._eps, self._offset = weight_D, config.rms_norm_eps, config.norm_offset

    def __call__(self, x_TD: Tensor, step: ForwardContext) -> Tensor:
        return step.ops.rms_norm(x_TD, self.weight_D, self._eps, step.pool.tensor, *self._own(step), self._offset)

    def of_sum(self, x_TD: Tensor, added_TD: Tensor | None, step: ForwardContext) -> tuple[Tensor, Tensor]:
        """Compute x + added, or x if nothing is to be added, and the norm of that."""
        if added_TD is None:
            return x_TD, self(x_TD, step)
        weights = (self.weight_D, self._eps, step.pool.tensor, *self._own(step), self._offset)
        return step.ops.add_rms_norm(x_TD, added_TD, *weights)

    def _own(self, step: ForwardContext) -> tuple[RowOverrides | None, int]:
        """Find the weights of adapters, and their layer's offset."""
        adapters, vectors = step.batch.adapters, step.batch.own_vectors
        offset = 0 if self._layer is None else step.offset(self._layer)
        if vectors is not None:
            return vectors.token_rows(self._layer, self._name, "norm"), offset
        tables = adapters.flat() if self._layer is None else adapters.layer(self._layer)
        return tables.norms.get(self._name), offset


class Attention:
    def __init__(self, layer: int, config: ModelConfig, tensors: Mapping[str, Any], ops: Ops, linears: Linears) -> None:
        prefix = f"model.layers.{layer}.self_attn"
        qkv = ("q_proj", "k_proj", "v_proj")
        self._layer, self._config = layer, config
        self.spec = spec = config.layers[layer]
        biases = {m: tensors[f"{prefix}.{m}.bias"] for m in qkv} if spec.qkv_bias else {}
        self.qkv = linears.column(layer, {m: tensors[f"{prefix}.{m}.weight"] for m in qkv}, biases, ops)
        biases = {"o_proj": tensors[f"{prefix}.o_proj.bias"]} if spec.o_bias else {}
        self.o = linears.row(layer, {"o_proj": tensors[f"{prefix}.o_proj.weight"]}, biases, ops)
        self.scoring = Scoring(
            config.attention_scale(layer),
            spec.window,
            config.attention_soft_cap,
            tensors[f"{prefix}.sinks"] if spec.has_sinks else None,
        )
        self.q_norm = self.k_norm = None
        if spec.qk_norm:
            self.q_norm = RMSNorm(layer, "self_attn.q_norm", tensors[f"{prefix}.q_norm.weight"], config)
            self.k_norm = RMSNorm(layer, "self_attn.k_norm", tensors[f"{prefix}.k_norm.weight"], config)

    def __call__(self, x_TD: Tensor, step: ForwardContext, logits_step: ForwardContext | None = None) -> Tensor:
        """Attend; `logits_step` is that of Layer."""
        c, pool = self._config, step.pool
        widths = [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
        q, k, v = torch.split(self.qkv(x_TD, step), widths, dim=1)
        q_THd = q.reshape(-1, c.num_heads, c.head_dim)
        k_TKd = k.reshape(-1, c.num_kv_heads, c.head_dim)
        v_TKd = v.reshape(-1, c.num_kv_heads, c.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_THd, k_TKd = self.q_norm(q_THd, step), self.k_norm(k_TKd, step)
        q_THd = step.ops.rope_kv(q_THd, k_TKd, v_TKd, step.inputs[self.spec.rope], self._layer)
        if logits_step is not None:
            q_THd, step = q_THd[logits_step.batch.logits_tokens_T], logits_step
        cache, meta = (pool.tensor, pool.layout, self._layer), step.batch.attention
        out_THd = step.ops.paged_attention(q_THd, *cache, meta, self.scoring)
        return self.o(out_THd.flatten(1), step)


class MLP:
    def __init__(self, layer: int, config: ModelConfig, tensors: Mapping[str, Any], ops: Ops, linears: Linears) -> None:
        prefix = f"model.layers.{layer}.mlp"
        self._is_gelu = config.layers[layer].activation == "gelu_tanh"
        gate_up = {m: tensors[f"{prefix}.{m}.weight"] for m in ("gate_proj", "up_proj")}
        self.gate_up = linears.column(layer, gate_up, {}, ops)
        self.down = linears.row(layer, {"down_proj": tensors[f"{prefix}.down_proj.weight"]}, {}, ops)

    def __call__(self, x_TD: Tensor, step: ForwardContext) -> Tensor:
        gate_up_TM = self.gate_up(x_TD, step)
        return self.down(step.ops.gelu_mul(gate_up_TM) if self._is_gelu else step.ops.silu_mul(gate_up_TM), step)


class Experts:
    """A layer's experts, each of which is an MLP on this rank, or the rank's columns of it; see `Experts` in
    `loray.bases.config`.
    """

    def __init__(self, layer: int, config: ModelConfig, tensors: Mapping[str, Any], ops: Ops, linears: Linears) -> None:
        spec, prefix = config.layers[layer].experts, f"model.layers.{layer}.mlp"
        assert spec is not None
        own = [f"{prefix}.experts.{expert}" for expert in range(spec.num)]

        def packed(path: str, *modules: str) -> LinearWeights:
            biases = [tensors[f"{path}{module}.bias"] for module in modules] if spec.bias else []
            weights = [tensors[f"{path}{module}.weight"] for module in modules]
            return ops.pack_linear(weights, torch.cat(biases) if biases else None)

        self.weights = ExpertWeights(
            router=packed(f"{prefix}.", "gate"),
            gate_up=tuple(packed(f"{e}.", "gate_proj", "up_proj") for e in own),
            down=tuple(packed(f"{e}.", "down_proj") for e in own),
            per_token=spec.per_token,
            normalised=spec.normalised,
            limit=spec.limit,
        )
        self._layer, self._add_up = layer, linears.add_up

    def __call__(self, x_TD: Tensor, step: ForwardContext) -> Tensor:
        adapters, pool = step.batch.adapters, step.pool.tensor
        lora, offset = adapters.layer(self._layer).lora, step.offset(self._layer)
        y_TD = step.ops.experts(x_TD, self.weights, pool, lora, adapters.segments, offset)
        self._add_up(y_TD)
        return y_TD


class Layer:
    """x + attention(norm(x)), then x + MLP(norm(x)), op by op; with sandwich norms x + norm(attention(norm(x))),
    likewise. `tensors`: matrices are a `Weight`, others a Tensor.
    """

    def __init__(
        self, layer: int, config: ModelConfig, tensors: Mapping[str, Any], ops: Ops, linears: Linears = LOCAL
    ) -> None:
        def norm(name: str) -> RMSNorm:
            return RMSNorm(layer, name, tensors[f"model.layers.{layer}.{name}.weight"], config)

        spec = config.layers[layer]
        self.number, self.rope, self.is_local = layer, spec.rope, linears is LOCAL
        self._attention_norm = norm("input_layernorm")
        self._attention = Attention(layer, config, tensors, ops, linears)
        self._post_attention_norm: RMSNorm | None = None
        self._post_mlp_norm: RMSNorm | None = None
        if spec.norms == "sandwich":
            self._post_attention_norm = norm("post_attention_layernorm")
            self._mlp_norm = norm("pre_feedforward_layernorm")
            self._post_mlp_norm = norm("post_feedforward_layernorm")
        else:
            self._mlp_norm = norm("post_attention_layernorm")
        attention, experts = self._attention, None
        self._mlp: Callable[[Tensor, ForwardContext], Tensor]
        if spec.experts is None:
            self._mlp = mlp = MLP(layer, config, tensors, ops, linears)
            gate_up, down = mlp.gate_up.weights, mlp.down.weights
        else:
            self._mlp = mixture = Experts(layer, config, tensors, ops, linears)
            experts = mixture.weights
            gate_up, down = experts.gate_up[0], experts.down[0]
        self.weights = LayerWeights(
            attention_norm_D=self._attention_norm.weight_D,
            qkv=attention.qkv.weights,
            q_norm_d=None if attention.q_norm is None else attention.q_norm.weight_D,
            k_norm_d=None if attention.k_norm is None else attention.k_norm.weight_D,
            o=attention.o.weights,
            mlp_norm_D=self._mlp_norm.weight_D,
            gate_up=gate_up,
            down=down,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            scoring=attention.scoring,
            norm_offset=config.norm_offset,
            activation=spec.activation,
            post_attention_norm_D=None if self._post_attention_norm is None else self._post_attention_norm.weight_D,
            post_mlp_norm_D=None if self._post_mlp_norm is None else self._post_mlp_norm.weight_D,
            experts=experts,
        )

    def __call__(
        self, x_TD: Tensor, added_TD: Tensor | None, step: ForwardContext, logits_step: ForwardContext | None = None
    ) -> tuple[Tensor, Tensor]:
        """Go from x, and what is to be added to it, to the same behind the layer; (T, D). So the next norm also adds.

        logits_step  of the tokens for which alone the result is computed, once all have keys and values
        """
        x_TD, normal_TD = self._attention_norm.of_sum(x_TD, added_TD, step)
        attended_TD = self._attention(normal_TD, step, logits_step)
        if logits_step is not None:
            x_TD, step = x_TD[logits_step.batch.logits_tokens_T], logits_step
        if self._post_attention_norm is not None:
            attended_TD = self._post_attention_norm(attended_TD, step)
        x_TD, normal_TD = self._mlp_norm.of_sum(x_TD, attended_TD, step)
        result_TD = self._mlp(normal_TD, step)
        return x_TD, result_TD if self._post_mlp_norm is None else self._post_mlp_norm(result_TD, step)


def through(layers: Sequence[Layer], x_TD: Tensor, step: ForwardContext) -> Tensor:
    """Compute (T, D) after consecutive layers, in one call for those with the same RoPE if the backend has one; may
    write `x_TD`.

    With other linears than LOCAL the ranks communicate inside a layer, so it runs op by op.
    """
    rest, tables = layers, step.batch.adapters.layer
    for rope, same in groupby(layers, key=lambda layer: layer.rope):
        weights = [layer.weights for layer in same] if rest[0].is_local else []
        y_TD = step.ops.decoder_layers(x_TD, weights, tables, step.inputs[rope], rest[0].number) if weights else None
        if y_TD is None:
            break
        x_TD, rest = y_TD, rest[len(weights) :]
    added_TD: Tensor | None = None
    for layer in rest:
        x_TD, added_TD = layer(x_TD, added_TD, step)
    return x_TD if added_TD is None else x_TD + added_TD
