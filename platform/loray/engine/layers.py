"""The decoder's layers, each over a step's tokens with every adapter of the batch applied.

Shapes: T tokens, I input width, O output width, D hidden, H heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loray.bases.config import ModelConfig
from loray.bases.rope import Frequencies, frequencies
from loray.engine.batch import Batch
from loray.engine.pool import Pool
from loray.spec import RopeParameters
from loray_kernels import Ops


@dataclass(frozen=True, slots=True)
class Step:
    """What every layer of one pass shares."""

    batch: Batch
    pool: Pool
    ops: Ops
    cos_Td: Tensor
    sin_Td: Tensor

    def offset(self, layer: int) -> int:
        return layer * self.pool.geometry.layer_share


class Linear:
    """Base modules that share an input, as one matrix; LoRA and VeRA of each are added to its columns of the result."""

    def __init__(self, layer: int, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor], ops: Ops) -> None:
        self._layer = layer
        self._modules = tuple(weights)
        self._widths = [w.shape[0] for w in weights.values()]
        bias_O = torch.cat([biases[m] for m in weights]) if biases else None
        self._weights = ops.pack_linear(torch.cat(list(weights.values())), bias_O)

    def __call__(self, x_TI: Tensor, step: Step) -> Tensor:
        """(T, O) of all modules side by side."""
        y_TO = step.ops.linear(x_TI, self._weights)
        outputs = dict(zip(self._modules, torch.split(y_TO, self._widths, dim=1), strict=True))
        self._add_lora(x_TI, outputs, step)
        self._add_vera(x_TI, outputs, step)
        return y_TO

    def _add_lora(self, x_TI: Tensor, outputs: Mapping[str, Tensor], step: Step) -> None:
        found = step.batch.adapters.layer(self._layer).lora
        own = [m for m in self._modules if m in found]
        if not own:
            return
        pool, segments, offset = step.pool.tensor, step.batch.adapters.segments, step.offset(self._layer)
        tables = tuple(found[m] for m in own)
        h = step.ops.lora_shrink(x_TI, pool, tables, segments, offset)
        step.ops.lora_expand(tuple(outputs[m] for m in own), h, pool, tables, segments, offset)

    def _add_vera(self, x_TI: Tensor, outputs: Mapping[str, Tensor], step: Step) -> None:
        tables = step.batch.adapters.layer(self._layer).vera
        own = [(m, table) for m in self._modules for table in tables.get(m, ())]
        for span in step.batch.adapters.pairs if own else ():
            inside = [(m, t) for m, t in own if span.start <= t.start and t.stop <= span.stop]
            if not inside:
                continue
            z_TR = step.ops.vera_shrink(x_TI[span.start : span.stop], span.pair.a_RI)
            for module, table in inside:
                z_own_TR = z_TR[table.start - span.start : table.stop - span.start]
                step.ops.vera_expand(outputs[module], z_own_TR, step.pool.tensor, table, step.offset(self._layer))


class RMSNorm:
    """`name` is the path below its layer, as adapters name it; layer None is the final norm."""

    def __init__(self, layer: int | None, name: str, weight_D: Tensor, eps: float) -> None:
        self._layer, self._name = layer, name
        self._weight_D, self._eps = weight_D, eps

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        adapters = step.batch.adapters
        tables = adapters.flat() if self._layer is None else adapters.layer(self._layer)
        offset = 0 if self._layer is None else step.offset(self._layer)
        own = tables.norms.get(self._name)
        return step.ops.rms_norm(x_TD, self._weight_D, self._eps, step.pool.tensor, own, offset)


class Rope:
    """cos and sin of each token under its own model's parameters: the base's, or its LongLoRA adapter's."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._dtype, self._device = dtype, device
        self._known: dict[RopeParameters, Frequencies] = {}

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        positions_T = batch.positions_T.float()
        angles_Th, factor_T = self._angles(positions_T, self._config.rope)
        for slot in batch.adapters.slots:
            if slot.adapter.rope is not None:
                own = slice(slot.start, slot.stop)
                angles_Th[own], factor_T[own] = self._angles(positions_T[own], slot.adapter.rope)
        angles_Td = torch.cat((angles_Th, angles_Th), dim=-1)
        factor_T1 = factor_T.unsqueeze(1)
        return (angles_Td.cos() * factor_T1).to(self._dtype), (angles_Td.sin() * factor_T1).to(self._dtype)

    def _angles(self, positions_T: Tensor, rope: RopeParameters) -> tuple[Tensor, Tensor]:
        found = self._known.get(rope)
        if found is None:
            inverse_d, factor = frequencies(rope, self._config.head_dim)
            found = self._known[rope] = Frequencies(inverse_d.to(self._device), factor)
        return torch.outer(positions_T, found.inverse_d), torch.full_like(positions_T, found.attention_factor)


class Attention:
    def __init__(self, layer: int, config: ModelConfig, tensors: Mapping[str, Tensor], ops: Ops) -> None:
        prefix = f"model.layers.{layer}.self_attn"
        qkv = ("q_proj", "k_proj", "v_proj")
        self._layer, self._config = layer, config
        biases = {m: tensors[f"{prefix}.{m}.bias"] for m in qkv} if config.qkv_bias else {}
        self._qkv = Linear(layer, {m: tensors[f"{prefix}.{m}.weight"] for m in qkv}, biases, ops)
        self._o = Linear(layer, {"o_proj": tensors[f"{prefix}.o_proj.weight"]}, {}, ops)
        self._q_norm = self._k_norm = None
        if config.qk_norm:
            eps = config.rms_norm_eps
            self._q_norm = RMSNorm(layer, "self_attn.q_norm", tensors[f"{prefix}.q_norm.weight"], eps)
            self._k_norm = RMSNorm(layer, "self_attn.k_norm", tensors[f"{prefix}.k_norm.weight"], eps)

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        c, pool = self._config, step.pool
        widths = [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
        q, k, v = torch.split(self._qkv(x_TD, step), widths, dim=1)
        q_THd = q.reshape(-1, c.num_heads, c.head_dim)
        k_TKd = k.reshape(-1, c.num_kv_heads, c.head_dim)
        v_TKd = v.reshape(-1, c.num_kv_heads, c.head_dim)
        if self._q_norm is not None and self._k_norm is not None:
            q_THd, k_TKd = self._q_norm(q_THd, step), self._k_norm(k_TKd, step)
        q_THd = step.ops.rope(q_THd, step.cos_Td, step.sin_Td)
        k_TKd = step.ops.rope(k_TKd, step.cos_Td, step.sin_Td)
        meta = step.batch.attention
        step.ops.write_kv(pool.tensor, pool.layout, self._layer, k_TKd, v_TKd, meta)
        scale = c.head_dim**-0.5
        out_THd = step.ops.paged_attention(q_THd, pool.tensor, pool.layout, self._layer, meta, scale)
        return self._o(out_THd.flatten(1), step)


class MLP:
    def __init__(self, layer: int, tensors: Mapping[str, Tensor], ops: Ops) -> None:
        prefix = f"model.layers.{layer}.mlp"
        self._gate_up = Linear(layer, {m: tensors[f"{prefix}.{m}.weight"] for m in ("gate_proj", "up_proj")}, {}, ops)
        self._down = Linear(layer, {"down_proj": tensors[f"{prefix}.down_proj.weight"]}, {}, ops)

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        return self._down(step.ops.silu_mul(self._gate_up(x_TD, step)), step)
