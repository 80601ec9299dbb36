"""How many product files one training run and one chat request cross: a newcomer who follows them opens these.

    python -m tests.crossed          # counts
    python -m tests.crossed --files  # names them, too

A file counts where a function of it was called. What only imports, or warms up before the request, does not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from tests.fixtures.asking import eventually
from tests.fixtures.cluster import free_port
from tests.fixtures.tiny import write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = tuple(f"{ROOT / folder}/" for folder in ("platform/loray", "kernels/loray_kernels", "jobs", "serve_apps"))
# Every Python process notes a file when the first function of it is called; SIGUSR1: it forgets what it has noted.
_NOTES = f"""
import os, signal, sys, threading
_notes, _seen = os.open(os.environ["CROSSED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT), set()
def _note(frame, event, arg):
    code = frame.f_code
    if event == "call" and code not in _seen:
        _seen.add(code)
        if code.co_name != "<module>" and code.co_filename.startswith({PRODUCT!r}):
            os.write(_notes, (code.co_filename + "\\n").encode())
def _forget(*_):
    _seen.clear()
    os.ftruncate(_notes, 0)
signal.signal(signal.SIGUSR1, _forget)
threading.setprofile(_note)
sys.setprofile(_note)
"""


class Counted:
    """`loray` in a home of its own, with a tiny base. `notes`: the product files that its processes have crossed."""

    def __init__(self, folder: Path) -> None:
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(_NOTES)
        self._notes, self._folder = folder / "notes", folder
        self._environment = os.environ | {
            "LORAY_HOME": str(folder / "home"),
            "CROSSED": str(self._notes),
            "PYTHONPATH": str(folder / "site"),
        }
        self._loray = str(Path(sys.executable).with_name("loray"))
        self.run("base", "add", str(write_checkpoint(folder / "tiny")))

    @property
    def notes(self) -> list[str]:
        return sorted({str(Path(line).relative_to(ROOT)) for line in self._notes.read_text().splitlines()})

    def forget(self) -> None:
        self._notes.write_text("")

    def run(self, *arguments: str) -> None:
        command = [self._loray, *arguments]
        subprocess.run(command, env=self._environment, cwd=self._folder, check=True, stdout=subprocess.DEVNULL)

    @contextmanager
    def serving(self, port: int) -> Iterator[subprocess.Popen[bytes]]:
        command = [self._loray, "serve", "--base", "tiny", "--port", str(port)]
        with subprocess.Popen(command, env=self._environment, cwd=self._folder, stdout=subprocess.DEVNULL) as process:
            try:
                yield process
            finally:
                process.terminate()


def of_a_training_run(counted: Counted, folder: Path) -> list[str]:
    rows = [{"prompt": f"{i} + {i} = ", "completion": str(2 * i)} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    counted.forget()
    fields = ["--set", "max_steps=2", "--set", "batch.rows=4", "--set", "data.max_length=32"]
    counted.run("train", "--base", "tiny", "--data", "rows.jsonl", "--name", "sums", *fields)
    return counted.notes


def of_a_chat_request(counted: Counted) -> list[str]:
    """The second of two equal requests."""
    port = free_port()
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "1 + 1?"}], "max_tokens": 4}
    with counted.serving(port) as process, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

        def is_up() -> bool:
            with suppress(httpx.TransportError):
                return process.poll() is not None or client.get("/health").is_success
            return False

        assert eventually(is_up, 120)
        client.post("/v1/chat/completions", json=asked).raise_for_status()
        process.send_signal(signal.SIGUSR1)
        client.post("/v1/chat/completions", json=asked).raise_for_status()
        return counted.notes


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="crossed-") as name:
        folder = Path(name)
        counted = Counted(folder)
        found = {"a LoRA run": of_a_training_run(counted, folder), "a chat request": of_a_chat_request(counted)}
    for what, files in found.items():
        print(f"{what} crosses {len(files)} product files")
        if "--files" in sys.argv:
            print("".join(f"  {file}\n" for file in files), end="")


if __name__ == "__main__":
    main()
