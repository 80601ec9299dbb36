"""The model that a recipe trains: S2-Attn inside whole transformers models, RoPE, what is trained, checkpointing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from loray.bases.registry import BaseModel
from loray.engine.model.decoder import frequencies
from loray.errors import UnsupportedError
from loray.recipes.resolve import resolve
from loray.spec import TrainSpec
from loray.train import hooks
from loray.train.model import build_model, dense
from tests.train.attention.test_s2_attention import oracle, oracle_mask, runs

BaseFactory = Callable[..., BaseModel]
ARCHITECTURES = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
T = 40


LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
S2: dict[str, Any] = {"type": "s2", "group_size": 8}


def recipe(
    method: str = "longlora",
    *,
    rope: str | None = "linear",
    factor: float = 2.0,
    original: int | None = 16,
    group_size: int | None = 8,
    **fields: Any,
) -> TrainSpec:
    """LongLoRA: 16 tokens doubled to 32, groups of 8. Other methods have neither unless `fields` say so."""
    rest: dict[str, Any] = {"adapter": {"method": method, "rank": 4} | fields.pop("adapter", {})}
    if method == "longlora":
        rest["attention"] = S2 | {"group_size": group_size}
        rest["rope_scaling"] = rope and {"type": rope, "factor": factor, "original_context": original}
    rest |= {
        "name": "test",
        "data": {"train": "none.jsonl"},
        "batch": {"rows": 2},
        "optimizer": {"learning_rate": 1e-3},
        "max_steps": 1,
        "dtype": "float32",
    }
    return TrainSpec.model_validate(rest | fields)


def tokens(num_rows: int = 2, num_tokens: int = T) -> Tensor:
    return torch.randint(0, 256, (num_rows, num_tokens), generator=torch.Generator().manual_seed(3))


def strengthen(model: Any) -> Any:
    """Trained parameters that move the logits."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def positions(ids_BT: Tensor) -> Tensor:
    """Counting from 0 in each document."""
    out = torch.zeros_like(ids_BT)
    for b, t in torch.cartesian_prod(torch.arange(ids_BT.shape[0]), torch.arange(1, ids_BT.shape[1])).tolist():
        out[b, t] = out[b, t - 1] + 1 if ids_BT[b, t] == ids_BT[b, t - 1] else 0
    return out


