"""Which parameters are trained, how they begin, and that an untrained adapter is the base."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loray.train.model import build_model, count_parameters
from tests.train.test_model import BaseFactory, recipe, tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "vera", "longlora"])
def test_only_the_adapter_is_trained(tiny_base: BaseFactory, method: str, dtype: str) -> None:
    base = tiny_base("Qwen3ForCausalLM")
    model = build_model(base, recipe(method, dtype=dtype))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    suffixes = {n.split(".")[-2] if "lora" not in n and "vera" not in n else n.split("proj.")[1] for n in trained}
    extras = {"embed_tokens", "input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm"}
    expected = {
        "lora": {"lora_A.default.weight", "lora_B.default.weight"},
        "vera": {"vera_lambda_b", "vera_lambda_d"},
        "longlora": {"lora_A.default.weight", "lora_B.default.weight"} | extras,
    }
    assert suffixes == expected[method]
    count = count_parameters(model)
    assert count.trainable == sum(p.numel() for p in trained.values())
    assert 0 < count.trainable < count.total


def test_tied_embedding_trains_a_copy_and_the_head_stays(tiny_base: BaseFactory) -> None:
    model = build_model(tiny_base(tie_word_embeddings=True), recipe())
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    assert torch.equal(head, embedding)
    assert embedding.requires_grad
    assert not head.requires_grad
    before = head.clone()
    model(input_ids=tokens()).logits.square().sum().backward()
    with torch.no_grad():
        embedding -= embedding.grad
    assert torch.equal(model.get_output_embeddings().weight, before)
    assert not torch.equal(embedding, before)


def test_the_seed_decides_the_initial_weights_and_nothing_else(tiny_base: BaseFactory) -> None:
    def initial(seed: int) -> list[Tensor]:
        model = build_model(tiny_base(), recipe("lora", seed=seed))
        return [p.detach() for n, p in sorted(model.named_parameters()) if "lora_A" in n]

    state = torch.get_rng_state()
    first, second, third = initial(1), initial(1), initial(2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, first, second))
    assert not any(map(torch.equal, first, third))


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_an_untrained_adapter_is_the_base(tiny_base: BaseFactory, method: str) -> None:
    from transformers import AutoModelForCausalLM

    base = tiny_base()
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    model = build_model(base, recipe(method))
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)
