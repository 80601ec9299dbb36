"""Layers in one call against the same layers op by op: the same bits, in every step of real batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, VeraConfig
from torch import Tensor

from loray.bases.registry import BaseModel
from loray.engine.model.layers import ForwardContext, Layer
from loray.spec import LINEAR_MODULES
from loray_kernels import backend
from loray_kernels.cpu.ops import CpuOps
from tests.engine.adapters import LINEAR_ROPE, NORMS, TestAdapter, make_adapters
from tests.engine.harness import make_engine, request, run

ALL = list(LINEAR_MODULES)


def adapters(base: BaseModel, folder: Path) -> list[TestAdapter]:
    return make_adapters(
        base,
        folder,
        [
            (LoraConfig(r=16, target_modules=ALL), None),
            (LoraConfig(r=5, lora_alpha=9, target_modules=["v_proj", "up_proj"], rank_pattern={"up_proj": 3}), None),
            (LoraConfig(r=8, target_modules=ALL[2:6], layers_to_transform=[1]), None),
            (LoraConfig(r=4, target_modules=ALL[:4], modules_to_save=NORMS), LINEAR_ROPE),
            (VeraConfig(r=20, target_modules=ALL, save_projection=False), None),
            (VeraConfig(r=20, target_modules=ALL, save_projection=False), None),  # the same pair, in one product
            (
                VeraConfig(r=7, target_modules=["q_proj", "down_proj"], projection_prng_key=3, save_projection=False),
                None,
            ),
        ],
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_in_one_call_give_the_bits_of_their_ops(
    any_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    if not isinstance(backend("auto"), CpuOps):
        pytest.skip("no C++ compiler")
    own = adapters(any_base, tmp_path)
    compared = 0

    def both(layers: Sequence[Layer], x_TD: Tensor, step: ForwardContext) -> Tensor:
        nonlocal compared
        adapters, weights = step.batch.adapters, [layer.weights for layer in layers]
        expected_TD = x_TD
        for layer in layers:
            entered_TD = expected_TD
            summed_TD, added_TD = layer(entered_TD, None, step)
            expected_TD = summed_TD + added_TD
            # One layer whose rows and the next one's are prefetched, and the pass in one call.
            alone_TD = step.ops.decoder_layers(
                entered_TD.clone(), [layer.weights], adapters.layer, step.inputs, layer.number
            )
            assert alone_TD is not None
            assert torch.equal(alone_TD, expected_TD)
        got_TD = step.ops.decoder_layers(x_TD.clone(), weights, adapters.layer, step.inputs, layers[0].number)
        assert got_TD is not None
        assert torch.equal(got_TD, expected_TD)
        compared += len(layers)
        return got_TD

    monkeypatch.setattr("loray.engine.model.decoder.through", both)
    engine = make_engine(any_base, own, dtype=dtype, max_num_batched_tokens=24, max_num_seqs=12)
    models = [None, *own, own[0], None]
    run(engine, [request(str(i), range(3, 9 + 4 * i), a, max_tokens=3) for i, a in enumerate(models)])
    assert compared >= 4 * any_base.config.num_layers
    engine.close()