def batch(kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """(inputs, document ids)"""
    if kind == "full":
        return {"input_ids": tokens()}, torch.zeros(2, T, dtype=torch.long)
    if kind == "padded":
        ids = torch.tensor([runs((0, T)), runs((0, 13), (-1, T - 13))])
        return {"input_ids": tokens(), "attention_mask": (ids >= 0).long()}, ids
    ids = torch.tensor([runs((0, 3), (1, 20), (2, T - 23)), runs((0, T - 1), (1, 1))])
    return {"input_ids": tokens(), "position_ids": positions(ids)}, ids


@pytest.fixture
def oracle_attention() -> Iterator[Callable[[Tensor], None]]:
    """Registers `s2_oracle`, an attention function that knows nothing but the boolean mask that it is given here."""
    masks: list[Tensor] = []

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return oracle(q, k, v, masks[-1], kwargs["scaling"]).transpose(1, 2).contiguous(), None

    AttentionInterface.register("s2_oracle", attention)
    yield masks.append
    del AttentionInterface._global_mapping["s2_oracle"]


def logits_and_gradients(model: Any, inputs: dict[str, Tensor], real_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(**inputs).logits[real_BT]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.dtype)
    (logits * weights).mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def check(model: Any, inputs: dict[str, Tensor], ids_BT: Tensor, oracle_attention: Callable[[Tensor], None]) -> None:
    """Logits and gradients against those under the boolean mask."""
    got, gradients = logits_and_gradients(model, inputs, ids_BT >= 0)
    oracle_attention(oracle_mask(2, 4, T, 8, ids_BT))
    model.set_attn_implementation("s2_oracle")
    expected, expected_gradients = logits_and_gradients(model, inputs, ids_BT >= 0)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["full", "padded", "packed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_and_packing_reach_every_layer(
    tiny_base: BaseFactory, oracle_attention: Callable[[Tensor], None], architecture: str, kind: str
) -> None:
    model = strengthen(build_model(tiny_base(architecture), recipe())).double()
    inputs, ids_BT = batch(kind)
    check(model, inputs, ids_BT, oracle_attention)


@pytest.mark.parametrize(
    ("method", "scaling", "rope"),
    [
        ("lora", None, {}),
        ("vera", None, {}),
        ("longlora", None, {}),
        ("lora", {"factor": 2}, {}),
        ("vera", {"factor": 2}, {}),
        ("lora", None, {"rope_parameters": LLAMA3}),
        ("longlora", None, {"rope_parameters": LLAMA3}),
        ("longlora", {"type": "ntk", "factor": 2}, {"rope_parameters": LLAMA3}),
    ],
)
def test_s2_is_a_choice_of_its_own(
    tiny_base: BaseFactory,
    oracle_attention: Callable[[Tensor], None],
    method: str,
    scaling: dict[str, Any] | None,
    rope: dict[str, Any],
) -> None:
    """Any method, positions scaled or not, on a base that is scaled already or not."""
    base = tiny_base(**rope)
    spec = recipe(method, attention=S2, rope_scaling=scaling)
    model = strengthen(build_model(base, spec)).double()
    resolved = resolve(spec, base.config)
    assert (resolved.rope is None) == (scaling is None)
    assert model.config.rope_parameters == (resolved.rope or base.config.rope).to_hf()
    inputs, ids_BT = batch("packed")
    check(model, inputs, ids_BT, oracle_attention)


def test_packed_documents_are_independent(tiny_base: BaseFactory) -> None:
    model = build_model(tiny_base(), recipe())
    inputs, _ = batch("packed")
    before = model(**inputs).logits
    inputs["input_ids"][0, :3] += 1
    after = model(**inputs).logits
    assert torch.equal(after[0, 3:], before[0, 3:])
    assert not torch.equal(after[0, :3], before[0, :3])


def test_segments_are_found_once_a_batch(tiny_base: BaseFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(tiny_base(num_hidden_layers=3), recipe(gradient_checkpointing=True)).train()
    calls = []
    compute = hooks.segment_batch
    monkeypatch.setattr(hooks, "segment_batch", lambda *a, **k: calls.append(a) or compute(*a, **k))
    model(**batch("packed")[0]).logits.sum().backward()
    assert len(calls) == 1


def test_dense_is_full_attention_and_only_inside(tiny_base: BaseFactory) -> None:
    model = strengthen(build_model(tiny_base(), recipe())).eval()
    inputs, _ = batch("full")
    with torch.no_grad():
        sparse = model(**inputs).logits
        with dense(model):
            full = model(**inputs).logits
            assert model.generate(inputs["input_ids"][:1, :5], max_new_tokens=3, use_cache=True).shape == (1, 8)
        assert torch.equal(model(**inputs).logits, sparse)
        with pytest.raises(RuntimeError), dense(model):
            raise RuntimeError
        assert torch.equal(model(**inputs).logits, sparse)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(full, model(**inputs).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(full[:, :4], sparse[:, :4], atol=1e-4, rtol=1e-4)  # nothing is cut before G/2
    assert (full[:, 4:] - sparse[:, 4:]).abs().max() > 0.1


def test_dense_leaves_another_model_alone(tiny_base: BaseFactory) -> None:
    model = build_model(tiny_base(), recipe(attention={"type": "dense"}))
    with dense(model):
        assert model.config._attn_implementation == "loray_dense"
    assert model.config._attn_implementation == "loray_dense"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.tensor([runs((0, 2), (1, 38))] * 2)}, "right"),
        ({"use_cache": True}, "cache"),
        ({"attention_mask": torch.ones(2, 1, T, T)}, "4D"),
    ],
)
def test_what_it_cannot_compute_is_refused(tiny_base: BaseFactory, inputs: dict[str, Any], message: str) -> None:
    model = build_model(tiny_base(), recipe())
    with pytest.raises(UnsupportedError, match=message):
        model(input_ids=tokens(), **inputs)


