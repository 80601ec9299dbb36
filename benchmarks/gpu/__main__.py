"""Everything that needs a GPU: parity of kernels and engine, training's tests, then figures beside their floors.

    make gpu [ARGS="--dry-run | --phase decode | --within 540 | --folder build/gpu"]

Runs with the Python that has torch, Triton and CuPy (`make gpu PYTHON=...`), without network and without installing
anything. Each phase is a process with its own log and at most eight minutes. The same command again goes on with what
is not done; a phase that has measured some of its cases goes on with the others. The results are a table, and
results.json beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

_ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 480.0
_SHORTEST_S = 30.0  # with less time left no phase begins
_KERNELS = ("torch", "triton", "cupy", "numpy")
_ENGINE = (*_KERNELS, "pydantic", "yaml", "safetensors", "transformers")
_TRAINING = ("torch", "numpy", "pydantic", "yaml", "transformers", "peft")
_TESTS = ("pytest", "pytest_timeout")
Outcome = Literal["done", "failed", "out of time", "skipped"]


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
    _tests("training", "training's tests for a GPU", "tests/train/sequence/test_dense.py", _TRAINING),
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


@dataclass
class State:
    """`card` and `commit`: what was measured, and of which source; results of others are not continued."""

    card: str
    commit: str
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, card: str, commit: str) -> State:
        """The folder's state, or an empty one. ValueError if it is of another card or commit."""
        file = folder / "state.json"
        if not file.exists():
            return cls(card, commit)
        state = cls(**json.loads(file.read_text(encoding="utf-8")))
        if (state.card, state.commit) != (card, commit):
            raise ValueError(
                f"{folder} has results of {state.card} at {state.commit}, this is {card} at {commit}; name another "
                "folder with --folder, or remove that one"
            )
        return state

    def is_done(self, phase: str) -> bool:
        return self.phases.get(phase, {}).get("outcome") == "done"

    def note(self, folder: Path, phase: str, outcome: Outcome, seconds: float, why: str = "") -> None:
        self.phases[phase] = {"outcome": outcome, "seconds": round(seconds, 1), "why": why}
        made = folder / "state.json.part"
        made.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        made.replace(folder / "state.json")


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a phase failed or there is no card, else 0."""
    args = _parser().parse_args(argv)
    phases = [p for p in PHASES if not args.phase or p.name in args.phase]
    card = card_name()
    if args.dry_run or card is None:
        _say(f"card: {card or 'none: torch finds no CUDA device here, so nothing can run'}")
        for phase in phases:
            missing = phase.missing()
            _say(f"\n{phase.name:<16}{phase.about}" + (f"\n  missing: {', '.join(missing)}" if missing else ""))
            _say("  python " + " ".join(phase.arguments(args.folder / f"{phase.name}.json")[1:]))
        return 0 if args.dry_run else 1
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        state = State.read(args.folder, card, _commit())
    except ValueError as e:
        raise SystemExit(str(e)) from e
    ends = time.monotonic() + args.within
    for phase in phases:
        left = min(LIMIT_S, ends - time.monotonic())
        if state.is_done(phase.name) or left < _SHORTEST_S:
            continue
        began = time.monotonic()
        _say(f"{phase.name}: {phase.about}")
        outcome, why = run(phase, args.folder, left)
        state.note(args.folder, phase.name, outcome, time.monotonic() - began, why)
        _say(f"  {outcome}{': ' + why if why else ''}")
    _say(write_results(args.folder, state))
    return int(any(p["outcome"] in ("failed", "skipped") for p in state.phases.values()))


def run(phase: Phase, folder: Path, seconds: float) -> tuple[Outcome, str]:
    """Its process ends after `seconds`, with all that it has started."""
    if missing := phase.missing():
        return "skipped", f"this Python has no {', '.join(missing)}; lay them into a folder and name it in PYTHONPATH"
    path = os.pathsep.join([*(str(_ROOT / p) for p in ("platform", "kernels", ".")), os.environ.get("PYTHONPATH", "")])
    log = folder / f"{phase.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            phase.arguments(folder.resolve() / f"{phase.name}.json"),
            cwd=_ROOT,
            env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "out of time", f"stopped after {seconds:.0f} s, see {log}"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return ("done", "") if code == 0 else ("failed", f"exit status {code}, see {log}")


def write_results(folder: Path, state: State) -> str:
    """Writes results.md and results.json to `folder`; returns the table."""
    figures = {name: _rows(folder / f"{name}.json") for name in state.phases}
    text = table(state, {name: rows for name, rows in figures.items() if rows})
    (folder / "results.md").write_text(text, encoding="utf-8")
    results = asdict(state) | {"date": time.strftime("%Y-%m-%d"), "figures": figures}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return text


def table(state: State, figures: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = [f"# {state.card}, commit {state.commit}", "", "| phase | outcome | seconds | |", "|---|---|---|---|"]
    lines += [f"| {name} | {p['outcome']} | {p['seconds']} | {p['why']} |" for name, p in state.phases.items()]
    for name, rows in figures.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines += ["", f"## {name}", "| case | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        lines += [
            f"| {case} | " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for case, row in rows.items()
        ]
    return "\n".join(lines) + "\n"


def _rows(file: Path) -> dict[str, dict[str, Any]]:
    return dict(json.loads(file.read_text(encoding="utf-8"))["rows"]) if file.exists() else {}


def _say(text: str) -> None:
    """Nothing but Python's own modules is imported before a phase runs."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def card_name() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _commit() -> str:
    if shutil.which("git") is None:
        return "?"
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=_ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "?"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="list the phases and their commands, and run nothing")
    add("--phase", action="append", choices=[p.name for p in PHASES], help="only this one; may be repeated")
    add("--within", type=float, default=3600.0, metavar="SECONDS", help="end by then (default %(default)s)")
    add("--folder", type=Path, default=Path("build/gpu"), help="of state, logs and results (default %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
