"""The engine on a quantised base: against transformers + PEFT whose linears multiply as the reference does, with the
same bits in any company; and, of SmolLM2, how far it is from the base in 16 bits.

Shapes: O outputs, I inputs, T tokens.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig
from torch import Tensor, nn
from transformers import AutoTokenizer

from loray.bases.registry import BaseModel, add_base
from loray.bases.rounding import is_rounded
from loray.engine import build
from loray.engine.engine import Engine
from loray.engine.model import decoder
from loray.spec import ServeSpec
from loray_kernels import QuantizedWeight
from loray_kernels.reference import ReferenceOps, quantized_linear
from tests.conftest import REPOSITORY
from tests.fixtures.engines import Spy, for_each, outputs, prompts, request, run
from tests.fixtures.peft_adapters import ALL, ATTENTION, Oracle, TestAdapter, hf_model, make_adapters
from tests.fixtures.quantized_weights import quantized, quantized_tensors


def make_engine(base: BaseModel, kind: str | None, adapters: Sequence[TestAdapter] = (), **spec: Any) -> Engine:
    by_digest = {a.ref.digest: a for a in adapters}
    fields: dict[str, Any] = {"base": base.name, "dtype": "float32", "pool_bytes": 8 << 20, "itl_slo_ms": 1e9} | spec
    tensors = quantized_tensors(base, kind)
    engine = build.build_engine(
        ServeSpec(**fields), base, lambda ref, packer: packer.pack(by_digest[ref.digest].load(base)), tensors
    )
    engine.warm_up()
    return engine


@pytest.fixture(scope="module", params=["int8", "int4"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class QuantizedOracle(Oracle):
    """The same models, whose base linears quantise their inputs row by row as `quantized_linear` does."""

    def __init__(self, base: BaseModel, adapters: Sequence[TestAdapter], kind: str) -> None:
        super().__init__(base, adapters)
        self._models[None] = copy.deepcopy(self._models[None])  # that of other tests is theirs
        for model in self._models.values():
            for name, module in model.named_modules():
                stored = name.removesuffix(".base_layer") + ".weight"
                if isinstance(module, nn.Linear) and is_rounded(stored, module.weight.shape):
                    module.forward = multiply(quantized(module.weight.data, kind), module.bias)
                elif name.endswith("lm_head") and model.config.tie_word_embeddings:
                    module.forward = multiply(quantized(module.weight.data, "int8"), None)


def multiply(weight: QuantizedWeight, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: quantized_linear(x.flatten(0, -2), weight, bias_O).unflatten(0, x.shape[:-1])


Case = tuple[BaseModel, list[TestAdapter], str]


@pytest.fixture(scope="module")
def case(kind: str, tiny_base: Callable[..., BaseModel], tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A base whose weights are what its quantised ones stand for, and an adapter of each kind that meets them."""
    base = tiny_base("Qwen2ForCausalLM", tie_word_embeddings=True)
    model = copy.deepcopy(hf_model(base))
    for name, parameter in model.named_parameters():
        if is_rounded(name, parameter.shape):
            parameter.data = quantized(parameter.data, kind).dequantized(slice(None), torch.float32)
    folder = tmp_path_factory.mktemp(kind)
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(base.path).save_pretrained(folder / "base")
    rounded = add_base(str(folder / "base"), home=folder / "home", name=f"tiny-{kind}")
    configs: dict[str, tuple[Any, None]] = {
        "lora": (LoraConfig(r=16, target_modules=ALL), None),
        "dora": (LoraConfig(r=8, use_dora=True, target_modules=ALL), None),
        "vera": (VeraConfig(r=16, target_modules=ATTENTION), None),
    }
    return rounded, make_adapters(rounded, folder, configs), kind


def test_adapters_on_a_quantised_base_give_the_logits_of_peft(case: Case) -> None:
    """Activations that lie between two steps may be rounded to either, so the bound is a small part of a step."""
    base, adapters, kind = case
    oracle, models = QuantizedOracle(base, adapters, kind), [None, *adapters]
    engine = make_engine(base, kind, adapters)
    spy = Spy(engine)
    ids, out = prompts(len(models)), run(engine, for_each(models), together=True)
    for i, adapter in enumerate(models):
        whole = ids[i] + out[str(i)]
        expected = oracle.logits(whole[:-1], adapter)[len(ids[i]) - 1 :]
        got = torch.stack(spy.logits[str(i)])
        assert float((got - expected).abs().max() / expected.std()) < 2e-2
        assert float((got - expected).square().mean().sqrt() / expected.std()) < 3e-3


