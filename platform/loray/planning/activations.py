"""The tensors that autograd keeps of one decoder layer for its backward pass, with transformers' and PEFT's modules.

Base weights are frozen, so their linear layers keep no input. Autograd keeps the fp32 copies that RMSNorms compute
with, the inputs of LoRA modules (once for modules with the same input), the queries, keys, values and output of the
attention kernel, and the operands of SiLU and of the product of gate and up. Nothing is quadratic in the row length.
"""

from __future__ import annotations

from typing import NamedTuple

from loray.planning.run import Run
from loray.spec import DTYPE_BYTES, MODULES_BY_INPUT, DoraSpec, VeraSpec

_FP32 = DTYPE_BYTES["float32"]


class Kept(NamedTuple):
    """Tensors of one layer: bytes per token that the worker holds. `block` are those of the largest tensor."""

    name: str
    nbytes: int
    block: int


def of_layer(run: Run) -> tuple[Kept, ...]:
    kept = (_norms(run), _attention(run), _adapter(run), _mlp(run))
    return tuple(part for part in kept if part.nbytes)


def layer_input(run: Run) -> int:
    """Bytes per token of a layer's input. Checkpointing keeps nothing else of the layer until its backward pass."""
    return run.element_bytes * run.model.hidden_size


def _norms(run: Run) -> Kept:
    """x in fp32 (for its square and for the product with 1/rms), 1/rms, and the operand of a trained weight."""
    model, e = run.model, run.element_bytes
    trained = e if run.adapter.train_norms else 0
    heads = model.num_heads + model.num_kv_heads
    widths = [(1, model.hidden_size)] * 2 + ([(heads, model.head_dim)] if model.qk_norm else [])
    nbytes = sum(count * (_FP32 * (width + 1) + trained * width) for count, width in widths)
    return Kept("norms", nbytes, _FP32 * model.hidden_size)


def _attention(run: Run) -> Kept:
    """q, k, v after RoPE, the output, and the log-sum-exp of every softmax in fp32."""
    model, e = run.model, run.element_bytes
    q, kv = e * model.num_heads * model.head_dim, e * model.num_kv_heads * model.head_dim
    return Kept("attention", 2 * (q + kv) + _FP32 * model.num_heads, q)


def _adapter(run: Run) -> Kept:
    """LoRA keeps the input of every A, once for modules with the same input, and the input of every B.

    The input of o_proj is the output of attention, which is counted there; a sequence group joins the halves of the
    heads, which makes a copy. With dropout every module has an input of its own, and keeps the mask. DoRA also keeps
    what it scales: the outputs of the base and of B. VeRA keeps the operands of its two vectors; A x is computed once
    for modules with the same input.
    """
    model, e, targets = run.model, run.element_bytes, run.adapter.target_modules
    shapes = {module: model.module_shape(module) for module in targets}
    if isinstance(run.adapter, VeraSpec):
        outs = [out for out, _ in shapes.values()]
        products = len(outs) if run.adapter.dropout else len({_input_of(module) for module in shapes})
        return Kept("adapter", e * (sum(outs) + run.adapter.rank * products), e * max(outs))
    inner = e * run.adapter.rank * len(targets)
    if isinstance(run.adapter, DoraSpec):
        inner += 2 * e * sum(out for out, _ in shapes.values())
    inputs = [e * width for _, width in shapes.values()]
    if run.adapter.dropout:
        return Kept("adapter", inner + 2 * sum(inputs), max(inputs))
    shared = {_input_of(module): e * width for module, (_, width) in shapes.items()}
    if run.sequence == 1:
        shared.pop(_input_of("o_proj"), None)
    return Kept("adapter", inner + sum(shared.values()), max(shared.values(), default=inner))


def _input_of(module: str) -> tuple[str, ...]:
    """The modules that have the same input as `module`, itself included."""
    return next(modules for modules in MODULES_BY_INPUT if module in modules)


def _mlp(run: Run) -> Kept:
    """gate, silu(gate) and up."""
    width = run.element_bytes * run.model.intermediate_size
    return Kept("mlp", 3 * width, width)


def layer_gradients(run: Run) -> Kept:
    """The most gradients of activations that exist at once in a layer's backward pass: those of up, silu(gate), their
    product, the residual stream and the layer's output.
    """
    width, hidden = run.element_bytes * run.model.intermediate_size, layer_input(run)
    return Kept("gradients of activations", 3 * width + 2 * hidden, width)
