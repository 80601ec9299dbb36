"""What the driver refuses before workers start: missing packages, and what cannot fit their devices."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.driver.fit import WorkerHardware
from jobs.driver.prepare import Prepared, prepare
from loray.errors import DataError, SpecError, UnsupportedError
from loray.machine import Gpu, Hardware
from loray.planning.devices import MIB
from loray.settings import Settings
from loray.spec import TrainSpec
from tests.fixtures.machines import H100
from tests.fixtures.planning import HARDWARE
from tests.fixtures.recipes import write
from tests.fixtures.tiny import byte_tokenizer
from tests.fixtures.training_data import jsonl


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parallel": {"strategy": "zero2"}}, r"zero2 .* DeepSpeed: pip install 'loray\[deepspeed\]'"),
        ({"parallel": {"strategy": "zero3"}}, r"zero3 need DeepSpeed: .*, or take fsdp2"),
        ({"quantization": {}}, r"quantization needs bitsandbytes: pip install 'loray\[qlora\]'"),
    ],
)
def test_a_package_that_is_missing_is_asked_for_before_the_data_is_read(
    fields: dict[str, Any], message: str, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    recipe = write(tmp_path, dtype="float32", data={"train": "no-such-file.jsonl"}, num_workers=2, **fields)
    with pytest.raises(UnsupportedError, match=message):
        prepare(recipe, settings)


ATTENTION = {"adapter": {"method": "lora", "rank": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}}
TINY_NODE, ON_GPU = replace(HARDWARE, memory_bytes=320 * MIB), {"use_gpu": True}


def with_gpu(gpu: Gpu, node: Hardware = HARDWARE) -> Hardware:
    return replace(node, gpus=(gpu,))


@pytest.mark.parametrize(
    ("found", "fields", "message"),
    [
        (TINY_NODE, {}, None),
        (
            TINY_NODE,
            ATTENTION | {"batch": {"rows": 512}},
            r"this-machine has .*; gradient_checkpointing: true would",
        ),
        (with_gpu(replace(H100, memory_bytes=1 << 30), TINY_NODE), ON_GPU, r"where h100-80gb has 1\.0"),
        (with_gpu(replace(H100, name="a new one")), ON_GPU, None),
        (with_gpu(Gpu("a new one", 1 << 30, (9, 0))), ON_GPU, r"where a new one has 1\.0"),
        (with_gpu(H100, TINY_NODE), ON_GPU, r"of a node's own memory while loading"),
        (HARDWARE, ON_GPU, None),
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


def test_a_steps_rows_are_cut_by_what_the_workers_hold(tmp_path: Path, settings: Settings) -> None:
    """By the rows that there are, and with the reason."""
    data = {"train": "data.jsonl", "eval_fraction": 0.2, "max_length": 512}
    fields: dict[str, Any] = {"dtype": "float32", "batch": {"rows": 512, "accumulation": "auto"}, "data": data}

    def cut(memory_bytes: int) -> Prepared:
        found = WorkerHardware(replace(HARDWARE, memory_bytes=memory_bytes), 1)
        return prepare(write(tmp_path, **fields), settings, workers_of=lambda spec: found)

    small, large = cut(320 * MIB), cut(1 << 40)
    assert (large.spec.batch.rows, large.spec.batch.accumulation) == (512, 1)
    rows, times = small.spec.batch.rows or 0, small.spec.batch.chosen_accumulation
    assert 1 < rows < 512
    assert rows * times == 512
    assert re.fullmatch(r"the most that fit this-machine: \d+\.\d MB of \d+\.\d MB", small.batch_reason)
    assert small.spec.micro_batches_per_step == times
    fields |= {"use_gpu": True}  # and none is found
    blind = cut(1 << 40)
    assert (blind.spec.batch.rows, blind.spec.batch.accumulation) == (512, 1)
    assert blind.batch_reason == "the workers' memory is not known"
    assert prepare(write(tmp_path, dtype="float32"), settings).batch_reason == ""


def test_an_invocation_is_that_of_the_bases_template_unless_it_is_given(tmp_path: Path, settings: Settings) -> None:
    turns = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    data = {"train": jsonl(tmp_path, *[{"messages": turns}] * 8, name="chats.jsonl"), "eval_fraction": 0.2}
    prepared = prepare(write(tmp_path, dtype="float32", data=data, adapter={"method": "alora", "rank": 4}), settings)
    tokens = tuple(byte_tokenizer()("<|im_start|>assistant", add_special_tokens=False).input_ids)
    assert prepared.spec.adapter.invoked_by == tokens
    ids, targets = prepared.data.train.row(0)
    assert byte_tokenizer().decode(ids[targets].tolist()) == "2<|im_end|>"
    other = {"method": "alora", "rank": 4, "invocation": "<|im_start|>judge"}
    with pytest.raises(DataError, match=r"chats\.jsonl.* of the invocation '<\|im_start\|>judge' are not in it"):
        prepare(write(tmp_path, dtype="float32", data=data, adapter=other), settings)
