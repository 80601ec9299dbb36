"""Compiles every kernel ahead of time, without a GPU, and prints its registers, shared memory and spills.

    python -m benchmarks.kernels.compile [--arch sm_80 ...] [--dtype bf16 ...] [--format text | markdown | json]

NVRTC compiles CUDA C++; Triton compiles its kernels, for Llama-3-8B's shapes, with the ptxas of its own wheel. What is
not installed is left out, and said. The exit status is 1 where a kernel spills registers in bf16.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from loray_kernels import BackendUnavailable
from loray_kernels.cuda.launch import FILES, compile_source, version

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
DTYPES = ("bf16", "fp16", "fp32")
_OF_ANY_DTYPE = ("attention_plan_", "choose_", "sample_")

# Arguments that are pointers, by name and element type; the others are 32-bit integers or fp32 numbers.
_POINTERS = {
    "elements": {"x", "y", "y0", "y1", "y2", "q", "out", "pool", "b_matrix"},
    "fp32": {"h", "z", "scale", "scales", "partial"},
    "i32": {"arrived"},
    "i64": {
        *("items", "row_start", "offsets", "segments", "h_column", "tiles", "rank_start", "d_offsets", "d_segments"),
        *("b_offsets", "b_segments", "query_start", "context_len", "table_start", "blocks"),
    },
}


class KernelUsage(NamedTuple):
    """`shared` (declared by the kernel or planned by Triton) and `spills` are in bytes. The kernels that choose tokens,
    or plan attention, belong to models of every dtype.
    """

    kernel: str
    arch: str
    registers: int
    shared: int
    spills: int

    @property
    def dtype(self) -> str | None:
        if self.kernel.startswith(_OF_ANY_DTYPE):
            return None
        return next(dtype for dtype in DTYPES if f"_{dtype}" in self.kernel or f"[{dtype}," in self.kernel)


def compile_cuda(arch: str, dtypes: Sequence[str] = DTYPES) -> Iterator[KernelUsage]:
    """Compile every kernel of cuda/csrc. Raises BackendUnavailable without NVRTC, or if a source does not compile."""
    for name in FILES:
        for kernel, usage in ptxas_report(compile_source(name, arch).log):
            found = KernelUsage(kernel, arch, *usage)
            if found.dtype is None or found.dtype in dtypes:
                yield found


def compile_triton(arch: str, dtypes: Sequence[str] = DTYPES) -> Iterator[KernelUsage]:
    """Compile every Triton kernel. Raises BackendUnavailable without Triton."""
    for label, made in triton_kernels(arch, dtypes):
        ((_, (registers, _, spills)),) = ptxas_report(_ptxas(made.asm["ptx"]))
        yield KernelUsage(label, arch, registers, made.metadata.shared, spills)


def triton_kernels(arch: str, dtypes: Sequence[str] = DTYPES) -> Iterator[tuple[str, Any]]:
    """Each Triton kernel's name in the table, and what Triton makes of it. Raises BackendUnavailable without Triton."""
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as e:
        raise BackendUnavailable(f"the tiled kernels need Triton: pip install 'loray[cuda]' ({e})") from e
    from loray_kernels.cuda import triton_kernels as kernels
    from loray_kernels.cuda.triton_launch import OPTIONS, attention_stages, shrink_turns

    for dtype in dtypes:
        size = 4 if dtype == "fp32" else 2
        own = {"lora_shrink": shrink_turns(size)[1], "attention_prefill": {"num_stages": attention_stages(size)}}
        for name, variants in _constants(size).items():
            kernel = getattr(kernels, name)
            for constants in variants:
                types = {a: _type(name, a, dtype) for a in kernel.arg_names if a not in constants}
                if constants.get("IS_INT8"):
                    types["pool"] = "*i8"
                signature = {a: types.get(a, "constexpr") for a in kernel.arg_names}
                aligned = {
                    (i,): [["tt.divisibility", 16]] for i, p in enumerate(kernel.params) if _is_aligned(p, signature)
                }
                source = ASTSource(kernel, signature, constants, aligned)
                target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
                options = {**OPTIONS, **own.get(name, {})}
                label = f"{name}[{dtype}, {', '.join(f'{k}={v}' for k, v in constants.items())}]"
                yield label, triton.compile(source, target=target, options=options)


