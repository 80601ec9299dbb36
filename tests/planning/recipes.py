"""Recipes and devices of plans."""

from __future__ import annotations

from typing import Any

from loray.bases.presets import preset
from loray.machine import Hardware, Machine, Rates
from loray.planning.devices import PRESETS, Device
from loray.planning.run import RunShape, shape_of
from loray.spec import TrainSpec

A100 = PRESETS["a100-80gb"]
HARDWARE = Hardware("a CPU", "AVX-512 with bfloat16", multiplies_bfloat16=True, num_cores=2, memory_bytes=16 << 30)


def machine(products: float = 4e11, attention: float = 8e10, dense: float = 9e10) -> Machine:
    """A machine that multiplies bfloat16 in hardware, twice as fast as float32."""
    rates = Rates({"bfloat16": products, "float32": products / 2}, attention, dense, bandwidth=4e10)
    return Machine(HARDWARE, rates)


MACHINE = machine()


def recipe(**fields: Any) -> TrainSpec:
    data: dict[str, Any] = {
        "name": "plan",
        "adapter": {"method": "lora"},
        "data": {"train": "data.jsonl"},
        "batch": {"rows": 1},
        "optimizer": {"learning_rate": 1e-4},
        "max_steps": 1,
        "dtype": "bfloat16",
    }
    return TrainSpec.parse(data | fields, source="the test's recipe")


def long_run(
    base: str, context: int, *, group_size: int | None = None, workers: int = 1, sequence: int = 1, **fields: Any
) -> RunShape:
    """LongLoRA on a well-known base, stretched to `context` tokens."""
    model = preset(base)
    assert model is not None
    scaling = {"type": "linear", "factor": context / model.max_position_embeddings}
    spec = recipe(
        adapter={"method": "longlora"},
        rope_scaling=scaling,
        attention={"type": "s2", "group_size": group_size},
        num_workers=workers,
        parallel={"sequence": sequence, "strategy": fields.pop("strategy", "ddp")},
        **fields,
    )
    return shape_of(spec, model)


def bare(device: Device = A100) -> Device:
    """Nothing but the tensors."""
    return device.model_copy(update={"framework_bytes": 0, "fragmentation": 0.0})
