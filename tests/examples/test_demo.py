"""`make demo` goes on with what is published, and leaves nothing running when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"


def processes_of(home: Path) -> list[str]:
    """Command lines of processes with this LORAY_HOME."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if process.environ().get("LORAY_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.info["cmdline"] or ()))
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("until", "to_group", "number"),
    [
        ("The base model", False, signal.SIGTERM),
        ("training 2 adapters as job", True, signal.SIGINT),
        ("evaluating held-out rows", False, signal.SIGTERM),
    ],
)
def test_an_interrupted_demo_leaves_nothing_behind(
    tmp_path: Path, until: str, to_group: bool, number: signal.Signals
) -> None:
    home = tmp_path / "home"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "LORAY_"))}
    with subprocess.Popen(
        [sys.executable, "-u", str(DEMO), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=ROOT,
        env=environment | {"LORAY_HOME": str(home), "PYTHONUNBUFFERED": "1"},
    ) as demo:
        assert demo.stdout is not None
        seen = []
        for line in demo.stdout:
            seen.append(line)
            if until in line:
                break
        assert until in seen[-1], "".join(seen)
        (os.killpg if to_group else os.kill)(demo.pid, number)
        rest = demo.stdout.read()
    assert demo.returncode == 128 + number, rest
    assert "Nothing of the demo runs any more" in rest
    deadline = time.monotonic() + 30  # Ray's processes end by themselves once their parents have
    while (left := processes_of(home)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def test_it_goes_on_with_what_is_published_from_the_same_recipe_and_data(tmp_path: Path) -> None:
    program = f"""
import json, runpy, sys
sys.path.insert(0, {str(DEMO)!r})
demo = runpy.run_path({str(DEMO / "__main__.py")!r}, run_name="demo")
work = demo["Path"]({str(tmp_path)!r}) / "demo"
demo["prepare"](work)

class Known:
    digest = "a" * 64
    def ask(self, *arguments):
        return [{{"name": "orders", "version": 1, "digest": self.digest}}]

known = Known()
made = demo["Demo"](known, demo["Console"](quiet=True))
told = [made._is_published("orders")]
made._look()
made._note("orders")
told.append(made._is_published("orders"))
known.digest = "b" * 64  # somebody has published another version
made._look()
told.append(made._is_published("orders"))
known.digest = "a" * 64
made._look()
recipe = work / "recipes" / "orders.yaml"
recipe.write_text(recipe.read_text() + "seed: 1\\n")
told.append(made._is_published("orders"))
print(json.dumps([told, sorted(made._noted())]))
"""
    environment = os.environ | {"LORAY_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    told, noted = json.loads(done.stdout.splitlines()[-1])
    assert told == [False, True, False, False]
    assert noted == ["orders"]
