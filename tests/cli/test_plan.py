"""The command `loray plan`: tables, JSON, exit codes, and bases that are not on this machine."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import add_base
from loray.recipes.load import purpose, shipped
from tests.cli.run import Loray, Result
from tests.fixtures.planning import HARDWARE, MACHINE
from tests.fixtures.tiny import write_checkpoint

RECIPE: dict[str, Any] = {
    "name": "planned",
    "base": "Meta-Llama-3-8B",
    "adapter": {"method": "longlora"},
    "rope_scaling": {"factor": 16},
    "attention": {"type": "s2", "group_size": 8192},
    "data": {"train": "data.jsonl"},
    "batch": {"rows": 1},
    "optimizer": {"learning_rate": 1e-4},
    "max_steps": 1,
    "num_workers": 8,
    "parallel": {"sequence": 8, "strategy": "fsdp2"},
    "gradient_checkpointing": True,
    "use_gpu": True,
}


Plan = Callable[..., Result]


@pytest.fixture
def home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in ("loray.machine", "loray.cli.plan"):
        monkeypatch.setattr(f"{module}.hardware", lambda: HARDWARE)
    MACHINE.cache(home)
    return home


@pytest.fixture
def plan(home: Path, loray: Loray) -> Plan:
    return lambda recipe, *args: loray("plan", json.dumps(recipe) if isinstance(recipe, dict) else recipe, *args)


def test_tables_of_a_run_that_fits(plan: Plan) -> None:
    code, out, err = plan(RECIPE)
    assert (code, err) == (0, "")
    for words in (
        "planned: longlora on Meta-Llama-3-8B",
        "8.0 G, 532.4 M trained (6.63%), bfloat16",
        "1 × 131072 tokens × 1 micro-batches; S2-Attn, G = 8192",
        "8 workers: 1 data × 8 sequence, fsdp2; 16384 tokens each; keep layer inputs (checkpointing)",
        "Memory of a worker (a100-80gb: 80.8 GB to use)",
        "fits",
        "layer inputs",
        "HALO, G = 8192",
        "HALO, G = 32768",
        "8.4 MB (35.0×)",
        "33.6 MB (8.8×)",
        "293.6 MB",
        "469.8 MB",
        "tokens/s",
        "312 TFLOP/s",
        "Memory of a node (its own, with 8 workers and the driver: 1.0 TB to use)",
        "a tensor of the base, as each worker reads it",
    ):
        assert words in out
    # The paper's group is a quarter of the context.
    assert "warning: group_size 8192 is less than 32768, a quarter of the context" in out


def test_json_has_the_same_numbers(plan: Plan) -> None:
    facts = plan(RECIPE, "--json").json
    assert (facts["recipe"], facts["base"], facts["is_refused"]) == ("planned", "Meta-Llama-3-8B", False)
    exchange, host = facts["traffic"]["exchange"], facts["host"]
    assert (exchange["halo_bytes"], exchange["num_hops"]) == (8192 * 128 * 4 * 2, 1)
    assert (facts["parameters"]["base"], facts["run"]["sequence"]) == (8_030_261_248, 8)
    assert facts["memory"]["peak_bytes"] <= facts["device"]["usable_bytes"]
    assert facts["time"]["tokens_per_s"] > 0
    assert host["peak_bytes"] == host["moments"][host["peak_moment"]]


def test_a_plan_that_does_not_fit_exits_with_1_and_says_what_would_fit(plan: Plan) -> None:
    small = RECIPE | {"parallel": {"sequence": 1, "strategy": "ddp"}, "gradient_checkpointing": False}
    code, out, _ = plan(small)
    assert code == 1
    assert "does not fit" in out
    assert "refusal: needs" in out
    assert "gradient_checkpointing: true" in out.split("refusal")[1]
    code, out, _ = plan(small, "--json")
    assert code == 1
    refusal = json.loads(out)["problems"][0]
    assert refusal["severity"] == "refusal"


def test_workers_and_device_may_be_others_than_the_recipes(plan: Plan) -> None:
    facts = plan(RECIPE, "--workers", 16, "--device", "h100-80gb", "--json").json
    assert facts["run"]["num_workers"] == 16
    assert facts["run"]["num_data_groups"] == 2
    assert facts["device"]["name"] == "h100-80gb"
    assert "parallel.sequence is 8, which does not divide num_workers (12)" in plan(RECIPE, "--workers", 12).failed


def test_a_device_may_be_a_file(plan: Plan, home: Path) -> None:
    file = home / "l40s.yaml"
    file.write_text("{name: l40s, memory_bytes: 48GB, flops: 362e12, bandwidth: 864e9, link_bandwidth: 32e9}")
    facts = plan(RECIPE, "--device", file, "--json").json
    assert (facts["device"]["memory_bytes"], facts["device"]["flops"]) == (48 * 10**9, 362e12)
    file.write_text("{name: l40s, memory: 48GB}")
    code, _, err = plan(RECIPE, "--device", file)
    assert code == 1
    assert "is not a valid device" in err
    assert "known fields: name, memory_bytes" in err
    assert "no device 'a100'; there are a100-40gb, a100-80gb" in plan(RECIPE, "--device", "a100").failed


def test_this_machine_is_the_default_without_gpus(plan: Plan) -> None:
    device = json.loads(plan(RECIPE | {"base": "smollm2", "use_gpu": False}, "--json").out)["device"]  # it is refused
    assert (device["name"], device["memory_bytes"], device["flops"]) == ("this-machine", (16 << 30) // 8, 4e11 / 8)


def test_shapes_come_from_this_machine_from_a_file_or_from_what_is_known(plan: Plan, home: Path) -> None:
    code, _, err = plan(RECIPE | {"base": "mystery"})
    assert code == 1
    assert "no base model 'mystery' on this machine" in err
    assert "Llama-2-7b-hf" in err
    assert "--config" in err
    checkpoint = write_checkpoint(home / "checkpoint")
    given = plan(RECIPE | {"base": "mystery"}, "--config", checkpoint / "config.json", "--json").json
    assert given["model"]["hidden_size"] == 64
    add_base(str(checkpoint), home=home, name="mystery")
    assert plan(RECIPE | {"base": "mystery"}, "--json").json["model"] == given["model"]
    (home / "other.json").write_text("[]")
    assert "is not the config.json of a model" in plan(RECIPE, "--config", home / "other.json").failed


def test_a_base_whose_rope_is_scaled_is_refused(plan: Plan, home: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 256}
    checkpoint = write_checkpoint(home / "checkpoint", rope_parameters=rope)
    code, out, err = plan(RECIPE, "--config", checkpoint / "config.json")
    assert (code, out) == (1, "")
    assert "RoPE is 'yarn' already" in err


def test_every_shipped_recipe_has_a_plan_and_fits_where_it_is_meant_to_run(plan: Plan) -> None:
    for name in shipped():
        facts = plan(name, "--json").json
        assert not facts["is_refused"], name
        assert facts["problems"] == [], name
        named = re.findall(r"on 8 GPUs of (\d+) GB", purpose(name))
        assert facts["device"]["name"] == (f"a100-{named[0]}gb" if named else "this-machine")


def test_a_machine_that_cannot_be_measured(plan: Plan, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cached,) = home.glob("machine-*.json")
    cached.unlink()
    monkeypatch.setattr("loray.cli.plan.sys.executable", "/bin/false")
    assert "this machine could not be measured; name a --device" in plan("lora_smollm2").failed


@pytest.mark.parametrize(("percent", "is_kept"), [(0.0, True), (60.0, False)])
def test_rates_are_kept_where_nothing_else_ran(
    plan: Plan, home: Path, monkeypatch: pytest.MonkeyPatch, percent: float, is_kept: bool
) -> None:
    (cached,) = home.glob("machine-*.json")
    cached.unlink()

    def printed(command: list[str], *, env: dict[str, str], **others: object) -> subprocess.CompletedProcess[str]:
        assert "OMP_NUM_THREADS" not in env  # the rates are of all cores
        return subprocess.CompletedProcess(command, 0, json.dumps(asdict(MACHINE.rates)), "")

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("loray.cli.plan.subprocess.run", printed)
    monkeypatch.setattr("loray.cli.plan.psutil.cpu_percent", lambda seconds: percent)
    code, out, err = plan("lora_smollm2", "--json")
    assert code == 0
    assert json.loads(out)["device"]["flops"] == MACHINE.rates.fastest
    assert err.startswith("measuring this machine")
    assert ("is busy" in err) != is_kept
    assert cached.exists() == is_kept
