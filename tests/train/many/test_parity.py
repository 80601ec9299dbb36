"""Adapters of a bank against each alone: over steps in fp32, with S2-Attn, and over a sequence group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loray.bases.registry import BaseModel
from loray.methods.attach import attach
from loray.spec import AdapterSpec, DoraSpec, LoraSpec, OptimizerSpec, VeraSpec
from loray.train.data.batches import IGNORED, TrainBatch
from loray.train.hooks import ATTENTION, DENSE
from loray.train.many.bank import AdapterBank
from loray.train.many.optimizer import Update, update
from loray.train.model import load_model
from loray.train.objectives import batch_loss
from loray.train.optimizer import MasterAdamW
from loray.train.sequence import SequenceGroup, sequence_parallel, shard
from tests.fixtures.bank import alone, distance, losses, own_rows, rows_of, tokens
from tests.fixtures.ranks import Ranks

BaseFactory = Callable[..., BaseModel]
SMOLLM2 = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
SPECS: dict[str, AdapterSpec] = {
    "four": LoraSpec(rank=4),
    "sixteen": LoraSpec(rank=16, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")),
    "again": LoraSpec(rank=16, alpha=8, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")),
    "vera": VeraSpec(rank=64),
    "dora": DoraSpec(rank=8),
}
ROWS = {"four": 2, "sixteen": 1, "again": 1, "vera": 2, "dora": 1}
RATES = {"four": 2e-3, "sixteen": 1e-3, "again": 2e-3, "vera": 2e-2, "dora": 1e-3}


def test_eight_steps_in_fp32_on_smollm2s_shapes(tiny_base: BaseFactory) -> None:
    base = tiny_base(**SMOLLM2, std=0.04)
    optimizer = OptimizerSpec(learning_rate=1e-3)
    bank = AdapterBank(load_model(base, dtype="float32"), base, "float32")
    singles: dict[str, tuple[Any, dict[str, Tensor], MasterAdamW]] = {}
    for seed, (name, spec) in enumerate(SPECS.items()):
        bank.add(name, spec, seed=seed)
        model, parameters = alone(base, bank, name, spec)
        singles[name] = model, parameters, MasterAdamW({n: p.detach() for n, p in parameters.items()}, optimizer)
    names = rows_of(bank, ROWS)
    ids_BT, held_out_BT = tokens(len(names), 24), tokens(len(names), 24, seed=1)

    def one_alone(name: str, rows_BT: Tensor) -> Tensor:
        return losses(singles[name][0], own_rows(rows_BT, names, name)).mean() / rows_BT.shape[1]

    weights_B = torch.tensor([1 / ROWS[name] / ids_BT.shape[1] for name in names])
    for step in range(8):
        with bank.rows(names, ids_BT.shape[1]):
            loss_B = losses(bank.model, ids_BT) * weights_B
            loss_B.sum().backward()
        for name, (_, parameters, adam) in singles.items():
            theirs = one_alone(name, ids_BT)
            theirs.backward()
            gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
            assert abs(float(own_rows(loss_B.detach(), names, name).sum()) - float(theirs.detach())) < 1e-4
            if not step:
                trained = {n: g for n, g in gradients.items() if g.any()}  # A's is 0 where B is
                assert distance(bank.gradients(name), trained.items()) < 2e-5
            norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
            adam.step({n: g.clone() for n, g in gradients.items()}, norm, RATES[name])
            for p in parameters.values():
                p.grad = None
        update(bank, [Update(name, RATES[name], optimizer) for name in SPECS])
    with torch.no_grad(), bank.rows(names, held_out_BT.shape[1]):
        held_out_B = losses(bank.model, held_out_BT) * weights_B
    for name in SPECS:
        theirs = one_alone(name, held_out_BT).detach()
        assert abs(float(own_rows(held_out_B, names, name).sum()) - float(theirs)) < 1e-3


# -- S2-Attn, and rows that ranks share --

GROUP = 16


def loaded(base: BaseModel, attention: str) -> Any:
    fields = {"s2_group_size": GROUP} if attention == ATTENTION else {}
    return load_model(base, dtype="float32", attention=attention, config_fields=fields).double().train()


def batch(num_rows: int, num_tokens: int) -> TrainBatch:
    """All rows but the first are padded."""
    ids_BT = tokens(num_rows, num_tokens)
    labels_BT = torch.full_like(ids_BT, IGNORED)
    labels_BT[:, :-1] = ids_BT[:, 1:]
    documents_BT = torch.zeros_like(ids_BT)
    for row in range(1, num_rows):
        documents_BT[row, num_tokens - 3 * row :] = -1
        labels_BT[row, num_tokens - 3 * row - 1 :] = IGNORED
    return TrainBatch(ids_BT, labels_BT, documents_BT, None, ids_BT.numel(), int((labels_BT != IGNORED).sum()))


def bank_gradients(
    group: SequenceGroup, base: BaseModel, attention: str, whole: TrainBatch
) -> dict[str, dict[str, Tensor]]:
    model = loaded(base, attention)
    model.activation_checkpointing_enable({"use_reentrant": False})
    bank = AdapterBank(model, base, "float64")  # type: ignore[arg-type]
    for seed, (name, spec) in enumerate(SPECS.items()):
        bank.add(name, spec, seed=seed)
        for master in bank.masters(name).values():
            master += 0.05 * torch.randn(master.shape, generator=torch.Generator().manual_seed(seed))
    sharded = shard(whole, group)
    with bank.rows(rows_of(bank, ROWS), sharded.local.input_ids_BT.shape[1]):
        with sequence_parallel(sharded):
            loss = batch_loss(model, sharded.local)
        loss.backward()
    bank.reduce_gradients(group)
    return {name: {n: g.clone() for n, g in bank.gradients(name).items()} for name in SPECS}


@pytest.mark.parametrize("attention", [DENSE, ATTENTION])
def test_attention_over_groups_and_ranks(ranks: Ranks, tiny_base: BaseFactory, attention: str) -> None:
    """Gradients over two ranks that share each row are those of each adapter alone, on whole rows."""
    base = tiny_base(std=0.05)
    whole = batch(sum(ROWS.values()), 64)
    of_ranks = [bank_gradients(SequenceGroup(), base, attention, whole)]
    of_ranks += ranks(2, bank_gradients, base, attention, whole)
    bank = AdapterBank(loaded(base, attention), base, "float64")  # type: ignore[arg-type]
    for seed, (name, spec) in enumerate(SPECS.items()):
        bank.add(name, spec, seed=seed)
    names = rows_of(bank, ROWS)
    for seed, (name, spec) in enumerate(SPECS.items()):
        model = loaded(base, attention)
        attach(model, spec, seed=seed)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for p in parameters.values():
            p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        own = [i for i, row in enumerate(names) if row == name]
        part = whole._replace(**{f: getattr(whole, f)[own] for f in ("input_ids_BT", "labels_BT", "document_ids_BT")})
        batch_loss(model, part).backward()
        for gradients in of_ranks:
            assert distance(gradients[name], ((n, p.grad) for n, p in parameters.items())) < 1e-6
