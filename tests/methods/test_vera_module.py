"""Our VeRA module against PEFT's, and against the paper's parameter counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig, get_peft_model
from peft.tuners.vera.model import _kaiming_init as peft_init
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, RobertaConfig

from loray.adapters.files import read_header
from loray.bases.registry import BaseModel
from loray.errors import UnsupportedError
from loray.methods.attach import attach
from loray.methods.pairs import PairKey, drawn_digest, stored_digest
from loray.methods.vera_module import VeraLinear, draw_pair, pair_digest
from loray.spec import LINEAR_MODULES, LoraSpec, VeraSpec
from tests.fixtures.draws import Normal

BaseFactory = Callable[..., BaseModel]
IDS = torch.arange(20)[None] * 7


def ours(base: BaseModel, spec: VeraSpec, dtype: torch.dtype = torch.float32) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
    attach(model, spec, seed=0)
    return fill(model)


def pefts(base: BaseModel, spec: VeraSpec, dtype: torch.dtype = torch.float32) -> Any:
    """With our pair."""
    config = VeraConfig(
        r=spec.rank, target_modules=list(spec.target_modules), projection_prng_key=spec.projection_prng_key
    )
    model = fill(get_peft_model(AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype), config))
    a_RI, b_OR = (half["default"] for half in (model.base_model.vera_A, model.base_model.vera_B))
    pair = draw_pair(spec.projection_prng_key, spec.rank, a_RI.shape[1], b_OR.shape[0])
    a_RI.copy_(pair.a_RI)
    b_OR.copy_(pair.b_OR)
    return model


def vectors(model: Any) -> dict[str, Tensor]:
    """By module path, whichever model it is."""
    names = {n: p for n, p in model.named_parameters() if "vera_lambda" in n}
    return {n.removeprefix("base_model.model.").removesuffix(".default"): p for n, p in names.items()}


def fill(model: Any) -> Any:
    draw = Normal(1)
    with torch.no_grad():
        for _, p in sorted(vectors(model).items()):
            p.copy_((0.5 * draw(*p.shape)).to(torch.bfloat16))
    return model


@pytest.mark.parametrize("key", [0, 11])
def test_the_pair_is_pefts_and_equal_on_every_machine(key: int) -> None:
    """Where torch's draws are rounded twice, not fused, PEFT's numbers are off by a rounding of numbers below 2 b."""
    pair, generator = draw_pair(key, 24, 100, 300), torch.Generator().manual_seed(key)
    is_fused = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    for mine, fan_in in ((pair.a_RI, 100), (pair.b_OR, 24)):
        theirs, bound = peft_init(tuple(mine.shape), generator), math.sqrt(6 / fan_in)
        assert mine.abs().max() <= bound * (1 + 1e-6)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0 if is_fused else bound * 2**-23)
    digests = {
        0: "4ea4d3fddbf3b61223aadc9d75a8429c1494c76229ca295e43da10e9dec980a5",
        11: "77ec51650405e1b11125a4538e63d901173d049ac4526c47ba7a4f3f672bfd2b",
    }
    assert pair.digest == digests[key]


@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), LINEAR_MODULES], ids=["q, v", "all linear"])
def test_logits_are_pefts_bit_for_bit_and_gradients_but_for_rounding(tiny_base: BaseFactory, modules: Any) -> None:
    spec = VeraSpec(rank=24, target_modules=modules, projection_prng_key=11)
    models = [make(tiny_base("Qwen2ForCausalLM"), spec) for make in (ours, pefts)]
    logits = [model(input_ids=IDS).logits for model in models]
    assert torch.equal(*logits)
    for result in logits:
        result.square().mean().backward()
    mine, theirs = map(vectors, models)
    assert mine.keys() == theirs.keys()
    for name, p in mine.items():
        torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_bf16_is_near_fp32(tiny_base: BaseFactory) -> None:
    spec = VeraSpec(rank=24)
    base = tiny_base(dtype=torch.bfloat16, std=0.1)
    low, exact = ours(base, spec, torch.bfloat16), pefts(base, spec)
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        reference = exact(input_ids=IDS).logits
        error = (low(input_ids=IDS).logits - reference).norm() / reference.norm()
        assert error < 0.05
        assert (plain(input_ids=IDS).logits - reference).norm() / reference.norm() > 0.3


def test_the_pair_is_shared_and_in_no_state_dict(tiny_base: BaseFactory) -> None:
    model = ours(tiny_base(), VeraSpec(rank=24))
    model(input_ids=IDS)
    names = [*model.state_dict(), *(n for n, _ in model.named_buffers())]
    assert not [n for n in names if "vera_A" in n or "vera_B" in n or "shared" in n]
    modules = [m for m in model.modules() if isinstance(m, VeraLinear)]
    assert len(modules) == 14
    assert len({id(m.shared) for m in modules}) == 1
    x = torch.zeros(1)
    assert modules[0].shared.like(x)[0].data_ptr() == modules[13].shared.pair.a_RI.data_ptr()
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"vera_lambda_b", "vera_lambda_d"}


def test_it_starts_as_the_base_with_d_initial(tiny_base: BaseFactory) -> None:
    base = tiny_base()
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    before = model(input_ids=IDS).logits
    attach(model, VeraSpec(rank=8, d_initial=0.25), seed=0)
    assert torch.equal(model(input_ids=IDS).logits, before)
    for name, p in vectors(model).items():
        assert bool((p == (0.25 if name.endswith("_d") else 0)).all())


def test_dropout_only_while_training(tiny_base: BaseFactory) -> None:
    model = ours(tiny_base(), VeraSpec(rank=24, dropout=0.5))
    plain = ours(tiny_base(), VeraSpec(rank=24))
    assert torch.equal(model.eval()(input_ids=IDS).logits, plain.eval()(input_ids=IDS).logits)
    assert not torch.equal(model.train()(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("kind", "sizes", "rank", "count"),
    [
        (LlamaConfig, (4096, 11008, 32, 32), 256, 1_417_216),  # 7B
        (LlamaConfig, (5120, 13824, 40, 40), 1024, 2_416_640),  # 13B
        (RobertaConfig, (768, 3072, 12, 12), 1024, 43_008),  # base
        (RobertaConfig, (1024, 4096, 24, 16), 256, 61_440),  # large
    ],
)
def test_the_papers_parameter_counts(kind: Any, sizes: tuple[int, ...], rank: int, count: int) -> None:
    """Table 4's 1.4M and 2.4M: all linear layers but the output head, Σ (out + r). Table 2's 0.043M and 0.061M:
    query and value, without the classifier, which recipes cannot name."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    with torch.device("meta"):
        model = AutoModel.from_config(kind(**dict(zip(names, sizes, strict=True))))
    modules = LINEAR_MODULES if kind is LlamaConfig else ("query", "value")
    attach(model, VeraSpec.model_construct(rank=rank, target_modules=modules), seed=0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_a_second_adapter_or_a_missing_module_is_refused(tiny_base: BaseFactory) -> None:
    base = tiny_base()
    for first in (LoraSpec(), VeraSpec(rank=8)):
        model = AutoModelForCausalLM.from_pretrained(base.path)
        attach(model, first, seed=0)
        with pytest.raises(ValueError, match="already"):
            attach(model, VeraSpec(rank=8), seed=0)
    with pytest.raises(UnsupportedError, match="q_proj"):
        attach(AutoModelForCausalLM.from_pretrained(base.path).model.embed_tokens, LoraSpec(), seed=0)


def test_modules_with_one_input_share_the_product_with_a(
    tiny_base: BaseFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ours(tiny_base(), VeraSpec(rank=24, target_modules=LINEAR_MODULES))
    linear, widths = torch.nn.functional.linear, []

    def counted(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        if weight.shape[0] == 24:
            widths.append(weight.shape[1])
        return linear(x, weight, *args)

    monkeypatch.setattr("loray.methods.vera_module.F.linear", counted)
    model(input_ids=IDS).logits.sum().backward()
    assert widths == [64, 64, 64, 128] * 2  # q, k, v; o; gate, up; down, in both layers
    model.train()
    for module in model.modules():
        if isinstance(module, VeraLinear):
            module.dropout.p = 0.5
    widths.clear()
    model(input_ids=IDS)
    assert len(widths) == 14


@pytest.mark.parametrize("key", [7, (1 << 40) + 7, (1 << 63) - 1])
def test_draws_are_those_of_torchs_generator(key: int) -> None:
    """More than a block of them, whose seed is 64 bits wide."""
    pair, generator = draw_pair(key, 128, 3000, 1000), torch.Generator().manual_seed(key)
    for mine, fan_in in ((pair.a_RI, 3000), (pair.b_OR, 128)):
        bound = (6 / fan_in) ** 0.5
        theirs = (torch.rand(mine.shape, generator=generator) - 0.5) * (2 * bound)
        torch.testing.assert_close(mine, theirs, rtol=2**-22, atol=0)
    assert drawn_digest(PairKey(key, 128, 3000, 1000)) == pair.digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_stored_pair_is_that_of_its_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    """Two blocks of A, the last of them short; fp64 that fp32 has no number for is infinite in both."""
    draw = Normal(2)
    a_RI, b_OR = (
        t.double().mul(1e39 if dtype == torch.float64 else 1).to(dtype) for t in (draw(8, 40_000), draw(3, 8))
    )
    save_file({"x": torch.zeros(3), "A": a_RI, "B": b_OR}, tmp_path / "pair.safetensors")
    entries = read_header(tmp_path / "pair.safetensors")
    with (tmp_path / "pair.safetensors").open("rb") as f:
        assert stored_digest(f, entries["A"], entries["B"]) == pair_digest(a_RI, b_OR)
