"""Compiling the C++ kernels: once for all processes of a machine, from several at once, and without a compiler."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import loray_kernels
from loray_kernels import BackendUnavailable, available, backend, compiled
from loray_kernels.cpu import build
from loray_kernels.cpu import build as native
from loray_kernels.cpu.ops import CpuOps
from loray_kernels.reference import ReferenceOps

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")

HOST = ("host", ("host.cpp",))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "loray" / "kernels"


@pytest.fixture
def no_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    forget = (native._host, native.supported, native._library, native.functions, loray_kernels._warn_once)
    for cached in forget:
        cached.cache_clear()
    yield
    for cached in forget:
        cached.cache_clear()


def test_a_library_is_compiled_once_and_found_again(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.library(*HOST)
    assert first.parent == empty_cache
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled although it was there"))
    assert build.library(*HOST) == first


def test_other_flags_or_another_compiler_make_another_library(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.library(*HOST)
    assert build.library(*HOST, ("-DLORAY_OTHER",)) != first
    compiler = tmp_path / "my-g++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert build.library(*HOST) != first


def test_without_a_compiler_one_that_another_made_serves(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.library(*HOST)
    monkeypatch.setenv("PATH", "")
    assert build.library(*HOST) == first
    with pytest.raises(BackendUnavailable, match=r"need a C\+\+ compiler: install g\+\+"):
        build.library(*HOST, ("-DLORAY_OTHER",))


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_auto_warns_once_and_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="loray"):
        for _ in range(3):
            assert type(backend("auto")) is ReferenceOps
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "install g++" in caplog.text
    assert available() == ("reference",)
    with pytest.raises(BackendUnavailable, match="install g"):
        backend("cpu")


def test_a_compiler_that_fails_says_what_it_said(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "bad-g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "unknown option" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BackendUnavailable, match="unknown option"):
        build.library(*HOST)
    assert not list(empty_cache.glob("*.so"))
    assert not list(empty_cache.glob(".build-*"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BackendUnavailable, match="set XDG_CACHE_HOME to a folder that can be written"):
        build.library(*HOST)


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert compiled.cache_folder() == Path("/somewhere/loray/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert compiled.cache_folder() == Path("/home/me/.cache/loray/kernels")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # a user whom no file knows, as in a container
    with pytest.raises(BackendUnavailable, match="set HOME or XDG_CACHE_HOME"):
        compiled.cache_folder()


def test_processes_and_threads_that_build_at_once_share_one_library(empty_cache: Path) -> None:
    code = "from loray_kernels.cpu import build; print(build.library('host', ('host.cpp',)))"
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(build.library(*HOST))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in processes:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        found.append(Path(output.strip()))
    assert len(found) == 6
    assert len(set(found)) == 1
    assert [p.name for p in empty_cache.glob("*.so")] == [found[0].name]


def test_where_torch_is_held_to_a_slower_instruction_set_so_are_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = native.supported.__wrapped__
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    every = ask()
    without_amx = tuple(isa for isa in every if isa != "amx")
    for value, isas in (("default", every[:1]), ("avx2", every[:2]), ("avx512", without_amx), ("unknown", every)):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", value)
        assert ask() == isas


def test_auto_is_the_cpus_where_it_runs() -> None:
    assert available() == ("cpu", "reference")
    assert isinstance(backend("auto"), CpuOps)
    assert backend("auto").isa == native.supported()[-1]  # type: ignore[attr-defined]
    assert type(backend("auto", "meta")) is ReferenceOps
    with pytest.raises(ValueError, match="for tensors on the CPU, not on meta; take 'auto'"):
        backend("cpu", "meta")
    with pytest.raises(ValueError, match="no instruction set 'mmx' here; there is: generic"):
        CpuOps("mmx")
