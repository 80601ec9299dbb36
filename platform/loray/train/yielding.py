"""Training that waits, layer by layer, while engines of this machine compute for people."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from loray.priority import YieldGate


def yield_at_layers(model: Any, gate: YieldGate) -> None:
    """From now on each layer of `model`, one of transformers' causal language models, begins at the gate, and ends its
    backward pass there. The values are the same.
    """
    for layer in model.base_model.layers:
        layer.register_forward_pre_hook(lambda layer, inputs: _at(gate, layer, inputs))


def _at(gate: YieldGate, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    gate.wait()
    if inputs[0].requires_grad:
        inputs[0].register_hook(lambda gradient: gate.wait())  # type: ignore[no-untyped-call]
