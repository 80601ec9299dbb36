"""Published tensors have the dtype of the base checkpoint unless the recipe asks for another; checkpoints keep fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from loray.adapters.peft_format import PREFIX, WEIGHTS_FILE
from loray.bases.checkpoint import stored_dtype
from loray.bases.registry import BaseModel
from loray.methods.attach import is_magnitude
from loray.train import checkpoint
from loray.train.checkpoint import peft_name
from loray.train.model import build_model
from tests.fixtures.adapters import in_peft, logits
from tests.train.test_loop import METHODS, TINY, recipe, run

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.filterwarnings("ignore:.*vera_A.*")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("of_base", "asked", "published"), [(BF16, None, BF16), (BF16, "float32", FP32), (FP32, None, FP32)]
)
def test_an_adapter_has_the_bases_dtype_unless_another_is_asked_for(
    method: str,
    of_base: torch.dtype,
    asked: str | None,
    published: torch.dtype,
    tiny_base: Callable[..., BaseModel],
    tmp_path: Path,
) -> None:
    base = tiny_base(**TINY, dtype=of_base)
    spec = recipe(method, max_steps=2, publish={"dtype": asked})
    assert stored_dtype(base.path) == str(of_base).removeprefix("torch.")
    _, reporter = run(spec, base, tmp_path)
    folder = reporter.checkpoints[-1].path
    masters = checkpoint.read_optimizer(folder).masters
    assert {master.dtype for master in masters.values()} == {FP32}
    with safe_open(str(folder / checkpoint.ADAPTER / WEIGHTS_FILE), framework="pt") as stored:
        for name, master in masters.items():
            key = PREFIX + peft_name(name)
            if key in stored.keys():  # noqa: SIM118 - it is no mapping
                expected = master.to(FP32 if is_magnitude(name) else published)
                assert stored.get_tensor(key).dtype == expected.dtype
                assert torch.equal(stored.get_tensor(key), expected)
    exact = build_model(base, spec).eval()
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            if name in masters:
                parameter.copy_(masters[name])
    wanted = logits(exact)
    found = logits(in_peft(base, exact, folder / checkpoint.ADAPTER))
    step = 2**-7 if published is BF16 else 1e-5
    assert (found - wanted).abs().max() <= step * wanted.abs().max()
