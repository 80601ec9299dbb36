"""What is served does not depend on the dtype that an adapter was trained in, beyond the dtypes' own difference."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig
from safetensors.torch import load_file, save_file

from loray.adapters.peft_format import WEIGHTS_FILE
from loray.bases.registry import BaseModel
from loray_kernels import available
from loray_kernels.reference import ReferenceOps
from tests.engine.adapters import LINEAR_ROPE, NORMS, Oracle, TestAdapter, make_adapter
from tests.engine.harness import Spy, make_engine, request, run
from tests.fixtures.planning import HARDWARE

MODULES = ["q_proj", "v_proj", "o_proj", "down_proj"]
CONFIGS: dict[str, tuple[Any, Any]] = {
    "lora": (LoraConfig(r=8, lora_alpha=16, target_modules=MODULES), None),
    "dora": (LoraConfig(r=8, lora_alpha=16, target_modules=MODULES, use_dora=True), None),
    "vera": (VeraConfig(r=16, target_modules=["q_proj", "v_proj"], save_projection=False), None),
    "longlora": (LoraConfig(r=8, target_modules=MODULES, modules_to_save=["embed_tokens", *NORMS]), LINEAR_ROPE),
}
PROMPT = list(range(3, 40))
# Products in bfloat16 (8 bits) of a model of few layers: roundings of the layers add up to some units in the last place
# of the largest logit.
_ROUNDINGS = 16 * 2.0**-8


def rounded(adapter: TestAdapter, folder: Path) -> TestAdapter:
    """The adapter as it is published where the base is in bfloat16."""
    shutil.copytree(adapter.folder, folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    save_file({n: t.to(torch.bfloat16) for n, t in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    return replace(adapter, folder=folder, ref=replace(adapter.ref, digest="f" * 64))


@pytest.mark.parametrize("method", list(CONFIGS))
def test_an_adapter_in_float32_and_in_bfloat16_is_served_alike(
    method: str, tiny_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base, (config, rope) = tiny_base(), CONFIGS[method]
    trained = make_adapter(base, tmp_path / "trained", config, seed=1, rope=rope, std=0.05)
    published = rounded(trained, tmp_path / "published")
    logits = {}
    for dtype in ("bfloat16", "float32"):
        engine = make_engine(base, [trained, published], dtype=dtype)
        spy = Spy(engine)
        tokens = run(engine, [request("a", PROMPT, trained), request("b", PROMPT, published)], together=True)
        logits[dtype] = {name: torch.stack(rows) for name, rows in spy.logits.items()}
        engine.close()
        if dtype == "bfloat16" and method != "dora":  # the pool holds the bits that publication wrote; DoRA's scales
            # are its magnitudes by the norms of the factors as they are stored
            assert tokens["a"] == tokens["b"]
            assert logits[dtype]["a"].equal(logits[dtype]["b"])
    expected_V = Oracle(base, [trained], torch.float64).logits(PROMPT, trained)[-1].double()
    scale = expected_V.abs().max()
    for dtype, found in logits.items():
        for name in found:
            error = (found[name][0].double() - expected_V).abs().max()
            is_exact = dtype == "float32" and name == "a"
            assert error <= (1e-4 if is_exact else _ROUNDINGS * scale), (dtype, name, float(error), float(scale))


@pytest.mark.parametrize("multiplies", [False, True])
def test_an_engine_chooses_bfloat16_where_kernels_read_half_of_the_bytes(
    multiplies: bool, tiny_base: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = replace(HARDWARE, multiplies_bfloat16=multiplies)
    monkeypatch.setattr("loray.engine.build.hardware", lambda: here)
    engine = make_engine(tiny_base(), dtype="auto")
    has_kernels = "cpu" in available()
    assert engine.spec.dtype == ("bfloat16" if multiplies or has_kernels else "float32")
    assert engine.pool.tensor.dtype is getattr(torch, engine.spec.dtype)
    engine.close()
    monkeypatch.setattr("loray.engine.build.backend", lambda name, device: ReferenceOps())
    engine = make_engine(tiny_base(), dtype="auto")
    assert engine.spec.dtype == ("bfloat16" if multiplies else "float32")
    engine.close()
