"""What this machine is, and the speeds that its rates mean for the base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from loray.bases.registry import add_base
from loray.cli import doctor
from loray.machine import GpuRates, Machine, Rates
from tests.cli.doctor.conftest import Situations
from tests.fixtures.machines import AVX2, H100
from tests.fixtures.planning import HARDWARE, MACHINE


def on(machine: Machine, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loray.machine.hardware", lambda: machine.hardware)
    machine.cache(home)


def test_the_machine_and_its_rates(situation: Situations, monkeypatch: pytest.MonkeyPatch) -> None:
    at = situation()
    on(MACHINE, at.settings.home, monkeypatch)
    found = doctor.machine(at)
    assert found.severity == "ok"
    assert "a CPU (AVX-512 with bfloat16), 2 cores, 17.2 GB of memory" in found.message
    assert "products in GFLOP/s: bfloat16 400, float32 200; memory 40 GB/s" in found.message


def test_a_busy_machine_is_not_measured(situation: Situations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loray.machine.hardware", lambda: HARDWARE)
    monkeypatch.setattr("loray.cli.plan.psutil.cpu_percent", lambda seconds: 90.0)
    assert "not measured yet, because it is busy" in doctor.machine(situation()).message


def test_what_it_means_for_the_base(situation: Situations, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    at = situation()
    assert "without the base tiny" in doctor.speed(at).message
    add_base(str(checkpoint), home=at.settings.home)
    slow = Rates({"bfloat16": 2e10, "float32": 1e11}, 8e10, 8e10, bandwidth=3e10)
    on(Machine(AVX2, slow), at.settings.home, monkeypatch)
    told = doctor.speed(at).message
    assert "trains in float32 (this CPU has no bfloat16 products (AVX2)), LoRA at about " in told
    assert "serves in bfloat16 (half the bytes to read" in told
    assert "with steps of up to 32 requests and 512 tokens; 32 requests at once at about " in told
    on(Machine(replace(AVX2, gpus=(H100,)), replace(slow, gpu=GpuRates(6e14, 2.5e12))), at.settings.home, monkeypatch)
    told = doctor.speed(situation(spec={"device": "cuda"})).message
    assert "trains in bfloat16 (H100 80GB HBM3 multiplies it in hardware)" in told
    assert "serves in bfloat16 (H100 80GB HBM3 multiplies it in hardware) with steps of up to 256 requests" in told
