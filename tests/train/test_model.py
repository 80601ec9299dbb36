"""The model that a recipe trains: attention inside whole transformers models, RoPE, what is trained, checkpointing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from loray.engine.model.decoder import frequencies
from loray.errors import SpecError, UnsupportedError
from loray.recipes.resolve import resolve
from loray.train import hooks
from loray.train.hooks import DENSE
from loray.train.model import (
    BaseWeights,
    build_model,
    count_parameters,
    dense,
    load_model,
    model_config,
    replace_parameters,
    without_weights,
)
from tests.fixtures.attention import oracle, oracle_mask, runs
from tests.fixtures.models import (
    ARCHITECTURES,
    LLAMA3,
    S2,
    BaseFactory,
    T,
    batch,
    logits_and_gradients,
    model_recipe,
    positions,
    strengthen,
    tokens,
)


@pytest.fixture
def oracle_attention() -> Iterator[Callable[[Tensor], None]]:
    """Registers `s2_oracle`, an attention function that knows nothing but the boolean mask that it is given here."""
    masks: list[Tensor] = []

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return oracle(q, k, v, masks[-1], kwargs["scaling"]).transpose(1, 2).contiguous(), None

    AttentionInterface.register("s2_oracle", attention)
    yield masks.append
    del AttentionInterface._global_mapping["s2_oracle"]


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


def doubled(model: Any) -> Any:
    """In fp64, with an adapter that does something. torch's grouped product, of experts, has no fp64."""
    model.set_experts_implementation("eager")
    return strengthen(model).double()


@pytest.mark.parametrize("kind", ["full", "padded", "packed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_and_packing_reach_every_layer(
    tiny_base: BaseFactory, oracle_attention: Callable[[Tensor], None], architecture: str, kind: str
) -> None:
    model = doubled(build_model(tiny_base(architecture), model_recipe()))
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
    spec = model_recipe(method, attention=S2, rope_scaling=scaling)
    model = strengthen(build_model(base, spec)).double()
    resolved = resolve(spec, base.config)
    assert (resolved.rope is None) == (scaling is None)
    assert model.config.rope_parameters == (resolved.rope or base.config.rope).to_hf()
    inputs, ids_BT = batch("packed")
    check(model, inputs, ids_BT, oracle_attention)


def test_segments_are_found_once_a_batch(tiny_base: BaseFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(tiny_base(num_hidden_layers=3), model_recipe(gradient_checkpointing=True)).train()
    calls = []
    compute = hooks.segment_batch
    monkeypatch.setattr(hooks, "segment_batch", lambda *a, **k: calls.append(a) or compute(*a, **k))
    model(**batch("packed")[0]).logits.sum().backward()
    assert len(calls) == 1


def test_dense_is_full_attention_and_only_inside(tiny_base: BaseFactory) -> None:
    model = strengthen(build_model(tiny_base(), model_recipe())).eval()
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
    model = build_model(tiny_base(), model_recipe(attention={"type": "dense"}))
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
    model = build_model(tiny_base(), model_recipe())
    with pytest.raises(UnsupportedError, match=message):
        model(input_ids=tokens(), **inputs)


@pytest.mark.parametrize("real", [T, 30])
def test_packing_with_an_attention_mask_is_refused(tiny_base: BaseFactory, real: int) -> None:
    """transformers would drop the packing without a word."""
    model = build_model(tiny_base(), model_recipe())
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
        model = strengthen(
            build_model(tiny_base(), model_recipe(**fields, gradient_checkpointing=checkpointing))
        ).train()
        assert model.is_activation_checkpointing == checkpointing
        results.append(logits_and_gradients(model, inputs, ids_BT >= 0))
    (logits, gradients), (logits_again, gradients_again) = results
    assert torch.equal(logits, logits_again)
    assert all(torch.equal(g, gradients_again[n]) and bool(g.any()) for n, g in gradients.items())


@pytest.mark.parametrize("rope", ["linear", "ntk", "yarn"])
def test_rope_is_scaled_and_the_context_longer(tiny_base: BaseFactory, rope: str) -> None:
    base, spec = tiny_base(), model_recipe(rope=rope, factor=4.0)
    model = build_model(base, spec)
    assert resolve(spec, base.config).context == model.config.max_position_embeddings == 64
    rope_parameters = resolve(spec, base.config).rope
    assert rope_parameters is not None
    expected, attention = frequencies(rope_parameters, base.config.head_dim)
    rotary = model.model.rotary_emb
    assert torch.equal(rotary.inv_freq, expected)
    assert rotary.attention_scaling == pytest.approx(attention)


def test_context_defaults_to_the_bases_window_and_groups_to_a_quarter(tiny_base: BaseFactory) -> None:
    base, spec = tiny_base(), model_recipe(original=None, group_size=None)
    assert resolve(spec, base.config).context == 1024
    assert build_model(base, spec).config.s2_group_size == 256
    short = model_recipe("lora", attention={"type": "s2"}, data={"train": "none.jsonl", "max_length": 64})
    assert build_model(base, short).config.s2_group_size == 16  # of the rows, which nothing extends


def test_small_groups_are_warned_of(tiny_base: BaseFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: warnings.append(record.getMessage()))
    logger = logging.getLogger("loray.train.model")
    logger.addHandler(handler)
    try:
        build_model(tiny_base(), model_recipe(group_size=6))
        build_model(tiny_base(), model_recipe(group_size=8))
    finally:
        logger.removeHandler(handler)
    assert len(warnings) == 1
    assert "group_size 6" in warnings[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "vera", "longlora"])
def test_only_the_adapter_is_trained(tiny_base: BaseFactory, method: str, dtype: str) -> None:
    base = tiny_base("Qwen3ForCausalLM")
    model = build_model(base, model_recipe(method, dtype=dtype))
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
    model = build_model(tiny_base(tie_word_embeddings=True), model_recipe())
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
        model = build_model(tiny_base(), model_recipe("lora", seed=seed))
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
    model = build_model(base, model_recipe(method))
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)


