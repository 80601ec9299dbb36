"""Checks of LORAY_HOME and of the kernels, with what is wrong planted in folders."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from loray.bases.registry import add_base
from loray.cli import doctor
from loray.local.cluster import LocalCluster, current_cluster, dead_cluster
from loray.local.processes import pid_scope, write_state
from tests.cli.doctor.conftest import Situations
from tests.fixtures.tiny import write_checkpoint


def test_a_home_that_cannot_be_written_to(situation: Situations, tmp_path: Path) -> None:
    assert doctor.home(situation()).severity == "ok"
    assert not (tmp_path / "home").exists()
    for path in ("/proc/nowhere/home", "/sys/home"):
        finding = doctor.home(situation(env={"LORAY_HOME": path}))
        assert finding.severity == "error"
        assert finding.message.startswith(f"LORAY_HOME={path} cannot be written to")
        assert "export LORAY_HOME=" in (finding.mend or "")
    (tmp_path / "file").touch()
    assert "is a file" in doctor.home(situation(env={"LORAY_HOME": f"{tmp_path}/file/home"})).message


def test_a_base_that_is_missing_or_damaged(situation: Situations, tmp_path: Path) -> None:
    s = situation()
    missing = doctor.base(s)
    assert (missing.severity, missing.mend) == ("error", "loray base add tiny")
    base = add_base(str(write_checkpoint(tmp_path / "tiny")), home=s.settings.home)
    deep = replace(s, deep=True)
    assert [doctor.base(s).severity, doctor.base(deep).severity] == ["ok", "ok"]
    weights = base.path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    assert [doctor.base(s).severity, doctor.base(deep).severity] == ["ok", "error"]
    weights.write_bytes(whole[:-100])
    cut = doctor.base(s)
    assert cut.severity == "error"
    assert "is damaged" in cut.message
    assert cut.mend == f"loray base add {base.source} --name tiny"
    (base.path / "loray-base.json").write_text("{}")
    assert "loray base add tiny" in (doctor.base(s).mend or "")


def test_a_cluster_that_died(situation: Situations, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    s = situation()
    assert doctor.cluster(s).severity == "ok"
    ended = subprocess.Popen(["true"])
    ended.wait()
    state = LocalCluster(
        pid=ended.pid,
        started=1,
        scope=pid_scope(),
        address="http://127.0.0.1:1",
        gcs_address="127.0.0.1:2",
        temp_dir="/tmp/loray-none-such",
        token_file=str(tmp_path / "token"),
        log_file=str(tmp_path / "log"),
    )
    s.settings.home.mkdir()
    write_state(s.settings.home / "cluster.json", state)
    dead = doctor.cluster(s)
    assert (dead.severity, dead.mend) == ("error", "loray down")
    assert f"process {ended.pid}" in dead.message
    assert current_cluster(s.settings.home) is None
    assert dead_cluster(s.settings.home) is not None

    from click.testing import CliRunner

    from loray.cli.main import cli

    env = {"LORAY_HOME": str(s.settings.home)}
    assert "removed what was left of a Ray cluster" in CliRunner().invoke(cli, ["down"], env=env).output
    assert doctor.cluster(s).severity == "ok"
    assert "nothing is running" in CliRunner().invoke(cli, ["down"], env=env).output


def test_no_compiler(situation: Situations, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = doctor.compiler(situation())
    assert finding.severity == "error"
    assert "apt-get install g++" in (finding.mend or "")
    program = tmp_path / "g++"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert doctor.compiler(situation()).severity == "ok"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor.compiler(situation()).mend == "unset CXX"


def test_kernels_that_do_not_build_or_load(
    situation: Situations, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from loray_kernels.cpu import build

    assert doctor.load_kernels() == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    held = (build.supported, build.functions, build._host, build._library)
    for cached in held:
        cached.cache_clear()
    try:
        reason = doctor.load_kernels()
    finally:
        for cached in held:
            cached.cache_clear()
    assert "/bin/false cannot compile the cpu kernels" in str(reason)
    monkeypatch.setattr(doctor, "kernels_problem", lambda: reason)
    assert "g++" in (doctor.kernels(situation()).mend or "")
    assert doctor.kernels(situation(spec={"device": "cuda:0"})).severity == "ok"


@pytest.mark.parametrize(
    ("code", "stderr", "message", "repair"),
    [
        (-4, "", "ended by signal 4", "rm -r ~/.cache/loray/kernels"),
        (1, "Traceback\nOSError: wrong ELF class\n", "wrong ELF class", "rm -r"),
        (1, "the cpu kernels cannot be kept in /x: why\n", "cannot be kept", "XDG_CACHE_HOME"),
    ],
)
def test_a_library_that_ends_its_process(
    code: int, stderr: str, message: str, repair: str, situation: Situations, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.CompletedProcess[str](["python"], code, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    finding = doctor.kernels(situation())
    assert finding.severity == "error"
    assert message in finding.message
    assert repair in (finding.mend or "")
