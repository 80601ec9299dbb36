"""What recipes refuse of strategies and learning rates, and what they doubt."""

from __future__ import annotations

import pytest
import torch

from loray.errors import SpecError, UnsupportedError
from loray.train.mesh import Mesh
from loray.train.strategies import zero
from tests.train.test_loop import recipe


def test_sequence_groups_cover_the_workers() -> None:
    with pytest.raises(SpecError, match=r"parallel\.sequence is 3, which does not divide num_workers \(4\)"):
        recipe("longlora", num_workers=4, parallel={"sequence": 3})
    with pytest.raises(SpecError, match="1 workers do not split into sequence groups of 2"):
        Mesh.build(2, torch.device("cpu"))


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_looks_for_gradients_that_are_not_finite_and_keeps_buffers(stage: int) -> None:
    spec = recipe(dtype="bfloat16", parallel={"strategy": f"zero{stage}"}, num_workers=2)
    assert zero._config(spec, stage)["bf16"] == {"enabled": True, "check_grad_overflow": True}
    module = torch.nn.Module()
    module.register_buffer("inv_freq", torch.ones(2))
    dtypes = {name: buffer.dtype for name, buffer in module.named_buffers()}
    zero._check_buffers(module, dtypes)
    with pytest.raises(UnsupportedError, match="changes the dtype of inv_freq: pip install --upgrade"):
        zero._check_buffers(module.bfloat16(), dtypes)


def test_loraplus_is_for_lora() -> None:
    with pytest.raises(SpecError, match="LoRA's B, which VeRA does not train"):
        recipe("vera", optimizer={"learning_rate": 1e-3, "loraplus_lr_ratio": 16})


def test_veras_ratio_is_for_vera() -> None:
    with pytest.raises(SpecError, match="VeRA's d, which no other method trains"):
        recipe("lora", optimizer={"learning_rate": 1e-3, "vera_d_lr_ratio": 2})


def test_a_rate_like_loras_is_doubted_for_vera() -> None:
    (doubt,) = recipe("vera", optimizer={"learning_rate": 4e-4}).warnings
    assert "learning_rate is 0.0004, as for LoRA" in doubt
    assert recipe("vera", optimizer={"learning_rate": 4e-3}).warnings == ()
    assert recipe("lora", optimizer={"learning_rate": 4e-4}).warnings == ()