def test_a_row_on_a_quantised_base_is_the_same_in_any_company(case: Case) -> None:
    base, adapters, kind = case
    requests = for_each([None, *adapters], max_tokens=6)
    whole = Spy(engine := make_engine(base, kind, adapters, dtype="bfloat16"))
    run(engine, requests, together=True)
    alone = Spy(engine := make_engine(base, kind, adapters, dtype="bfloat16", max_num_batched_tokens=8, max_num_seqs=8))
    for one in requests:
        run(engine, [one])
    assert whole.logits.keys() == alone.logits.keys()
    for name, rows in whole.logits.items():
        assert torch.equal(torch.stack(rows), torch.stack(alone.logits[name]))


def test_what_the_backend_does_not_multiply_is_dequantised_with_one_warning(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Plain(ReferenceOps):
        def has_kernel(self, weight: QuantizedWeight) -> bool:
            return False

    base, _, kind = case
    monkeypatch.setattr(build, "backend", lambda name, device: Plain())
    decoder._warn_dequantized.cache_clear()
    spy = Spy(engine := make_engine(base, kind))
    run(engine, [request("a", prompts(1)[0], max_tokens=3)])
    plain = Spy(engine := make_engine(base, None))
    run(engine, [request("a", prompts(1)[0], max_tokens=3)])
    torch.testing.assert_close(torch.stack(spy.logits["a"]), torch.stack(plain.logits["a"]), atol=1e-5, rtol=1e-5)
    warnings = [r.getMessage() for r in caplog.records if "are dequantised to float32" in r.getMessage()]
    assert len(warnings) == 1


def test_a_tied_head_without_a_kernel_stays_in_16_bits(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _, kind = case

    class LayersAlone(ReferenceOps):
        def has_kernel(self, weight: QuantizedWeight) -> bool:
            return weight.shape[0] != base.config.vocab_size

    for ops, is_kept in ((LayersAlone(), False), (ReferenceOps(), True)):
        monkeypatch.setattr(build, "backend", lambda name, device, ops=ops: ops)
        model = make_engine(base, kind)._runner._model
        assert isinstance(model._head.data, QuantizedWeight) == is_kept
        assert isinstance(model._layers[0].weights.qkv.data, QuantizedWeight)


def held_out_text() -> str:
    """Of this project, which no base was trained on."""
    pages = sorted((REPOSITORY / "docs" / "guide").glob("*.md"))
    return "\n\n".join(page.read_text(encoding="utf-8") for page in pages)


@pytest.mark.slow
def test_smollm2_in_int8_predicts_as_well_as_in_bf16(smollm2: BaseModel) -> None:
    """Perplexity within 1 %, and the same first token of 95 of 100 prompts."""
    tokenizer, text = AutoTokenizer.from_pretrained(smollm2.path), held_out_text()
    ids: list[int] = tokenizer(text)["input_ids"]
    windows = [ids[i : i + 512] for i in range(0, 512 * 16, 512)]
    sentences = [s for s in re.split(r"(?<=[.:])\s+", text) if 40 < len(s) < 200][:100]
    chats = []
    for sentence in sentences:
        messages = [{"role": "user", "content": f"What does this mean? {sentence}"}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        chats.append(tokenizer(rendered)["input_ids"])
    perplexity, first = {}, {}
    for kind in (None, "int8"):
        engine = make_engine(smollm2, kind, dtype="bfloat16", pool_bytes=256 << 20)
        scored = [request(str(i), w, max_tokens=0, prompt_logprobs=0) for i, w in enumerate(windows)]
        found = [p.logprob for out in outputs(engine, *scored) for p in out.prompt_logprobs or ()]
        assert len(found) == 511 * len(windows)
        perplexity[kind] = math.exp(-sum(found) / len(found))
        first[kind] = run(engine, [request(str(i), chat, max_tokens=1) for i, chat in enumerate(chats)])
    same = sum(first[None][name] == first["int8"][name] for name in first[None])
    print(f"perplexity {perplexity[None]:.3f} in bf16, {perplexity['int8']:.3f} in int8; {same} of 100 first tokens")
    assert perplexity["int8"] <= 1.01 * perplexity[None]
    assert same >= 95