def _constants(element_size: int) -> dict[str, list[dict[str, int | bool | None]]]:
    """The constants of each kernel's launches in `loray_kernels.cuda.triton_launch`."""
    from loray_kernels.cuda import triton_launch as tiles
    from loray_kernels.cuda.tables import TILE_COLUMNS, TILE_QUERIES, TILE_TOKENS

    tokens = {"BLOCK_T": TILE_TOKENS}
    expand = {**tokens, "BLOCK_R": tiles.EXPAND_ROWS, "BLOCK_O": TILE_COLUMNS}
    attention = {"BLOCK_TOKENS": 16, "NUM_KV_HEADS": 8, "GROUP": 4, "BLOCK_Q": TILE_QUERIES}
    attention |= {"HAS_WINDOW": False, "HAS_CAP": False}
    return {
        "lora_shrink": [
            {**tokens, "BLOCK_R": rows, "BLOCK_K": tiles.shrink_turns(element_size)[0]}
            for rows in (16, 32, tiles.SHRINK_ROWS)
        ],
        "lora_expand": [{**expand, "VECTOR_Y": True}, {**expand, "VECTOR_Y": False}],
        "vera_expand": [{**tokens, "BLOCK_R": tiles.VERA_ROWS, "BLOCK_O": tiles.VERA_COLUMNS}],
        "attention_prefill": [
            {**attention, "HEAD_DIM": d, "BLOCK_D": d, "BLOCK_K": tiles.keys_at_once(d, is_int8=is_int8), **cache}
            for d in (64, 128)
            for is_int8 in (False, True)
            for cache in [{"IS_INT8": is_int8} | ({} if is_int8 else {"scales": None})]
        ],
    }


def _is_aligned(parameter: Any, signature: dict[str, str]) -> bool:
    """Pointers and strides that the kernel does not exclude are compiled for multiples of 16."""
    if signature[parameter.name].startswith("*"):
        return not parameter.do_not_specialize_on_alignment
    is_stride = parameter.name.endswith(("stride", "stride0", "stride1", "stride2"))
    return is_stride and not parameter.do_not_specialize


def _type(kernel: str, argument: str, dtype: str) -> str:
    if kernel == "attention_prefill" and argument in ("scale", "soft_cap"):
        return "fp32"
    for kind, names in _POINTERS.items():
        if argument in names:
            return f"*{dtype if kind == 'elements' else kind}"
    return "i32"


def _ptxas(ptx: str) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    target = ptx.split(".target ", 1)[1].split(maxsplit=1)[0].rstrip(",")
    binary = get_ptxas(int(re.sub(r"\D", "", target))).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [binary, "-v", f"-arch={target}", file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendUnavailable(f"ptxas refuses what Triton made for {target}:\n{done.stderr}")
    return done.stderr


def ptxas_report(log: str) -> list[tuple[str, tuple[int, int, int]]]:
    """Read (kernel, (registers, shared, spills)) from the output of `ptxas -v`."""
    found = []
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part.split("'", 1)[0]
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        spills = re.search(r"(\d+) bytes spill stores", part)
        found.append((name, tuple(int(m.group(1)) if m else 0 for m in (registers, shared, spills))))
    return found  # type: ignore[return-value]


def missing() -> dict[str, str]:
    """Say why kernels are left out: NVRTC or Triton is not installed."""
    out = {}
    try:
        version()
    except BackendUnavailable as e:
        out["NVRTC"] = str(e)
    if importlib.util.find_spec("triton") is None:
        out["Triton"] = "the tiled kernels need Triton: pip install 'loray[cuda]'"
    return out


def markdown(usages: Sequence[KernelUsage]) -> list[str]:
    """Make a table with a row for each kernel and a column for each architecture."""
    archs = list(dict.fromkeys(u.arch for u in usages))
    cells = {(u.kernel, u.arch): f"{u.registers} · {u.shared:,} · {u.spills}" for u in usages}
    lines = [f"| kernel | {' | '.join(archs)} |", f"|---|{'---:|' * len(archs)}"]
    for kernel in dict.fromkeys(u.kernel for u in usages):
        lines.append(f"| `{kernel}` | {' | '.join(cells.get((kernel, arch), '') for arch in archs)} |")
    return lines


def _versions(left_out: dict[str, str]) -> str:
    known = [] if "NVRTC" in left_out else [f"NVRTC {'.'.join(map(str, version()))}"]
    known += [] if "Triton" in left_out else [f"Triton {importlib.metadata.version('triton')}"]
    return ", ".join(known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", help=f"default: {', '.join(ARCHITECTURES)}")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: all")
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text")
    args = parser.parse_args()
    left_out, usages, dtypes = missing(), list[KernelUsage](), args.dtype or DTYPES
    for arch in args.arch or ARCHITECTURES:
        usages += () if "NVRTC" in left_out else compile_cuda(arch, dtypes)
        usages += () if "Triton" in left_out else compile_triton(arch, dtypes)
    if args.format == "json":
        lines = [json.dumps([usage._asdict() for usage in usages])]
    elif args.format == "markdown":
        lines = [f"Compiled by {_versions(left_out)}: registers · bytes of shared memory · bytes spilled.", ""]
        lines += markdown(usages)
    else:
        lines = [f"{'kernel':<100}{'arch':>7}{'registers':>11}{'shared':>8}{'spills':>8}"]
        lines += [f"{u.kernel:<100}{u.arch:>7}{u.registers:>11}{u.shared:>8}{u.spills:>8}" for u in usages]
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.stderr.writelines(f"left out: {reason}\n" for reason in left_out.values())
    spilled = [f"{u.kernel} for {u.arch}" for u in usages if u.spills and u.dtype in (None, "bf16")]
    if spilled:
        sys.exit(f"registers are spilled in {', '.join(spilled)}")


if __name__ == "__main__":
    main()
