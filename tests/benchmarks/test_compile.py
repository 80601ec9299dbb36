"""The table of compiled kernels: what is read from ptxas, and what is left out. Compiles nothing."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from benchmarks.kernels import compile as compiling
from benchmarks.kernels.compile import KernelUsage, markdown, missing, ptxas_report
from loray_kernels import BackendUnavailable
from loray_kernels.cuda.launch import Compiled

LOG = """
ptxas info    : 4 bytes gmem
ptxas info    : Compiling entry function 'lora_shrink_bf16' for 'sm_90'
ptxas info    : Function properties for lora_shrink_bf16
    16 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 16 bytes cumulative stack size
ptxas info    : Compile time = 21.532 ms
ptxas info    : Compiling entry function 'attention_decode_fp32' for 'sm_90'
ptxas info    : Function properties for attention_decode_fp32
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 18496 bytes smem
ptxas info    : Compiling entry function 'sample_fp32' for 'sm_90'
ptxas info    : Function properties for sample_fp32
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 38 registers, used 1 barriers, 10768 bytes smem, 424 bytes cmem[0]
"""


def test_what_ptxas_reports_is_read() -> None:
    assert ptxas_report(LOG) == [
        ("lora_shrink_bf16", (40, 0, 16)),
        ("attention_decode_fp32", (96, 18496, 0)),
        ("sample_fp32", (38, 10768, 0)),
    ]
    assert ptxas_report("nothing") == []


def test_a_kernel_has_a_row_and_an_architecture_a_column() -> None:
    usages = [
        KernelUsage("a_bf16", "sm_80", 40, 0, 16),
        KernelUsage("b[bf16, BLOCK=4]", "sm_80", 254, 18496, 0),
        KernelUsage("a_bf16", "sm_90", 52, 0, 0),
    ]
    assert markdown(usages) == [
        "| kernel | sm_80 | sm_90 |",
        "|---|---:|---:|",
        "| `a_bf16` | 40 · 0 · 16 | 52 · 0 · 0 |",
        "| `b[bf16, BLOCK=4]` | 254 · 18,496 · 0 |  |",
    ]
    assert [u.dtype for u in usages] == ["bf16"] * 3
    assert KernelUsage("lora_expand[fp32, VECTOR_Y=True]", "sm_80", 1, 0, 0).dtype == "fp32"
    assert KernelUsage("sample_fp32", "sm_80", 1, 0, 0).dtype is None


def test_what_is_not_installed_is_left_out_and_a_spill_in_bf16_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiling, "FILES", ("lora.cu",))
    monkeypatch.setattr(compiling, "version", lambda: (13, 5))
    monkeypatch.setattr(compiling, "compile_source", lambda name, arch: Compiled(b"", LOG))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["compile", "--format", "markdown", "--arch", "sm_90", "--dtype", "bf16"])
    with pytest.raises(SystemExit, match="registers are spilled in lora_shrink_bf16 for sm_90"):
        compiling.main()
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "Compiled by NVRTC 13.5: registers · bytes of shared memory · bytes spilled.",
        "",
        "| kernel | sm_90 |",
        "|---|---:|",
        "| `lora_shrink_bf16` | 40 · 0 · 16 |",
        "| `sample_fp32` | 38 · 10,768 · 0 |",
    ]
    assert err == "left out: the tiled kernels need Triton: pip install 'loray[cuda]'\n"

    def nothing() -> tuple[int, int]:
        raise BackendUnavailable("the cuda kernels need NVRTC")

    monkeypatch.setattr(compiling, "version", nothing)
    assert set(missing()) == {"NVRTC", "Triton"}