@pytest.mark.parametrize(
    ("architecture", "method", "kind"),
    [
        *((architecture, "lora", "packed") for architecture in (*ARCHITECTURES, "Gemma3ForCausalLM")),
        ("Phi3ForCausalLM", "dora", "packed"),
        ("Gemma2ForCausalLM", "lora", "packed"),
        ("LlamaForCausalLM", "lora", "full"),
        ("LlamaForCausalLM", "dora", "padded"),
        ("LlamaForCausalLM", "vera", "packed"),
        ("LlamaForCausalLM", "longlora", "packed"),
    ],
)
def test_logits_and_gradients_are_those_of_a_mask(
    tiny_base: BaseFactory, architecture: str, method: str, kind: str
) -> None:
    base = tiny_base(architecture)
    model = doubled(build_model(base, model_recipe(method, attention={"type": "dense"})))
    assert model.config._attn_implementation == DENSE
    inputs, ids_BT = batch(kind)
    found, gradients = logits_and_gradients(model, inputs, ids_BT >= 0)
    if base.config.attention_soft_cap is None:
        model.set_attn_implementation("sdpa")  # with a boolean mask, and in fp64 throughout
    else:
        model.set_attn_implementation("eager")  # whose softmax is in fp32
    expected, expected_gradients = logits_and_gradients(model, inputs, ids_BT >= 0)
    bound = 1e-10 if base.config.attention_soft_cap is None else 1e-5
    torch.testing.assert_close(found, expected, atol=bound, rtol=bound)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=bound, rtol=bound, msg=name)


