"""The parts of a base's weights that ranks have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loray.bases.quantization import RoundedTo
from loray.bases.registry import BaseModel
from loray.bases.rounding import add_rounded
from loray.bases.weights import WeightSource
from loray.engine.parallel.shard import Shard, local_tensors
from loray.errors import SpecError
from loray_kernels import QuantizedWeight, Weight
from loray_kernels.reference import quantize_rows
from tests.fixtures.quantized_weights import quantized_tensors

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")


def dense(weight: Weight) -> Tensor:
    return weight.dequantized(slice(None), torch.float32) if isinstance(weight, QuantizedWeight) else weight


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_the_parts_of_a_weight_are_all_of_it(tiny_base: Callable[..., BaseModel], kind: str | None) -> None:
    base = tiny_base(tie_word_embeddings=True, vocab_size=321)  # is padded
    whole = dict(quantized_tensors(base, kind))
    parts = [dict(local_tensors(whole.items(), base.config, Shard(rank, 2))) for rank in range(2)]
    embedding_VD = whole["model.embed_tokens.weight"]
    assert isinstance(embedding_VD, Tensor)
    for name, weight in {**whole, "lm_head.weight": torch.cat((embedding_VD, embedding_VD.new_zeros(1, 64)))}.items():
        own, module = [dense(part[name]) for part in parts], name.split(".")[-2]
        if module in COLUMNS:
            assert torch.equal(torch.cat(own), dense(weight))
        elif module in ("o_proj", "down_proj"):
            assert torch.equal(torch.cat(own, dim=1), dense(weight))
        else:
            assert torch.equal(own[0], dense(weight))
        assert type(parts[1][name]) is type(weight)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_tied_head_is_rounded_as_by_a_single_rank(tiny_base: Callable[..., BaseModel], kind: RoundedTo) -> None:
    base = tiny_base(tie_word_embeddings=True, vocab_size=320)
    form = add_rounded(base, kind, home=base.path.parent.parent)
    source = WeightSource(form.path, form.config)
    parts = [dict(local_tensors(source, form.config, Shard(rank, 2)))["lm_head.weight"] for rank in range(2)]
    assert all(isinstance(part, QuantizedWeight) for part in parts)
    whole = QuantizedWeight(*quantize_rows(source.dense("model.embed_tokens.weight")))
    assert torch.equal(torch.cat([dense(part) for part in parts]), dense(whole))


def test_ranks_that_would_cut_a_group_are_refused(tiny_base: Callable[..., BaseModel]) -> None:
    base = tiny_base()
    with pytest.raises(
        SpecError, match=r"does not fit model.*o_proj.weight: columns 0 to 16 .* cut a group; take fewer"
    ):
        list(local_tensors(quantized_tensors(base, "int4"), base.config, Shard(0, 4)))
