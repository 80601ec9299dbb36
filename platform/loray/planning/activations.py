"""What autograd keeps of one decoder layer for its backward pass: transformers' modules and PEFT's, tensor by tensor.

Base weights are frozen, so their linear layers keep no input. Kept are: the fp32 copies that RMSNorms compute with,
the input that several LoRA modules share, queries, keys, values and output of the attention kernel, and what SiLU and
the product of gate and up need. Nothing is quadratic in the row's length.
"""

from __future__ import annotations

from typing import NamedTuple

from loray.planning.run import Run
from loray.spec import VeraSpec

_FP32 = 4


class Kept(NamedTuple):
    """Tensors of one layer. Bytes for each token that the worker holds; `block` is the largest tensor's."""

    name: str
    nbytes: int
    block: int


def of_layer(run: Run) -> tuple[Kept, ...]:
    kept = (_norms(run), _attention(run), _adapter(run), _mlp(run))
    return tuple(part for part in kept if part.nbytes)


def layer_input(run: Run) -> int:
    """Bytes for each token: all that checkpointing keeps of a layer until its backward pass."""
    return run.element_bytes * run.model.hidden_size


def _norms(run: Run) -> Kept:
    """x in fp32 (of its square and of the product with 1/rms), 1/rms, and what a trained weight multiplies."""
    model, e = run.model, run.element_bytes
    extras = run.adapter.long_context
    trained = e if extras is not None and extras.train_norms else 0
    heads = model.num_heads + model.num_kv_heads
    widths = [(1, model.hidden_size)] * 2 + ([(heads, model.head_dim)] if model.qk_norm else [])
    nbytes = sum(count * (_FP32 * (width + 1) + trained * width) for count, width in widths)
    return Kept("norms", nbytes, _FP32 * model.hidden_size)


def _attention(run: Run) -> Kept:
    """q, k, v after RoPE, the output, and the logarithm of every softmax's sum in fp32."""
    model, e = run.model, run.element_bytes
    q, kv = e * model.num_heads * model.head_dim, e * model.num_kv_heads * model.head_dim
    return Kept("attention", 2 * (q + kv) + _FP32 * model.num_heads, q)


def _adapter(run: Run) -> Kept:
    """LoRA: the input of every A (q, k and v share theirs, gate and up too) and of every B.

    o's input is attention's own output, and a copy of it where a sequence group joins the halves of the heads.
    Dropout makes an input of its own for every module, and keeps its mask. VeRA: what its two vectors multiply, A x
    once for modules with one input.
    """
    model, e, targets = run.model, run.element_bytes, run.adapter.target_modules
    shapes = {module: model.module_shape(module) for module in targets}
    if isinstance(run.adapter, VeraSpec):
        outs = [out for out, _ in shapes.values()]
        products = len(outs) if run.adapter.dropout else len({_input_of(module) for module in shapes})
        return Kept("adapter", e * (sum(outs) + run.adapter.rank * products), e * max(outs))
    inner = e * run.adapter.rank * len(targets)
    inputs = [e * width for _, width in shapes.values()]
    if run.adapter.dropout:
        return Kept("adapter", inner + 2 * sum(inputs), max(inputs))
    shared = {_input_of(module): e * width for module, (_, width) in shapes.items()}
    if run.sequence == 1:
        shared.pop("attention output", None)
    return Kept("adapter", inner + sum(shared.values()), max(shared.values(), default=inner))


def _input_of(module: str) -> str:
    if module in ("q_proj", "k_proj", "v_proj"):
        return "attention input"
    return {"o_proj": "attention output", "down_proj": "mlp inner"}.get(module, "mlp input")


def _mlp(run: Run) -> Kept:
    """gate, silu(gate) and up."""
    width = run.element_bytes * run.model.intermediate_size
    return Kept("mlp", 3 * width, width)


def layer_gradients(run: Run) -> Kept:
    """Gradients that are there together in a layer's backward pass, at their most: those of up, silu(gate) and their
    product, of the residual stream, and of the layer's output.
    """
    width, hidden = run.element_bytes * run.model.intermediate_size, layer_input(run)
    return Kept("gradients of activations", 3 * width + 2 * hidden, width)
