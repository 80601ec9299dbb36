"""Whole models with dense attention over real ranks against the same model on one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from loray.bases.registry import BaseModel
from loray.planning.sequence import DensePlan, padded_length
from tests.train.sequence.ranks import Ranks
from tests.train.sequence.test_model import HEADS, KINDS, LAYERS, batch, train, train_alone

BaseFactory = Callable[..., BaseModel]


@pytest.mark.parametrize(
    ("name", "heads", "size", "mode"),
    [
        ("lora, dense", "8/2", 1, "no checkpointing"),
        ("lora, dense", "8/2", 2, "no checkpointing"),
        ("lora, dense", "8/2", 4, "exchanged again"),  # each key-value head on two ranks
        ("lora, dense", "9/3", 2, "exchanged again"),
        ("lora, dense, scaled", "9/3", 4, "no checkpointing"),
        ("vera, dense", "8/8", 4, "no checkpointing"),
        ("vera, dense", "3/1", 2, "no checkpointing"),
        ("dora, dense", "8/8", 2, "no checkpointing"),
        ("dora, dense", "3/1", 4, "no checkpointing"),
        ("longlora, dense", "8/2", 2, "no checkpointing"),
        ("longlora, dense", "9/3", 4, "exchanged again"),
    ],
)
def test_loss_gradients_and_bytes(
    ranks: Ranks, tiny_base: BaseFactory, name: str, heads: str, size: int, mode: str
) -> None:
    base, wholes = tiny_base(**HEADS[heads]), [batch(kind, 12 * size) for kind in KINDS]
    of_ranks = ranks(size, train, base, wholes, mode, name)
    for whole, results in zip(wholes, zip(*of_ranks, strict=True), strict=True):
        alone = train_alone(base, whole, name)
        assert sum(r.loss for r in results) == pytest.approx(alone.loss, rel=1e-5)
        for parameter, expected in alone.gradients.items():
            got = sum(r.gradients[parameter] for r in results)
            assert torch.linalg.vector_norm(got - expected) <= 1e-5 * torch.linalg.vector_norm(expected), parameter
        config = base.config
        row_length = padded_length(whole.input_ids_BT.shape[1], size)
        plan = DensePlan(row_length, size, config.num_heads, config.num_kv_heads)
        passes = 1 if mode == "no checkpointing" else 2
        forward = [passes * plan.forward_elements(rank, config.head_dim, num_rows=2) for rank in range(size)]
        backward = [plan.backward_elements(rank, config.head_dim, num_rows=2) for rank in range(size)]
        assert [r.forward_bytes for r in results] == [4 * LAYERS * n for n in forward]
        assert [r.backward_bytes for r in results] == [4 * LAYERS * n for n in backward]
