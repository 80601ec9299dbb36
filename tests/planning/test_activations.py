"""What is said to be kept for the backward pass, against what autograd keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loray.bases.registry import BaseModel
from loray.planning import memory
from loray.planning.run import count_base, count_trained, shape_of
from loray.spec import TrainSpec
from loray.train.attention import attend
from loray.train.model import build_model, count_parameters
from tests.fixtures.planning import bare, recipe
from tests.fixtures.tiny import EXPERTS

TOKENS = 256
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LONG = {"method": "longlora"}  # its rows are cut to TOKENS by what is fed to the model


def kept_bytes(base: BaseModel, spec: TrainSpec, num_tokens: int = TOKENS, num_rows: int = 1) -> int:
    """Of the decoder's forward pass, storages once, parameters not. One of several rows is shorter."""
    model = build_model(base, spec).train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)  # alive until counted, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        mask = torch.ones(num_rows, num_tokens, dtype=torch.long)
        mask[1:, -3:] = 0
        ids = torch.randint(0, 256, mask.shape)
        model.base_model(input_ids=ids, attention_mask=mask if num_rows > 1 else None, use_cache=False)
    return sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in parameters)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("architecture", "adapter", "error"),
    [
        ("LlamaForCausalLM", {"method": "lora", "rank": 4}, 0),
        ("Qwen2ForCausalLM", {"method": "lora", "rank": 4, "target_modules": ALL}, 0),
        ("Qwen3ForCausalLM", {"method": "lora", "rank": 4, "target_modules": ["q_proj", "down_proj"]}, 0),
        ("LlamaForCausalLM", {"method": "lora", "rank": 4, "target_modules": ALL, "dropout": 0.1}, 0.01),
        ("LlamaForCausalLM", {"method": "vera", "rank": 8}, 0),
        ("LlamaForCausalLM", LONG, 0.05),
        ("Qwen3ForCausalLM", LONG, 0.05),
        ("MixtralForCausalLM", {"method": "lora", "rank": 4, "target_modules": ALL[:4]}, 0.05),
        ("Qwen3MoeForCausalLM", {"method": "lora", "rank": 4, "target_modules": ALL[:4]}, 0.05),
    ],
)
def test_a_layer_keeps_what_is_counted(
    tiny_base: Callable[..., BaseModel], architecture: str, adapter: dict[str, Any], error: float, dtype: str
) -> None:
    spec = recipe(adapter=adapter, dtype=dtype)
    kept = [kept_bytes(tiny_base(architecture, num_hidden_layers=n), spec) for n in (2, 4)]
    run = shape_of(spec, tiny_base(architecture, num_hidden_layers=2).config)
    counted = sum(part.nbytes for part in memory.saved_by_layer(run))
    assert (kept[1] - kept[0]) / (2 * TOKENS) == pytest.approx(counted, rel=error, abs=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("architecture", EXPERTS)
def test_experts_with_an_adapter_are_kept(tiny_base: Callable[..., BaseModel], architecture: str, dtype: str) -> None:
    """B A is added to their weights, of which every layer keeps its own."""
    spec = recipe(adapter={"method": "lora", "rank": 4, "target_modules": ALL}, dtype=dtype)
    bases = [tiny_base(architecture, num_hidden_layers=n) for n in (2, 4)]
    kept = [kept_bytes(base, spec) for base in bases]
    run = shape_of(spec, bases[0].config)
    counted = TOKENS * sum(part.nbytes for part in memory.saved_by_layer(run))
    (changed,) = (i.nbytes for i in memory.plan_memory(run, bare()).items if i.name.startswith("experts with"))
    assert (kept[1] - kept[0]) / 2 == pytest.approx(counted + changed / 2, rel=0.05)


@pytest.mark.parametrize(
    ("architecture", "modules"),
    [(name, modules) for name in (*EXPERTS, "GptOssForCausalLM") for modules in (ALL, ALL[:4])],
)
def test_parameters_of_experts_are_counted_exactly(
    tiny_base: Callable[..., BaseModel], architecture: str, modules: list[str]
) -> None:
    base, spec = tiny_base(architecture), recipe(adapter={"method": "lora", "target_modules": modules})
    model = build_model(base, spec)
    found, trained = count_parameters(model), count_trained(base.config, spec.adapter)
    assert trained.total == found.trainable
    assert trained.largest == max(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_base(base.config).total == found.total - found.trainable


class _Flash(torch.autograd.Function):
    """Keeps what flash-attn does: its operands, its output, and the log-sum-exp of every softmax."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object) -> torch.Tensor:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, out, torch.zeros(q.shape[:2], dtype=torch.float32))
        return out


@pytest.mark.parametrize("modules", [ALL, ["q_proj", "v_proj"]], ids=["all", "q and v"])
@pytest.mark.parametrize(
    ("attention", "num_rows"), [("dense", 1), ("dense", 2), ("s2", 1)], ids=["one row", "padded rows", "two halves"]
)
def test_a_gpu_keeps_what_is_counted(
    attention: str,
    num_rows: int,
    modules: list[str],
    tiny_base: Callable[..., BaseModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = attend._Kernel(_Flash.apply, lambda scale: {})
    monkeypatch.setattr(attend, "_kernel", lambda: kernel)
    monkeypatch.setattr(attend, "select_backend", lambda *_: attend.attend_varlen)
    adapter = {"method": "lora", "rank": 4, "target_modules": modules}
    spec = recipe(adapter=adapter, dtype="bfloat16", attention={"type": attention}, batch={"rows": num_rows})
    bases = [tiny_base(num_hidden_layers=n) for n in (2, 4)]
    kept = [kept_bytes(base, spec, num_rows=num_rows) for base in bases]
    counted = sum(part.nbytes for part in memory.saved_by_layer(shape_of(spec, bases[0].config), on_gpu=True))
    assert kept[1] - kept[0] == 2 * num_rows * TOKENS * counted


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "dora", "rank": 4, "target_modules": ALL},
        {"method": "ia3"},
        {"method": "ia3", "target_modules": ALL},
        {"method": "road", "group_size": 32, "target_modules": ALL},
    ],
)
def test_what_is_scaled_is_kept(tiny_base: Callable[..., BaseModel], adapter: dict[str, Any], dtype: str) -> None:
    """Per token: what PEFT makes of a module's factors, or for its norms, does not depend on them."""
    spec = recipe(adapter=adapter, dtype=dtype)
    bases = [tiny_base(num_hidden_layers=n) for n in (2, 4)]
    short, long = ([kept_bytes(base, spec, n) for base in bases] for n in (TOKENS, 2 * TOKENS))
    counted = sum(part.nbytes for part in memory.saved_by_layer(shape_of(spec, bases[0].config)))
    assert (long[1] - long[0]) - (short[1] - short[0]) == 2 * TOKENS * counted


@pytest.mark.parametrize(("length", "has_mask"), [(24, False), (64, True)])
def test_a_window_that_is_shorter_than_rows_has_a_mask(
    tiny_base: Callable[..., BaseModel], length: int, has_mask: bool
) -> None:
    base = tiny_base("Gemma3ForCausalLM")  # with a window of 24
    spec = recipe(data={"train": "x", "max_length": length})
    plan = memory.plan_memory(shape_of(spec, base.config), bare())
    masks = [item.nbytes for item in plan.items if item.name.startswith("masks of attention")]
    assert masks == ([spec.batch.rows * length**2] if has_mask else [])


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "lora", "target_modules": ALL},
        {"method": "dora"},
        {"method": "vera"},
        {"method": "ia3", "target_modules": ALL},
        {"method": "road", "variant": "road_4", "group_size": 16},
        LONG,
    ],
)
@pytest.mark.parametrize(
    ("architecture", "tied"),
    [
        ("LlamaForCausalLM", False),
        ("LlamaForCausalLM", True),
        ("Qwen2ForCausalLM", True),
        ("Qwen3ForCausalLM", False),
        ("Gemma3ForCausalLM", True),
        ("Phi3ForCausalLM", False),
    ],
)
def test_parameters_are_counted_exactly(
    tiny_base: Callable[..., BaseModel], architecture: str, adapter: dict[str, Any], tied: bool
) -> None:
    base = tiny_base(architecture, tie_word_embeddings=tied)
    if base.config.has_fused_modules and "target_modules" not in adapter:
        adapter = {**adapter, "target_modules": ALL}
    spec = recipe(adapter=adapter)
    model = build_model(base, spec)
    found = count_parameters(model)
    trained = count_trained(base.config, spec.adapter)
    assert trained.total == found.trainable
    assert trained.largest == max(p.numel() for p in model.parameters() if p.requires_grad)
    extra = trained.adapter + (trained.embedding if tied else 0)
    assert count_base(base.config).total == found.total - extra
    assert math.prod(model.get_input_embeddings().weight.shape) == count_base(base.config).embedding
