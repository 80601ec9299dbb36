"""When an adapter's rows are there: events and streams that a test drives, in the place of CUDA's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from loray_kernels.cuda import upload
from loray_kernels.cuda.launch import Launcher
from loray_kernels.cuda.upload import PageUploader
from loray_kernels.kv import PageCopy


class Stream:
    """Its work is done by `run`, as far as a test says."""

    def __init__(self, device: object = None) -> None:
        self.queued: list[Callable[[], None]] = []
        self.num_waits = 0

    def wait_stream(self, other: Stream) -> None:
        self.num_waits += 1

    def run(self, num: int) -> None:
        for _ in range(num):
            self.queued.pop(0)()


class Event:
    def __init__(self) -> None:
        self.there = False

    def record(self, stream: Stream) -> None:
        stream.queued.append(lambda: setattr(self, "there", True))

    def query(self) -> bool:
        return self.there


class Pages:
    """In the place of `place_pages`: it is queued on the copy stream. `sizes`: elements of each call."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.sizes = stream, list[int]()

    def __call__(self, launch: Launcher, pool: Tensor, rows: Tensor, table_P3: Tensor) -> None:
        self.sizes.append(len(rows))
        self.stream.queued.append(lambda: None)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The stream of steps."""
    stream = Stream()

    @contextmanager
    def inside(own: Stream) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    return stream


@pytest.fixture
def made(steps: Stream) -> PageUploader:
    return PageUploader(cast(Any, None), torch.zeros(64))


@pytest.fixture
def pages(made: PageUploader, monkeypatch: pytest.MonkeyPatch) -> Pages:
    found = Pages(cast(Any, made._stream))
    monkeypatch.setattr(upload, "place_pages", found)
    return found


def test_each_adapter_has_an_event_of_its_own(steps: Stream, made: PageUploader, pages: Pages) -> None:
    copies, arrivals = pages.stream, []
    for _ in range(2):
        for _ in range(2):  # with several writes
            made.write(torch.ones(2, 8), [0, 16], [PageCopy(0, 3, 8)])
        arrivals.append(made.arrival())
    assert [arrived() for arrived in arrivals] == [False, False]
    copies.run(2)
    assert [arrived() for arrived in arrivals] == [False, False]
    copies.run(1)  # the event after the first one's last page
    assert [arrived() for arrived in arrivals] == [True, False]
    copies.run(3)
    assert [arrived() for arrived in arrivals] == [True, True]
    assert steps.num_waits == 0  # no step has waited for any of it
    made.wait()
    made.wait()
    assert steps.num_waits == 1


def test_rows_cross_the_bus_in_parts(made: PageUploader, pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "STAGING_BYTES", 6 * 4)
    made.write(torch.ones(2, 8), [0, 16], [PageCopy(0, 3, 8)])
    assert pages.sizes == [6, 6, 4]
    made.write(torch.ones(2, 0), [0, 16], [])
    assert pages.sizes == [6, 6, 4]
