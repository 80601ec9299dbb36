"""Whole models over real ranks, through transformers' interfaces alone, against the same model on one."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from loray.bases.registry import BaseModel
from loray.errors import UnsupportedError
from loray.planning.sequence import DensePlan, HaloPlan, padded_length
from loray.train.data.batches import IGNORED, TrainBatch
from loray.train.model import build_model, dense
from loray.train.objectives import batch_loss
from loray.train.sequence import SentBytes, SequenceGroup, sequence_parallel, shard
from tests.fixtures.attention import runs
from tests.fixtures.models import LLAMA3, BaseFactory, model_recipe, positions, strengthen, tokens
from tests.fixtures.ranks import Ranks

GROUP, LAYERS, PLAIN = 16, 2, "no checkpointing"
HEADS: dict[str, dict[str, int]] = {
    "9/3": {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8},
    "8/2": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8},
    "8/8": {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8},
    "3/1": {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16},
}
LENGTHS = [32, 16, 24, 8, 4, 10]  # 2G, G, 3G/2, G/2, G/4, 5G/8
RECIPES: dict[str, dict[str, Any]] = {
    "longlora": {"group_size": GROUP},
    "lora, not scaled": {"method": "lora", "attention": {"type": "s2", "group_size": GROUP}},
    "vera, not scaled": {"method": "vera", "attention": {"type": "s2", "group_size": GROUP}},
    "longlora, not scaled": {"rope": None, "group_size": GROUP},
    "longlora, ntk": {"rope": "ntk", "group_size": GROUP},
    "lora, dense": {"method": "lora"},
    "lora, dense, scaled": {"method": "lora", "rope_scaling": {"factor": 2, "original_context": 16}},
    "vera, dense": {"method": "vera"},
    "dora, dense": {"method": "dora"},
    "alora, dense": {"method": "alora", "adapter": {"invocation_tokens": tokens()[0, 10:12].tolist()}},
    "alora, not scaled": {
        "method": "alora",
        "adapter": {"invocation_tokens": tokens()[0, 10:12].tolist()},
        "attention": {"type": "s2", "group_size": GROUP},
    },
    "ia3, dense": {"method": "ia3"},
    "road, dense": {"method": "road", "adapter": {"group_size": 8}},
    "longlora, dense": {"attention": {"type": "dense"}},
}
KINDS = ["full", "padded", "packed", "few targets"]


def batch(kind: str, num_tokens: int) -> TrainBatch:
    """Two rows. All kinds but the first are a token short, so that they do not divide by the ranks."""
    num_tokens -= kind != "full"
    input_ids_BT = tokens(2, num_tokens)
    labels_BT = torch.full_like(input_ids_BT, IGNORED)
    labels_BT[:, :-1] = input_ids_BT[:, 1:]
    ids_BT = position_ids_BT = None
    third = num_tokens // 3
    if kind == "padded":
        ids_BT = torch.tensor([runs((0, num_tokens)), runs((0, third), (-1, num_tokens - third))])
        labels_BT[1, third - 1 :] = IGNORED
    if kind == "packed":
        ends = (
            runs((0, 3), (1, third), (2, num_tokens - third - 3)),
            runs((0, num_tokens // 2), (1, -(-num_tokens // 2))),
        )
        ids_BT = torch.tensor(ends)
        position_ids_BT = positions(ids_BT)
        labels_BT[:, :-1][ids_BT[:, 1:] != ids_BT[:, :-1]] = IGNORED
    if kind == "few targets":  # none of them on the first and on the last rank
        labels_BT[:, : num_tokens // 2 + 1] = labels_BT[:, -third:] = IGNORED
    num_targets = int((labels_BT != IGNORED).sum())
    return TrainBatch(input_ids_BT, labels_BT, ids_BT, position_ids_BT, 2 * num_tokens, num_targets)


class Result(NamedTuple):
    loss: float
    gradients: dict[str, Tensor]
    forward_bytes: int = 0
    backward_bytes: int = 0


@lru_cache(maxsize=2)
def model_of(base: BaseModel, checkpointing: bool, name: str = "longlora") -> Any:
    spec = model_recipe(gradient_checkpointing=checkpointing, **RECIPES[name])
    return strengthen(build_model(base, spec)).train()


def gradients_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def train_alone(base: BaseModel, whole: TrainBatch, name: str) -> Result:
    model = model_of(base, False, name)
    loss = batch_loss(model, whole) / whole.num_targets
    return Result(loss.item(), gradients_of(model, loss))


def train(
    group: SequenceGroup, base: BaseModel, wholes: list[TrainBatch], mode: str, name: str = "longlora"
) -> list[Result]:
    model = model_of(base, mode != PLAIN, name)
    results = []
    for whole in wholes:
        counted = replace(group, traffic=SentBytes())
        sharded = shard(whole, counted)
        with sequence_parallel(sharded, keep_halos=mode == "halos kept"):
            loss = batch_loss(model, sharded.local) / whole.num_targets
        gradients = gradients_of(model, loss)  # outside the context, as a training loop has it
        sent = counted.traffic
        results.append(Result(loss.item(), gradients, sent.forward_bytes, sent.backward_bytes))
    return results


def check(ranks: Ranks, size: int, base: BaseModel, length: int, mode: str = PLAIN, name: str = "longlora") -> None:
    """Each rank's result against the whole batch on one rank, and against the plan of its traffic."""
    wholes, config = [batch(kind, size * length) for kind in KINDS], base.config
    of_ranks = ranks(size, train, base, wholes, mode, name)
    for whole, results in zip(wholes, zip(*of_ranks, strict=True), strict=True):
        alone = train_alone(base, whole, name)
        assert sum(r.loss for r in results) == pytest.approx(alone.loss, rel=1e-5)
        for parameter, expected in alone.gradients.items():
            got = sum(r.gradients[parameter] for r in results)
            assert torch.linalg.vector_norm(got - expected) <= 1e-5 * torch.linalg.vector_norm(expected), parameter
        heads, d = (config.num_heads, config.num_kv_heads), config.head_dim
        row_length, again = padded_length(whole.input_ids_BT.shape[1], size), 2 if mode == "exchanged again" else 1
        if "dense" in name:
            dense_plan = DensePlan(row_length, size, *heads)
            sent = [dense_plan.forward_elements(rank, d, num_rows=2) for rank in range(size)]
            returned = [dense_plan.backward_elements(rank, d, num_rows=2) for rank in range(size)]
        else:
            plan = HaloPlan(row_length, size, GROUP, *heads)
            sent = [plan.elements_sent(rank, d, num_rows=2) for rank in range(size)]
            returned = [plan.elements_received(rank, d, num_rows=2) for rank in range(size)]
        assert [r.forward_bytes for r in results] == [4 * LAYERS * again * n for n in sent]
        assert [r.backward_bytes for r in results] == [4 * LAYERS * n for n in returned]


