"""FLOPs are those that torch counts in the real model, and pairs those that a mask allows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from loray.bases.registry import BaseModel
from loray.planning.compute import attention_pairs, model_flops_per_token
from loray.spec import LongLoraSpec, LoraSpec, TrainSpec, VeraSpec
from loray.train.data.batches import collate, pack_rows
from loray.train.model import build_model
from loray.train.objectives import batch_loss
from loray.train.rates import product_flops


@pytest.mark.parametrize("adapter", [LoraSpec(rank=8), VeraSpec(rank=32)], ids=lambda a: str(a.method))
def test_flops_are_those_of_the_model(tiny_base: Callable[..., BaseModel], adapter: LoraSpec | VeraSpec) -> None:
    """torch counts products, attention without its causal half; the head, whose gradient is made in the forward pass,
    twice. The first layer's input needs no gradient, which the formula does not know of.
    """
    base = tiny_base(num_hidden_layers=6)
    spec = TrainSpec.model_validate(
        {
            "name": "a",
            "base": base.name,
            "adapter": adapter.model_dump(),
            "data": {"train": "x"},
            "batch": {"rows": 1},
            "optimizer": {"learning_rate": 1},
            "max_steps": 1,
            "dtype": "float32",
        }
    )
    model = build_model(base, spec)
    model.train()
    length = 96
    row = pack_rows([(list(range(length)), [True] * length)])
    with FlopCounterMode(display=False) as counted:
        batch = collate(row, ((0,),), packed=False)
        batch_loss(model, batch).backward()  # type: ignore[no-untyped-call]
    by_operation = counted.get_flop_counts()["Global"]
    attention = sum(n for op, n in by_operation.items() if "attention" in str(op) or "bmm" in str(op))
    products = sum(by_operation.values()) - attention
    share = batch.num_targets / length
    per_token = model_flops_per_token(base.config, adapter, {length: 1}, group_size=None, target_share=share)
    pairs = attention_pairs(length, None, base.config.num_heads)
    ours = per_token * length - 12 * base.config.head_dim * base.config.num_layers * pairs
    assert ours == pytest.approx(products, rel=0.03)
    assert ours >= products


def test_attention_grows_with_the_row_but_not_under_s2(tiny_base: Callable[..., BaseModel]) -> None:
    config = tiny_base().config
    longlora = LongLoraSpec()

    def of(length: int, group_size: int | None) -> float:
        return model_flops_per_token(config, longlora, {length: 1}, group_size=group_size)

    assert of(4096, None) - of(2048, None) == 12 * config.head_dim * config.num_layers * config.num_heads * 1024
    assert of(4096, 256) == pytest.approx(of(2048, 256), rel=0.02)
    assert of(4096, 256) < 0.5 * of(4096, None)


def test_the_peak_is_a_rate_of_products() -> None:
    generator = torch.random.get_rng_state()
    assert 1e8 < product_flops(torch.device("cpu"), torch.float32) < 1e15
    assert torch.random.get_rng_state().equal(generator)