@pytest.mark.parametrize("real", [T, 30])
def test_packing_with_an_attention_mask_is_refused(tiny_base: BaseFactory, real: int) -> None:
    """transformers would drop the packing without a word."""
    model = build_model(tiny_base(), recipe())
    mask = torch.tensor([runs((1, real), (0, T - real))] * 2)
    with pytest.raises(ValueError, match="restart"):
        model(input_ids=tokens(), position_ids=batch("packed")[0]["position_ids"], attention_mask=mask)
    model(input_ids=tokens(), position_ids=torch.arange(T)[None] * mask, attention_mask=mask)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"adapter": {"train_embeddings": False, "train_norms": False}},
        {"method": "vera", "attention": S2, "adapter": {"train_embeddings": True, "train_norms": True}},
    ],
    ids=["longlora", "only lora", "vera"],
)
def test_gradient_checkpointing_changes_no_gradient(tiny_base: BaseFactory, fields: dict[str, Any]) -> None:
    inputs, ids_BT = batch("padded")
    results = []
    for checkpointing in (False, True):
        model = strengthen(build_model(tiny_base(), recipe(**fields, gradient_checkpointing=checkpointing))).train()
        assert model.is_activation_checkpointing == checkpointing
        results.append(logits_and_gradients(model, inputs, ids_BT >= 0))
    (logits, gradients), (logits_again, gradients_again) = results
    assert torch.equal(logits, logits_again)
    assert all(torch.equal(g, gradients_again[n]) and bool(g.any()) for n, g in gradients.items())


@pytest.mark.parametrize("rope", ["linear", "ntk", "yarn"])
def test_rope_is_scaled_and_the_context_longer(tiny_base: BaseFactory, rope: str) -> None:
    base, spec = tiny_base(), recipe(rope=rope, factor=4.0)
    model = build_model(base, spec)
    assert resolve(spec, base.config).context == model.config.max_position_embeddings == 64
    rope_parameters = resolve(spec, base.config).rope
    assert rope_parameters is not None
    expected, attention = frequencies(rope_parameters, base.config.head_dim)
    rotary = model.model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, torch.as_tensor(expected, dtype=torch.float32), atol=1e-7, rtol=1e-5)
    assert rotary.attention_scaling == pytest.approx(attention)


def test_without_scaling_the_base_stays_as_it_is(tiny_base: BaseFactory) -> None:
    base, spec = tiny_base(), recipe("lora")
    model = build_model(base, spec)
    assert resolve(spec, base.config).context == model.config.max_position_embeddings == 512
    assert model.config.rope_parameters["rope_type"] == "default"


def test_context_defaults_to_the_bases_window_and_groups_to_a_quarter(tiny_base: BaseFactory) -> None:
    base, spec = tiny_base(), recipe(original=None, group_size=None)
    assert resolve(spec, base.config).context == 1024
    assert build_model(base, spec).config.s2_group_size == 256
    short = recipe("lora", attention={"type": "s2"}, data={"train": "none.jsonl", "max_length": 64})
    assert build_model(base, short).config.s2_group_size == 16  # of the rows, which nothing extends


def test_small_groups_are_warned_of(tiny_base: BaseFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: warnings.append(record.getMessage()))
    logger = logging.getLogger("loray.train.model")
    logger.addHandler(handler)
    try:
        build_model(tiny_base(), recipe(group_size=6))
        build_model(tiny_base(), recipe(group_size=8))
    finally:
        logger.removeHandler(handler)
    assert len(warnings) == 1
    assert "group_size 6" in warnings[0]
