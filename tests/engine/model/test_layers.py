"""Layers in one call against the same layers op by op: the same bits, in every step of real batches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from loray.bases.registry import BaseModel
from loray.engine.model.layers import ForwardContext, Layer
from loray_kernels import backend
from loray_kernels.cpu.ops import CpuOps
from tests.fixtures.engines import make_engine, request, run
from tests.fixtures.peft_adapters import TestAdapter


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_in_one_call_give_the_bits_of_their_ops(
    any_base: BaseModel, any_adapters: list[TestAdapter], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    if not isinstance(backend("auto"), CpuOps):
        pytest.skip("no C++ compiler")
    own = any_adapters
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
                entered_TD.clone(), [layer.weights], adapters.layer, step.inputs[0], layer.number
            )
            assert alone_TD is not None
            assert torch.equal(alone_TD, expected_TD)
        got_TD = step.ops.decoder_layers(x_TD.clone(), weights, adapters.layer, step.inputs[0], layers[0].number)
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
