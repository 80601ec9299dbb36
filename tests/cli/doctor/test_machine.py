"""Checks of the machine, each with what is wrong planted in the facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loray.cli import doctor
from loray.cli.doctor import CheckResult, Facts, Situation, _left_in_container, existing
from loray.local.serving import announced
from tests.cli.doctor.conftest import GIB, Situations

ALL = (doctor.python, doctor.packages, doctor.memory, doctor.shm, doctor.disk, doctor.files)


@pytest.mark.parametrize("check", ALL)
def test_all_is_well(check: Callable[[Situation], CheckResult], situation: Situations) -> None:
    finding = check(situation())
    assert (finding.severity, finding.mend) == ("ok", None), finding


@pytest.mark.parametrize(
    ("check", "planted", "severity", "message", "repair"),
    [
        (doctor.python, {"python": "3.10.4"}, "error", "Python 3.10.4", "-m venv"),
        (doctor.packages, {"installed": {"torch": "2.9"}}, "error", "numpy is missing", "pip install 'numpy>=1.26'"),
        (
            doctor.packages,
            {"installed": {"numpy": "2.0", "torch": "2.5.0"}},
            "error",
            "torch 2.5.0 is not <3,>=2.6",
            "pip install 'torch<3,>=2.6'",
        ),
        (doctor.packages, {"requirements": None}, "error", "not installed", "pip install -e ."),
        (doctor.memory, {"available": GIB // 4}, "error", "536.9 MB are needed", "--pool-bytes 128MiB"),
        (doctor.memory, {"available": GIB}, "warning", "host_bytes full", "--host-bytes 256MiB"),
        (doctor.shm, {"shm": 64 << 20}, "warning", "67.1 MB free", "--shm-size"),
        (doctor.shm, {"shm": None}, "warning", "is missing", "/dev/shm"),
        (doctor.disk, {"disk_free": GIB // 2}, "error", "536.9 MB of", "loray store gc --yes"),
        (doctor.disk, {"disk_free": 5 * GIB}, "warning", "free", "loray store gc --yes"),
        (doctor.files, {"max_open_files": 256}, "error", "256 open files", "ulimit -n 800"),
        (
            doctor.files,
            {"max_open_files": 256, "hard_open_files": 256},
            "error",
            "256 open files",
            "limits.conf",
        ),
    ],
)
def test_what_is_wrong_is_found(
    check: Callable[[Situation], CheckResult],
    planted: dict[str, Any],
    severity: str,
    message: str,
    repair: str,
    situation: Situations,
) -> None:
    finding = check(situation(**planted))
    assert finding.severity == severity
    assert message in finding.message
    assert repair in (finding.mend or "")


def test_what_is_served_has_its_memory(situation: Situations) -> None:
    s = situation(available=0)
    with announced(s.settings.home, "http://127.0.0.1:1"):
        assert doctor.memory(s).severity == "ok"
    gpu = doctor.memory(situation(available=0, spec={"device": "cuda", "gpu_memory_utilization": 0.8}))
    assert gpu.message == "weights are on cuda; the pool has what they and the steps leave of 80% of its memory"
    given = doctor.memory(situation(available=0, spec={"device": "cuda", "pool_bytes": GIB}))
    assert (given.severity, given.message) == ("ok", "weights and a pool of 1.1 GB are on cuda")


def test_the_memory_of_all_bases_is_counted(situation: Situations) -> None:
    """What mends it leaves the other bases in the file."""
    s = situation(available=GIB)
    other = s.spec.model_copy(update={"base": "other", "pool_bytes": GIB * 3 // 4})
    found = doctor.memory(replace(s, others=(other,), file=Path("fleet.yaml")))
    assert found.severity == "error"
    assert "536.9 MB of tiny" in found.message
    assert "805.3 MB of other" in found.message
    assert found.mend == "set pool_bytes of tiny in fleet.yaml to 128MiB"
    gpu = other.model_copy(update={"device": "cuda"})
    assert doctor.memory(replace(s, others=(gpu,))).severity == "warning"


def test_facts_of_this_machine(tmp_path: Path) -> None:
    facts = Facts.read(tmp_path / "not" / "there")
    assert facts.available > 0
    assert facts.disk_total >= facts.disk_free > 0
    assert facts.installed["click"] is not None
    assert "mlflow-skinny" not in facts.installed  # of an extra
    assert existing(tmp_path / "not" / "there") == tmp_path


def test_a_containers_limit(tmp_path: Path) -> None:
    assert _left_in_container(tmp_path) is None
    (tmp_path / "memory.current").write_text("30\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert _left_in_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("100\n")
    assert _left_in_container(tmp_path) == 70
