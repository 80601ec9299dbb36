"""Compiles every kernel ahead of time, without a GPU, and prints its registers, shared memory and spills.

    python -m loray_kernels.cuda.compile [--arch sm_80 --arch sm_90] [--dtype bf16 --dtype fp16 --dtype fp32] [--json]

NVRTC compiles CUDA C++; Triton compiles its kernels, for Llama-3-8B's shapes, with the ptxas of its own wheel.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from loray_kernels.compiled import BackendUnavailable
from loray_kernels.cuda.nvrtc import FILES, compile_source

ARCHITECTURES = ("sm_80", "sm_90")
DTYPES = ("bf16", "fp16", "fp32")

# Arguments that are pointers, by name and element type; the others are 32-bit integers or fp32 numbers.
_POINTERS = {
    "elements": {"x", "y", "y0", "y1", "y2", "q", "out", "pool", "weight", "cos", "sin", "gate_up", "b_matrix"},
    "fp32": {"h", "z", "scale"},
    "i64": {
        *("items", "row_start", "offsets", "segments", "h_column", "tiles", "rank_start", "d_offsets", "d_segments"),
        *("b_offsets", "b_segments", "query_start", "context_len", "table_start", "blocks", "own_row"),
    },
}


class Usage(NamedTuple):
    """`shared` (declared by the kernel or planned by Triton) and `spills` are in bytes."""

    kernel: str
    arch: str
    registers: int
    shared: int
    spills: int


def compile_cuda(arch: str) -> Iterator[Usage]:
    """Every kernel of cuda/csrc. BackendUnavailable without NVRTC, or if a source does not compile."""
    for name in FILES:
        for kernel, usage in _ptxas_report(compile_source(name, arch).log):
            yield Usage(kernel, arch, *usage)


def compile_triton(arch: str, dtypes: Sequence[str] = DTYPES) -> Iterator[Usage]:
    """Every Triton kernel. BackendUnavailable without Triton."""
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as e:
        raise BackendUnavailable(f"the tiled kernels need Triton: pip install 'loray[cuda]' ({e})") from e
    from loray_kernels.cuda.tiles import attention, lora, rows

    known = {**vars(attention), **vars(lora), **vars(rows)}
    for name, variants in _constants().items():
        kernel = known[name]
        for dtype in dtypes:
            for constants in variants:
                types = {a: _type(name, a, dtype) for a in kernel.arg_names if a not in constants}
                signature = {a: types.get(a, "constexpr") for a in kernel.arg_names}
                aligned = {
                    (i,): [["tt.divisibility", 16]]
                    for i, a in enumerate(kernel.arg_names)
                    if signature[a].startswith("*") or a.endswith(("stride", "stride0", "stride1", "stride2"))
                }
                source = ASTSource(kernel, signature, constants, aligned)
                target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
                made = triton.compile(source, target=target, options={"num_stages": 1 if dtype == "fp32" else 3})
                label = f"{name}[{dtype}, {', '.join(f'{k}={v}' for k, v in constants.items())}]"
                ((_, (registers, _, spills)),) = _ptxas_report(_ptxas(made.asm["ptx"]))
                yield Usage(label, arch, registers, made.metadata.shared, spills)


def _constants() -> dict[str, list[dict[str, int | bool]]]:
    """The constants of each kernel's launches in `tiles.launch`."""
    from loray_kernels.cuda.tables import TILE_COLUMNS, TILE_QUERIES, TILE_TOKENS
    from loray_kernels.cuda.tiles import launch as tiles

    tokens = {"BLOCK_T": TILE_TOKENS}
    expand = {**tokens, "BLOCK_R": tiles.EXPAND_ROWS, "BLOCK_O": TILE_COLUMNS}
    attention = {"BLOCK_TOKENS": 16, "NUM_KV_HEADS": 8, "GROUP": 4, "BLOCK_Q": TILE_QUERIES}
    return {
        "lora_shrink": [
            {**tokens, "BLOCK_R": rows, "BLOCK_K": tiles.SHRINK_COLUMNS} for rows in (16, 32, tiles.SHRINK_ROWS)
        ],
        "lora_expand": [{**expand, "VECTOR_Y": True}, {**expand, "VECTOR_Y": False}],
        "vera_expand": [{**tokens, "BLOCK_R": tiles.VERA_ROWS, "BLOCK_O": tiles.VERA_COLUMNS}],
        "attention_prefill": [
            {**attention, "HEAD_DIM": d, "BLOCK_D": d, "BLOCK_K": tiles.keys_at_once(d)} for d in (64, 128)
        ],
        "rms_norm": [{"OWN": own, "BLOCK_D": 4096} for own in (False, True)],
        "rope": [{"BLOCK_H": 8, "BLOCK_E": 64}],
        "silu_mul": [{"BLOCK_M": 1024}],
    }


def _type(kernel: str, argument: str, dtype: str) -> str:
    if argument == "eps" or (kernel, argument) == ("attention_prefill", "scale"):
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


def _ptxas_report(log: str) -> list[tuple[str, tuple[int, int, int]]]:
    """(kernel, (registers, shared, spills)) from `ptxas -v`."""
    found = []
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part.split("'", 1)[0]
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        spills = re.search(r"(\d+) bytes spill stores", part)
        found.append((name, tuple(int(m.group(1)) if m else 0 for m in (registers, shared, spills))))
    return found  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", help="default: sm_80 and sm_90")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="of the Triton kernels; default: all")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    usages = []
    for arch in args.arch or ARCHITECTURES:
        usages += [*compile_cuda(arch), *compile_triton(arch, args.dtype or DTYPES)]
    if args.json:
        lines = [json.dumps([usage._asdict() for usage in usages])]
    else:
        lines = [f"{'kernel':<100}{'arch':>7}{'registers':>11}{'shared':>8}{'spills':>8}"]
        lines += [f"{u.kernel:<100}{u.arch:>7}{u.registers:>11}{u.shared:>8}{u.spills:>8}" for u in usages]
    sys.stdout.writelines(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main()
