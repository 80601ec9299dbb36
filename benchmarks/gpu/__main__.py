"""Everything that needs a GPU: parity of kernels and engine, training's tests, then figures beside their floors.

    make gpu [ARGS="--dry-run | --phase decode | --within 540 | --folder build/gpu"]

Runs with the Python that has torch, Triton and CuPy (`make gpu PYTHON=...`), without network and without installing
anything. Each phase is a process with its own log and at most eight minutes. The same command again goes on with what
is not done; a phase that has measured some of its cases goes on with the others. The results are a table, and
results.json beside it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.phases import LIMIT_S, PHASES, Phase
from benchmarks.gpu.report import write_results
from benchmarks.gpu.state import Outcome, State

_ROOT = Path(__file__).resolve().parents[2]
_SHORTEST_S = 30.0  # with less time left no phase begins


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