def test_layers_with_a_window_keep_it_beside_s2(tiny_base: BaseFactory) -> None:
    """Gemma 3: the first layer has a window of 24, the second none, and has S2-Attn in its place."""

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        behind = torch.arange(T)[:, None] - torch.arange(T)
        same = (ids_BT[:, :, None] == ids_BT[:, None])[:, None]
        window = (behind >= 0) & (behind < 24) & same
        seen = oracle_mask(2, 4, T, 8, ids_BT) if module.sliding_window is None else window.expand(-1, 4, -1, -1)
        return oracle(q, k, v, seen, kwargs["scaling"]).transpose(1, 2).contiguous(), None

    model = strengthen(build_model(tiny_base("Gemma3ForCausalLM"), model_recipe("lora", attention=S2))).double()
    inputs, ids_BT = batch("packed")
    found, gradients = logits_and_gradients(model, inputs, ids_BT >= 0)
    AttentionInterface.register("s2_oracle", attention)
    model.set_attn_implementation("s2_oracle")
    expected, expected_gradients = logits_and_gradients(model, inputs, ids_BT >= 0)
    del AttentionInterface._global_mapping["s2_oracle"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("architecture", "base_fields", "recipe", "message"),
    [
        (
            "MistralForCausalLM",
            {"sliding_window": 24},
            {"attention": S2},
            "window of 24 tokens, so S2-Attn would change",
        ),
        ("Gemma2ForCausalLM", {}, {"attention": S2}, "a soft cap, which neither S2-Attn nor"),
        (
            "Gemma3ForCausalLM",
            {},
            {"parallel": {"strategy": "ddp", "sequence": 2}, "num_workers": 2},
            "a window of 24 tokens, which only whole rows have",
        ),
        ("Phi3ForCausalLM", {}, {"rope_scaling": {"type": "linear", "factor": 2}}, "has no linear RoPE .* type: ntk"),
        ("Phi3ForCausalLM", {}, {"adapter": {"target_modules": ["q_proj"]}}, "as one module, qkv_proj.*all of them"),
    ],
)
def test_what_a_familys_attention_cannot_have(
    tiny_base: BaseFactory, architecture: str, base_fields: dict[str, Any], recipe: dict[str, Any], message: str
) -> None:
    with pytest.raises((SpecError, UnsupportedError), match=message):
        build_model(tiny_base(architecture, **base_fields), model_recipe("lora", **recipe))


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM"])
def test_a_family_whose_weights_are_read_later_is_the_base(tiny_base: BaseFactory, architecture: str) -> None:
    base = tiny_base(architecture)
    model = without_weights(model_config(base, None), dtype="float32", attention=DENSE)
    weights = BaseWeights(base, "float32")
    replace_parameters(model, lambda name, _: weights.read(name).clone())
    with torch.no_grad():
        expected = load_model(base, dtype="float32")(input_ids=tokens()).logits
        assert torch.equal(model(input_ids=tokens()).logits, expected)


def test_generation_with_a_cache_and_padding_on_the_left(tiny_base: BaseFactory) -> None:
    model = strengthen(build_model(tiny_base(), model_recipe("lora"))).eval()
    mask_BT = torch.tensor([runs((0, 3), (1, 5)), runs((1, 8))])
    prompt: dict[str, Any] = {"input_ids": tokens(2, 8), "attention_mask": mask_BT, "max_new_tokens": 4}
    found = model.generate(**prompt, use_cache=True, do_sample=False)
    model.set_attn_implementation("eager")
    assert torch.equal(found, model.generate(**prompt, use_cache=True, do_sample=False))


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.num_elements = max(self.num_elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_packed_rows_need_no_tensor_that_is_quadratic_in_their_length(tiny_base: BaseFactory, method: str) -> None:
    model = build_model(tiny_base(), model_recipe(method))
    ids_BT = torch.tensor([runs((0, 300), (1, 20), (2, 704))])
    inputs = {"input_ids": tokens(1, 1024), "position_ids": positions(ids_BT)}
    largest = {}
    for attention in (DENSE, "sdpa"):
        model.set_attn_implementation(attention)
        with _Largest() as seen:
            model.base_model(**inputs, use_cache=False).last_hidden_state.sum().backward()
        largest[attention] = seen.num_elements
    assert largest["sdpa"] >= 1024**2
    assert largest[DENSE] <= 1024**2 // 4
