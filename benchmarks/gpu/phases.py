"""The phases of `make gpu`: commands with what they need, in the order of how much the later ones rely on them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

LIMIT_S = 480.0
_KERNELS = ("torch", "triton", "cupy", "numpy")
_ENGINE = (*_KERNELS, "pydantic", "yaml", "safetensors", "transformers")
_TRAINING = ("torch", "numpy", "pydantic", "yaml", "transformers", "peft")
_TESTS = ("pytest", "pytest_timeout")


class Phase(NamedTuple):
    """`command` runs in the repository's root with this Python; a phase that measures writes figures, others end well
    or not. `needs` are modules.
    """

    name: str
    about: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    measures: bool = False

    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def arguments(self, figures: Path) -> list[str]:
        return [sys.executable, *self.command, *(("--json", str(figures)) if self.measures else ())]


def _tests(name: str, about: str, path: str, needs: tuple[str, ...], *options: str) -> Phase:
    # Without the suite's conftest, whose plugins need Ray, S3 and PostgreSQL; other versions may warn.
    always = ("--noconftest", "-W", "default", "-m", "gpu", "--maxfail=20", "--durations=5")
    return Phase(name, about, ("-m", "pytest", *always, *options, path), (*needs, *_TESTS))


def _figures(name: str, about: str) -> Phase:
    return Phase(name, about, ("-m", "benchmarks.gpu.measure", name), _ENGINE, measures=True)


PHASES = (
    _tests(
        "kernels-parity",
        "every op against the reference, uploads, a recorded step",
        "tests/kernels/cuda/test_gpu.py",
        _KERNELS,
    ),
    _tests(
        "engine-parity",
        "recorded decode steps against eager ones, rows in the pool and tokens against a CPU's",
        "tests/kernels/cuda/test_gpu_engine.py",
        (*_ENGINE, "peft"),
        "-p",
        "tests.fixtures.tiny_bases",
    ),
    _tests(
        "training",
        "training's tests for a GPU",
        "tests/train/sequence/test_dense.py",
        _TRAINING,
    ),
    _tests(
        "training-steps",
        "three steps each of dense, S2-Attn, packed, DPO, VeRA, DoRA, QLoRA recipes against fp32 on a CPU",
        "tests/train/test_gpu.py",
        (*_TRAINING, "accelerate", "pyarrow", "safetensors", "tokenizers"),
        "-p",
        "tests.fixtures.tiny_bases",
        "-rs",
    ),
    Phase(
        "kernels",
        "each op on Llama-3-8B's shapes, with and without a graph",
        ("-m", "benchmarks.kernels.gpu"),
        (*_KERNELS, "pydantic", "yaml", "click"),
        measures=True,
    ),
    _figures("decode", "decode steps of 1, 32, 64, 256 rows on the base and on up to 256 adapters"),
    _figures("long", "decode steps of 1 and 8 rows with contexts of 32k"),
    _figures("prefill", "prompts of 2k and 32k tokens, base and adapters"),
    _figures("cold", "the first token on adapters that nobody has used, beside streams"),
    _figures("crowded", "closed loops over 8 and 16 adapters where the pool holds 8"),
    _figures("many", "closed loops over 100 adapters, which stay in the pool, 512 and 2,000 of ranks 8 to 64"),
)