# Of all heads the attention alone is tested with every length.
EVERY_LENGTH = [("9/3", 1, 40), *itertools.product(("9/3",), (2, 4), LENGTHS)]


@pytest.mark.parametrize(
    ("heads", "size", "length"), [*EVERY_LENGTH, *itertools.product(("8/2", "8/8", "3/1"), (2, 4), (24, 10))]
)
def test_loss_gradients_and_bytes(ranks: Ranks, tiny_base: BaseFactory, heads: str, size: int, length: int) -> None:
    check(ranks, size, tiny_base(**HEADS[heads]), length)


@pytest.mark.parametrize(
    ("name", "heads", "size", "mode"),
    [
        ("lora, dense", "8/2", 1, PLAIN),
        ("lora, dense", "8/2", 2, PLAIN),
        ("lora, dense", "8/2", 4, "exchanged again"),  # each key-value head on two ranks
        ("lora, dense", "9/3", 2, "exchanged again"),
        ("lora, dense, scaled", "9/3", 4, PLAIN),
        ("vera, dense", "8/8", 4, PLAIN),
        ("vera, dense", "3/1", 2, PLAIN),
        ("dora, dense", "8/8", 2, PLAIN),
        ("dora, dense", "3/1", 4, PLAIN),
        ("alora, dense", "8/2", 2, "exchanged again"),
        ("alora, dense", "3/1", 4, PLAIN),
        ("ia3, dense", "8/2", 2, PLAIN),
        ("road, dense", "3/1", 2, PLAIN),
        ("longlora, dense", "8/2", 2, PLAIN),
        ("longlora, dense", "9/3", 4, "exchanged again"),
    ],
)
def test_dense_attention(ranks: Ranks, tiny_base: BaseFactory, name: str, heads: str, size: int, mode: str) -> None:
    check(ranks, size, tiny_base(**HEADS[heads]), 12, mode, name)


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("lora, not scaled", {}),
        ("vera, not scaled", {}),
        ("alora, not scaled", {}),
        ("longlora, not scaled", {"rope_parameters": LLAMA3}),
        ("longlora, ntk", {"rope_parameters": LLAMA3}),
    ],
)
def test_any_method_scaled_or_not(ranks: Ranks, tiny_base: BaseFactory, name: str, rope: dict[str, Any]) -> None:
    check(ranks, 2, tiny_base(**HEADS["9/3"], **rope), 24, name=name)


