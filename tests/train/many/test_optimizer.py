"""Steps of a bank's adapters have the bits of torch.optim.AdamW, whatever else is stepped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from loray.bases.registry import BaseModel
from loray.spec import OptimizerSpec
from loray.train.many.optimizer import Update, update
from loray.train.optimizer import MasterAdamW
from tests.fixtures.bank import SPECS, make_bank

OPTIMIZERS = {
    "one": OptimizerSpec(learning_rate=1e-2, weight_decay=0.1, loraplus_lr_ratio=4),
    "three": OptimizerSpec(learning_rate=1e-3, max_grad_norm=0.1),
    "eight": OptimizerSpec(learning_rate=1e-2, beta1=0.8, beta2=0.95, eps=1e-6),
    "vera": OptimizerSpec(learning_rate=1e-1, vera_d_lr_ratio=0.1),
    "narrow": OptimizerSpec(learning_rate=1e-1, max_grad_norm=None),
    "other": OptimizerSpec(learning_rate=1e-2),
    "twin": OptimizerSpec(learning_rate=1e-2),
    "dora": OptimizerSpec(learning_rate=1e-2, weight_decay=0.1),
    "magnitudes": OptimizerSpec(learning_rate=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_have_the_bits_of_torchs_adamw(base: BaseModel, dtype: str) -> None:
    """Over three steps, of which each leaves out some adapters and skips one."""
    bank = make_bank(base, dtype=dtype)
    theirs = {name: MasterAdamW(bank.state(name).masters, OPTIMIZERS[name]) for name in SPECS}
    generator = torch.Generator().manual_seed(0)
    for step, (absent, broken) in enumerate([("other", "one"), ("one", "other"), ("vera", "eight")]):
        stepped = [name for name in SPECS if name != absent]
        gradients: dict[str, dict[str, Tensor]] = {}
        for name in stepped:
            gradients[name] = {n: torch.randn(g.shape, generator=generator) for n, g in bank.gradients(name).items()}
            if name == broken:
                next(iter(gradients[name].values())).view(-1)[0] = math.nan
            for n, gradient in bank.gradients(name).items():
                gradient.copy_(gradients[name][n])
        rate = 1e-2 / (step + 1)
        results = update(bank, [Update(name, rate, OPTIMIZERS[name]) for name in stepped])
        assert [name for name, result in results.items() if result.skipped] == [broken]
        for name in stepped:
            if not results[name].skipped:
                exact = math.sqrt(sum(float(g.double().square().sum()) for g in gradients[name].values()))
                assert math.isclose(results[name].grad_norm, exact, rel_tol=1e-5)
            theirs[name].step(gradients[name], results[name].grad_norm, rate)
            assert not any(g.any() for g in bank.gradients(name).values())
    for name in SPECS:
        ours, expected = bank.state(name), theirs[name].state
        assert ours.num_updates == expected.num_updates
        for mine, own in zip(ours[:3], expected[:3], strict=True):
            assert mine.keys() == own.keys()
            assert all(torch.equal(tensor, own[n]) for n, tensor in mine.items())
        bucket, slot = bank.place(name)
        for piece in bucket.placed:
            master = bucket.memory.master[slot, piece.start : piece.start + math.prod(piece.shape)]
            weights = bucket.weights(piece)[slot]
            assert torch.equal(weights, master.view(piece.shape).to(weights.dtype))
