"""The C++ kernels for ARM, compiled on x86-64 and run by QEMU on this process's tensors.

The emulated process reads the pages that a kernel touches from this one (emulated.cpp), so all tests of the kernels are
tests of these too.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import struct
import subprocess
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from loray_kernels.cpu import build
from loray_kernels.cpu.build import library

ISA = "aarch64"
_COMPILER, _EMULATOR, _ROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
_DRIVER = Path(__file__).with_suffix(".cpp")
_PAGE, _WORDS, _TRIES = 4096, 16, 3


@cache
def provide() -> None:
    """Let `native` find the emulated kernels as those of an instruction set. Skips the test where tools are missing."""
    if platform.machine() != "x86_64":
        pytest.skip("ARM is emulated on x86-64 alone")
    for tool in (_COMPILER, _EMULATOR):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}: apt-get install g++-aarch64-linux-gnu qemu-user")
    emulated = _Library()
    atexit.register(emulated.stop)
    for name in ("_library", "_beside_python"):
        own = getattr(build, name)
        setattr(build, name, cache(lambda isa, own=own: emulated if isa == ISA else own(isa)))


class _Library:
    """What `native` needs of a ctypes library."""

    def __init__(self) -> None:
        with mock.patch.dict(os.environ, CXX=_COMPILER):
            kernels = library(ISA, build._SOURCES, (f"-DLORAY_ISA={ISA}",))
        driver = kernels.with_name(f"emulated-{hashlib.sha256(_DRIVER.read_bytes()).hexdigest()[:16]}")
        if not driver.exists():
            made = driver.with_suffix(f".{os.getpid()}")
            subprocess.run([_COMPILER, "-O2", "-std=c++17", "-fopenmp", str(_DRIVER), "-o", str(made)], check=True)
            made.replace(driver)
        self._command = [_EMULATOR, "-L", _ROOT, str(driver), str(kernels)]
        self._process: subprocess.Popen[bytes] | None = None
        self._memory = os.open("/proc/self/mem", os.O_RDONLY)

    def __getitem__(self, name: str) -> _Kernel:
        return _Kernel(self, name)

    def call(self, name: str, words: list[int], reals: list[float]) -> None:
        """AssertionError if the kernel dies or reads where this process has no memory."""
        words = [w % 2**64 for w in words] + [0] * (_WORDS - len(words))
        reals = reals + [0.0] * (2 - len(reals))
        message = struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<{_WORDS}Q2f", *words, *reals)
        for _ in range(_TRIES):  # a new process has its own memory elsewhere
            if self._done(name, message):
                return
        raise AssertionError("the emulated process has its own memory where this one has tensors")

    def _done(self, name: str, message: bytes) -> bool:
        """False if an address is taken over there."""
        if self._process is None:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        requests, answers = self._process.stdout, self._process.stdin
        assert requests is not None
        assert answers is not None
        answers.write(message)
        answers.flush()
        changes: list[tuple[int, bytes]] = []
        while True:
            kind, address = struct.unpack("<cQ", requests.read(9) or self._died(name))
            match kind:
                case b"P":
                    try:
                        answers.write(os.pread(self._memory, _PAGE, address))
                    except OSError:
                        self.stop()
                        raise AssertionError(f"{name} reads {address:#x}, where nothing is") from None
                    answers.flush()
                case b"W":
                    (size,) = struct.unpack("<Q", requests.read(8))
                    changes.append((address, requests.read(size)))
                case b"T":
                    self.stop()
                    return False
                case _:
                    for at, data in changes:
                        ctypes.memmove(at, data, len(data))
                    return True

    def _died(self, name: str) -> bytes:
        assert self._process is not None
        raise AssertionError(f"{name} ended with {self._process.wait()}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None


class _Kernel:
    def __init__(self, library: _Library, name: str) -> None:
        self._library, self._name = library, name
        self.argtypes: tuple[Any, ...] = ()
        self.restype = None

    def __call__(self, *arguments: Any) -> None:
        words: list[int] = []
        reals: list[float] = []
        for value, kind in zip(arguments, self.argtypes, strict=True):
            if kind is ctypes.c_float:
                reals.append(value)
            elif isinstance(value, ctypes.Array):
                words.append(ctypes.addressof(value))
            else:
                words.append(value or 0)
        self._library.call(self._name, words, reals)
