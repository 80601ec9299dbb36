"""Three steps of every kind of recipe on a GPU, and as far as possible on this machine's CPU: the loss falls, and both
it and the gradient are those of fp32 with torch's SDPA on a CPU.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loray.bases.registry import BaseModel
from loray.spec import DType, TrainSpec
from loray.train.attention import attend
from loray.train.checkpoint import FolderReporter
from loray.train.data.rows import load_data
from loray.train.loop import train
from tests.fixtures.tiny import byte_tokenizer
from tests.fixtures.training import pair

BaseFactory = Callable[..., BaseModel]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
MAX_LENGTH, NUM_ROWS = 64, 4
LORA: dict[str, Any] = {"adapter": {"method": "lora", "rank": 4}}
CASES: dict[str, dict[str, Any]] = {
    "dense": LORA,
    "S2-Attn": {
        "adapter": {"method": "longlora", "rank": 4},
        "rope_scaling": {"factor": 2, "original_context": 32},
        "attention": {"type": "s2", "group_size": 16},
        "batch": {"rows": NUM_ROWS, "order": "shuffled"},
    },
    "packed": LORA | {"batch": {"rows": 2, "order": "packed"}},
    "DPO": LORA | {"objective": {"type": "dpo"}},
    "VeRA": {"adapter": {"method": "vera", "rank": 16}, "optimizer": {"learning_rate": 1e-1, "warmup_steps": 0}},
    "DoRA": {"adapter": {"method": "dora", "rank": 4}},
    "QLoRA": LORA | {"quantization": {}},
}


def recipe(case: str, dtype: DType) -> TrainSpec:
    """Every step has all rows."""
    fields: dict[str, Any] = {
        "name": "test",
        "base": "tiny",
        "data": {"train": "data.jsonl", "eval_fraction": 0, "max_length": MAX_LENGTH},
        "batch": {"rows": NUM_ROWS, "order": "shuffled"},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
        "max_steps": 3,
        "dtype": dtype,
    }
    return TrainSpec.parse(fields | CASES[case], source=case)


def steps(case: str, dtype: DType, base: BaseModel, folder: Path, device: str = "cpu") -> list[tuple[float, float]]:
    """The loss and the gradient's norm of each step."""
    spec = recipe(case, dtype)
    path = folder / "data.jsonl"
    texts = ("".join(chr(97 + (i + t * (1 + i % 3)) % 26) for t in range(15 + 4 * i)) for i in range(NUM_ROWS))
    rows = map(pair, range(NUM_ROWS)) if spec.is_paired else ({"text": text} for text in texts)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_data(
        spec.data.model_copy(update={"train": str(path), "format": "raw"}),
        byte_tokenizer(),
        max_length=MAX_LENGTH,
        max_eval_rows=0,
        seed=spec.seed,
        formats=spec.objective.formats,
    )
    reporter = FolderReporter(folder / f"{device}-{dtype}")
    train(spec, base, data, reporter=reporter, workdir=folder, device=torch.device(device))
    return [(e["loss"], e["grad_norm"]) for e in reporter.events if e["event"] == "step"]


@pytest.fixture(params=["CPU", "torch's kernel", pytest.param("GPU", marks=(pytest.mark.gpu, needs_gpu))])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a run that attends as this device does. "torch's kernel": as a GPU does where flash-attn is missing, on a CPU,
    with torch's function computed without its kernel.
    """
    if request.param == "torch's kernel":
        from tests.fixtures import attention as functions

        functions.install_flash_attn(monkeypatch, None)
        monkeypatch.setattr(functions.torch_varlen, "varlen_attn", functions.varlen_attn_on_cpu)
        monkeypatch.setattr(attend, "select_backend", lambda *_: attend.attend_varlen)
    return "cuda" if request.param == "GPU" else "cpu"


@pytest.mark.parametrize("case", CASES)
def test_three_steps(case: str, device: str, tiny_base: BaseFactory, tmp_path: Path) -> None:
    if case == "QLoRA" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install 'loray[qlora]'")
    base = tiny_base(std=0.1, dtype=torch.bfloat16)  # so that both dtypes begin with equal weights
    found = steps(case, "bfloat16", base, tmp_path, device)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attend, "select_backend", lambda *_: attend.attend_sdpa)
        expected = steps(case, "float32", base, tmp_path)
    losses = [loss for loss, _ in found]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.01
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0.03, atol=0.01)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_attends_with_a_kernel() -> None:
    """Without one a run is right, and slow."""
    if attend._kernel() is None:
        pytest.skip(f"neither flash-attn is installed, nor does torch {torch.__version__} have a kernel")
    assert attend.select_backend(torch.device("cuda"), torch.bfloat16, 64) is attend.attend_varlen