@pytest.mark.parametrize("mode", ["halos kept", "exchanged again"])
@pytest.mark.parametrize("length", [24, 10])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_activation_checkpointing(ranks: Ranks, tiny_base: BaseFactory, size: int, length: int, mode: str) -> None:
    check(ranks, size, tiny_base(**HEADS["9/3"]), length, mode)


def evaluate(group: SequenceGroup, base: BaseModel, whole: TrainBatch) -> tuple[float, Tensor]:
    model = model_of(base, False)
    sharded = shard(whole, group)
    with torch.no_grad(), dense(model, group), sequence_parallel(sharded):
        loss = batch_loss(model, sharded.local)
        logits = model(**sharded.local.model_inputs(torch.device("cpu")), use_cache=False).logits
    assert model.config._attn_implementation == "s2_attn"
    return float(loss), logits


@pytest.mark.parametrize("kind", ["full", "padded", "packed"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_dense_evaluation(ranks: Ranks, tiny_base: BaseFactory, size: int, kind: str) -> None:
    base, whole = tiny_base(**HEADS["9/3"]), batch(kind, 40)
    model = model_of(base, False)
    with torch.no_grad(), dense(model):
        loss = float(batch_loss(model, whole))
        expected = model(**whole.model_inputs(torch.device("cpu"))).logits
    results = ranks(size, evaluate, base, whole)
    assert sum(total for total, _ in results) == pytest.approx(loss, rel=1e-5)
    logits = torch.cat([part for _, part in results], dim=1)[:, : expected.shape[1]]
    learned_BT = whole.labels_BT != IGNORED
    torch.testing.assert_close(logits[learned_BT], expected[learned_BT], atol=1e-4, rtol=1e-4)


# What would be wrong without a word is refused before anything is sent, so that no other rank is needed to see it.


@pytest.fixture
def model(tiny_base: BaseFactory) -> Any:
    return build_model(tiny_base(), model_recipe())


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return shard(batch("full", 40), SequenceGroup(rank=1, size=2)).local.model_inputs(torch.device("cpu"))


def run(model: Any, inputs: dict[str, Tensor], *, is_dense: bool = False) -> None:
    sharded = shard(batch("full", 40), SequenceGroup(rank=1, size=2))
    group = sharded.group if is_dense else None
    with torch.no_grad(), dense(model, group) if is_dense else nullcontext(), sequence_parallel(sharded):
        model(**inputs, use_cache=False)


def test_attention_that_stays_on_its_rank(tiny_base: BaseFactory, inputs: dict[str, Tensor]) -> None:
    model = build_model(tiny_base(), model_recipe("lora"))
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedError, match="within this rank's part"):
        run(model, inputs)


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_that_scales_by_the_local_length(
    model: Any, inputs: dict[str, Tensor], rope_type: str, is_dense: bool
) -> None:
    model.config.rope_parameters["rope_type"] = rope_type
    with pytest.raises(UnsupportedError, match=rope_type):
        run(model, inputs, is_dense=is_dense)


@pytest.mark.parametrize("is_dense", [False, True])
def test_inputs_that_are_not_this_ranks_part(model: Any, inputs: dict[str, Tensor], is_dense: bool) -> None:
    ids = inputs["input_ids"]
    with pytest.raises(ValueError, match="position_ids are not"):
        run(model, {"input_ids": ids}, is_dense=is_dense)  # transformers would count from 0 on every rank
    with pytest.raises(ValueError, match="part has"):
        run(model, {"input_ids": ids[:, :-1]}, is_dense=is_dense)
    with pytest.raises(ValueError, match="without a mask"):
        run(model, inputs | {"attention_mask": torch.ones_like(ids)}, is_dense=is_dense)


@pytest.mark.parametrize("is_dense", [False, True])
def test_a_sliding_window_shorter_than_the_whole_row(
    tiny_base: BaseFactory, inputs: dict[str, Tensor], is_dense: bool
) -> None:
    model = build_model(tiny_base("MistralForCausalLM"), model_recipe())
    model.config.sliding_window = 30  # more than the 20 tokens of a rank's part
    with pytest.raises(UnsupportedError, match="sliding window"):
        run(model, inputs, is_dense=is_dense)


def test_dropout_on_attention_weights_is_not_for_a_group(model: Any, inputs: dict[str, Tensor]) -> None:
    model.config.attention_dropout = 0.1
    with pytest.raises(UnsupportedError, match="attention_dropout"):
        run(model, inputs, is_dense=True)
