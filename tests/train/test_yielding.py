"""Layers begin at the gate in both directions, and values stay."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loray.train.yielding import yield_at_layers


class CountingGate:
    num = 0

    def wait(self) -> None:
        self.num += 1


def test_each_layer_begins_at_the_gate_forwards_and_ends_there_backwards() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=3, **sizes))
    ids_BT = torch.arange(8)[None]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids_BT, labels=ids_BT).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    before, gate = gradients(), CountingGate()
    yield_at_layers(model, gate)  # type: ignore[arg-type]
    assert all(map(torch.equal, gradients(), before))
    assert gate.num == 3 + 3
    with torch.no_grad():
        model(ids_BT)
    assert gate.num == 9
