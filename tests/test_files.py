"""Scratch folders of processes that are killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_CODE = """
import sys
from loray.files import scratch_folder
with scratch_folder() as folder:
    (folder / "file").write_text("bytes")
    print(folder, flush=True)
    sys.stdin.read()
"""


def start(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", _CODE],
        env=os.environ | {"TMPDIR": str(parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_scratch_of_a_killed_process_is_removed_by_the_next(tmp_path: Path) -> None:
    killed, abandoned = start(tmp_path)
    living, held = start(tmp_path)
    killed.kill()
    killed.communicate()
    assert (abandoned / "file").exists()
    following, mine = start(tmp_path)
    assert [abandoned.exists(), held.exists(), mine.exists()] == [False, True, True]
    for process in (living, following):
        process.communicate("")
        assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []
