"""Weights while a decoder is made of them: a layer's tensors are given up as soon as it is packed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loray.bases.checkpoint import read_tensors
from loray.bases.registry import BaseModel
from loray.engine.model import decoder
from loray.engine.model.decoder import Decoder
from loray.errors import IntegrityError
from loray_kernels import Ops, backend
from loray_kernels.reference import ReferenceOps


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base("Qwen3ForCausalLM", num_hidden_layers=4)


def size_of_a_layer(path: Path) -> int:
    return sum(t.nbytes for name, t in read_tensors(path) if name.startswith("model.layers.0."))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_more_than_a_layer_is_there_twice(base: BaseModel, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    ops: Ops = ReferenceOps() if device == "meta" else backend("auto")
    taken: list[tuple[weakref.ref[Tensor], int]] = []
    most, take = 0, decoder._take

    def counted(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        nonlocal most
        got = take(name, tensor, dtype, device)
        if got.dim() > 1 and ".layers." in name:
            taken.append((weakref.ref(got), got.nbytes))
        most = max(most, sum(size for ref, size in taken if ref() is not None))
        return got

    monkeypatch.setattr(decoder, "_take", counted)
    made = Decoder(
        base.config, read_tensors(base.path), ops, dtype=torch.bfloat16, device=torch.device(device)
    )  # in another dtype than the checkpoint's
    assert made.embedding_VD.device.type == device
    assert len(taken) == 7 * 4
    assert all(ref() is None for ref, _ in taken)
    assert 0 < most <= size_of_a_layer(base.path) / 2


def test_tensors_may_come_in_any_order_and_those_that_are_not_read_are_not_taken(base: BaseModel) -> None:
    tensors = [*read_tensors(base.path), ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(8))]
    made = [
        Decoder(base.config, order, ReferenceOps(), dtype=torch.float32, device=torch.device("cpu"))
        for order in (tensors, reversed(tensors))
    ]
    for one, other in zip(*(m._layers for m in made), strict=True):
        assert torch.equal(one.weights.qkv.data, other.weights.qkv.data)
        assert torch.equal(one.weights.down.data, other.weights.down.data)


def test_a_checkpoint_without_a_tensor_is_refused(base: BaseModel) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    tensors = [(n, t) for n, t in read_tensors(base.path) if n != name]
    with pytest.raises(IntegrityError, match=rf"lacks the tensor '{name}'; add the base again"):
        Decoder(base.config, tensors, ReferenceOps(), dtype=torch.float32, device=torch.device("cpu"))
