"""What the driver refuses before workers start: missing packages, and what cannot fit their devices."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.driver.fit import WorkerHardware
from jobs.driver.prepare import prepare
from loray.bases.registry import add_base
from loray.errors import SpecError, UnsupportedError
from loray.machine import Gpu, Hardware
from loray.planning.devices import MIB
from loray.settings import Settings
from loray.spec import TrainSpec
from tests.fixtures.tiny import write_checkpoint
from tests.planning.recipes import HARDWARE
from tests.test_machine import H100
from tests.test_recipe import write


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    add_base(str(write_checkpoint(tmp_path / "checkpoint", std=0.05)), home=tmp_path / "home", name="tiny")
    return Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"parallel": {"strategy": "zero2"}, "num_workers": 2},
            r"zero2 .* DeepSpeed: pip install 'loray\[deepspeed\]'",
        ),
        ({"parallel": {"strategy": "zero3"}, "num_workers": 2}, r"zero3 need DeepSpeed: .*, or take fsdp2"),
        ({"quantization": {}}, r"quantization needs bitsandbytes: pip install 'loray\[qlora\]'"),
    ],
)
def test_a_package_that_is_missing_is_asked_for_before_the_data_is_read(
    fields: dict[str, Any], message: str, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    recipe = write(tmp_path, dtype="float32", data={"train": "no-such-file.jsonl"}, **fields)
    with pytest.raises(UnsupportedError, match=message):
        prepare(recipe, settings)


TINY_NODE = replace(HARDWARE, memory_bytes=320 * MIB)


@pytest.mark.parametrize(
    ("found", "fields", "message"),
    [
        (TINY_NODE, {}, None),
        (
            TINY_NODE,
            {"batch": {"rows": 512}},
            r"needs .* where this-machine has .*; gradient_checkpointing: true would",
        ),
        (
            replace(TINY_NODE, gpus=(replace(H100, memory_bytes=1 << 30),)),
            {"use_gpu": True},
            r"where h100-80gb has 1\.0",
        ),
        (replace(HARDWARE, gpus=(replace(H100, name="a new one"),)), {"use_gpu": True}, None),
        (replace(HARDWARE, gpus=(Gpu("a new one", 1 << 30, (9, 0)),)), {"use_gpu": True}, r"where a new one has 1\.0"),
        (replace(TINY_NODE, gpus=(H100,)), {"use_gpu": True}, r"of a node's own memory while loading"),
        (HARDWARE, {"use_gpu": True}, None),
    ],
    ids=["fits", "CPU", "GPU", "unknown GPU that fits", "unknown GPU", "host beside a GPU", "no GPU was found"],
)
def test_the_driver_plans_on_what_the_workers_run_on(
    found: Hardware, fields: dict[str, Any], message: str | None, tmp_path: Path, settings: Settings
) -> None:
    recipe = write(tmp_path, **({"dtype": "float32"} | fields))

    def workers_of(spec: TrainSpec) -> WorkerHardware:
        return WorkerHardware(found, 1)

    if message is None:
        assert prepare(recipe, settings, workers_of=workers_of).spec.name == recipe.spec.name
        return
    with pytest.raises(SpecError, match=message):
        prepare(recipe, settings, workers_of=workers_of)
    prepare(recipe, settings, workers_of=workers_of, is_planned=False)


def test_the_driver_plans_the_rows_that_there_are(tmp_path: Path, settings: Settings) -> None:
    """What a command cannot know: none is as long as the recipe allows."""
    data = {"train": "data.jsonl", "eval_fraction": 0.2, "max_length": 512}
    fields: dict[str, Any] = {"dtype": "float32", "batch": {"rows": 128}, "data": data}

    def workers_of(spec: TrainSpec) -> WorkerHardware:
        return WorkerHardware(replace(HARDWARE, memory_bytes=640 * MIB), 1)

    assert prepare(write(tmp_path, **fields), settings, workers_of=workers_of).data.lengths.max() < 100
    packed = fields["batch"] | {"order": "packed"}
    with pytest.raises(SpecError, match="a worker where this-machine has"):
        prepare(write(tmp_path, **(fields | {"batch": packed})), settings, workers_of=workers_of)


def test_a_driver_starts_without_peft_and_models() -> None:
    """To import them takes as long as all else that it does for a tiny model."""
    code = "import sys, jobs.train; print([m for m in ('peft', 'transformers.modeling_utils') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
