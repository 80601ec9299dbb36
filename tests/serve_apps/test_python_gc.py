"""Full collections come when nobody waits."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: thresholds are the process', and the thread stays.
_SCRIPT = """
import gc, sys, threading, weakref
from serve_apps import python_gc as garbage

class Ring:
    def __init__(self):
        self.own = self

def make_young(num):
    for _ in range(num * gc.get_threshold()[0] * (gc.get_threshold()[1] + 1)):
        kept.append([])

garbage._LOOK_S = 0.01
kept, asked, is_quiet, collected = [], threading.Semaphore(0), False, threading.Event()
garbage.freeze_garbage()

def look():
    asked.release()
    return is_quiet

garbage.collect_when_quiet(look)
old = Ring()
gc.collect(1)  # it is of the oldest generation now
weakref.finalize(old, collected.set)
del old
make_young(2 * garbage._DUE)
for _ in range(3):
    assert asked.acquire(timeout=60), "nobody was asked"
assert not collected.is_set(), "collected while somebody waits"
if "quiet" in sys.argv:
    is_quiet = True
else:
    make_young(2 * garbage._OVERDUE)
assert collected.wait(60), "not collected"
"""


def test_a_full_collection_waits_for_a_quiet_moment_but_not_for_ever() -> None:
    for how in ("quiet", "overdue"):
        done = subprocess.run([sys.executable, "-c", _SCRIPT, how], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
