"""The recipes of jobs on Kubernetes fit their pods, and the GPU that they name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from loray.bases import smollm2
from loray.bases.config import ModelConfig
from loray.machine import Gpu
from loray.planning.devices import PRESETS, device_on
from loray.planning.plan import make_plan
from loray.planning.run import shape_of
from loray.recipes.load import load_recipe
from loray.recipes.resolve import on_hardware
from tests.fixtures.machines import AVX2
from tests.infra.manifests import JOBS, QWEN3_8B, bytes_of, data, groups

SHAPES = {
    "qwen3-8b": ModelConfig.from_hf(QWEN3_8B),
    "smollm2-135m-instruct": ModelConfig.from_hf(smollm2.CONFIG),
}


@pytest.mark.parametrize("folder", JOBS)
def test_the_job_s_recipe_fits_its_pods_and_the_gpu_that_it_names(folder: str, tmp_path: Path) -> None:
    (text,) = data("ConfigMap", "loray-recipe", folder).values()
    (tmp_path / "recipe.yaml").write_text(text)
    spec = load_recipe(str(tmp_path / "recipe.yaml")).spec
    (container,) = groups(folder)[1]["template"]["spec"]["containers"]
    limits, gpus = container["resources"]["limits"], ()
    if spec.use_gpu is True:
        (gigabytes,) = re.findall(r"GPU of (\d+) GB", text)
        gpus = (Gpu("A100", PRESETS[f"a100-{gigabytes}gb"].memory_bytes, (8, 0)),)
        assert limits["nvidia.com/gpu"] == str(len(gpus))
    pod = replace(AVX2, memory_bytes=bytes_of(limits["memory"]), gpus=gpus)
    device = device_on(pod, 1, use_gpu=bool(gpus))
    assert device is not None
    plan = make_plan(shape_of(on_hardware(spec, pod).spec, SHAPES[spec.base]), device)
    assert plan.problems == ()
    assert plan.host is None or plan.host.usable_bytes is not None
