"""Large memory is used again after its last reference is gone, and never before."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import threading
from itertools import pairwise

import pytest
import torch

from loray_kernels.memory import Recycled, SharedPages, huge_pages

MB = 1 << 20


def idle_bytes(memory: Recycled) -> int:
    return sum(map(len, memory._idle))


def test_memory_comes_back_when_its_last_view_goes() -> None:
    memory = Recycled(64 * MB)
    first = memory.empty(6 * MB, torch.uint8)
    address, view = first.data_ptr(), first[5:].numpy().data
    del first
    other = memory.empty(6 * MB, torch.uint8)
    assert other.data_ptr() != address  # a view of the first is still read
    view[:3] = b"abc"
    del view
    again = memory.empty(3 * MB - 1, torch.bfloat16)
    assert again.data_ptr() == address
    assert again.shape == (3 * MB - 1,)
    assert memory.empty(6 * MB, torch.uint8).data_ptr() not in (address, other.data_ptr())


def test_what_lies_idle_is_bounded_and_not_wasted_on_the_small() -> None:
    memory = Recycled(20 * MB)
    held = [memory.empty(8 * MB, torch.uint8) for _ in range(4)]
    addresses = [t.data_ptr() for t in held]
    del held
    assert idle_bytes(memory) <= 20 * MB
    assert memory.empty(2 * MB, torch.uint8).data_ptr() not in addresses  # a quarter of what lies there
    assert memory.empty(100, torch.uint8).numel() == 100


def test_as_much_is_prepared_as_was_asked_for() -> None:
    memory = Recycled(64 * MB)
    held = [memory.empty(n * MB, torch.uint8) for n in (4, 8)]
    assert idle_bytes(memory) == 0
    memory.prepare()
    assert 12 * MB <= idle_bytes(memory) <= 20 * MB
    before = idle_bytes(memory)
    held += [memory.empty(n * MB, torch.uint8) for n in (8, 4)]
    assert idle_bytes(memory) == 0
    del held
    assert idle_bytes(memory) == 2 * before
    memory.prepare()
    assert idle_bytes(memory) == 2 * before  # enough lies idle


_FAULTS = """
import resource, threading, torch
from loray_kernels.memory import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(20):
        logits = torch.ones(32, 49_152)
        (logits.softmax(dim=1) + logits).cumsum(dim=1)
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

def run():
    faults()
    faults()

torch.set_num_threads(1)
for keep in (False, True):
    if keep:
        keep_freed()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives freed memory back at once")
def test_freed_memory_is_kept_for_the_next_tensors() -> None:
    """In any thread. Without it nearly all of the tensors' pages are new each time."""
    done = subprocess.run([sys.executable, "-c", _FAULTS], check=True, capture_output=True, text=True)
    _, given_back, _, kept = map(int, done.stdout.split())
    all_new = 20 * 4 * 32 * 49_152 * 4 // 4096
    assert given_back > all_new // 2
    assert kept < all_new // 100


@pytest.mark.parametrize("num_bytes", [100, 70_000, 3 * MB + 5, 40 * MB + 1])
def test_pages_are_zeros_of_their_own(num_bytes: int) -> None:
    shared = SharedPages()
    for zeros in (huge_pages, shared.zeros):
        first, second = (zeros(num_bytes, torch.uint8) for _ in range(2))
        assert first.shape == (num_bytes,)
        first.fill_(7)
        assert not second.any()
        second.fill_(9)
        assert first.min() == first.max() == 7


def test_matrices_smaller_than_a_huge_page_share_one() -> None:
    shared = SharedPages()
    addresses = [shared.zeros(MB, torch.bfloat16).data_ptr() for _ in range(3)]
    assert [b - a for a, b in pairwise(addresses)] == [2 * MB, 2 * MB]


def test_memory_that_a_collection_of_garbage_finds_while_the_lock_is_held_comes_back() -> None:
    """In any allocation of Python's a collection may begin, also in the thread that holds the lock."""
    memory = Recycled(64 * MB)
    tensor = memory.empty(6 * MB, torch.uint8)
    address = tensor.data_ptr()
    cycle: list[object] = [tensor]
    cycle.append(cycle)
    del tensor, cycle

    def collect() -> None:
        with memory._lock:
            gc.collect()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert memory.empty(6 * MB, torch.uint8).data_ptr() == address
