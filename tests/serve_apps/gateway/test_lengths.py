"""What a router counts of requests that are under way to a replica."""

from __future__ import annotations

import pytest

from serve_apps.gateway.replicas.router import QueueLengths


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lengths(clock: Clock) -> QueueLengths:
    return QueueLengths(clock)


def send(lengths: QueueLengths, request: str) -> None:
    lengths.chosen(request, "a")
    lengths.leaves(request)
    lengths.sent("a")


def answer(lengths: QueueLengths, request: str, length: int) -> None:
    lengths.heard("a", length)
    lengths.accepted(request, "a")


def test_a_request_counts_from_its_choice_to_its_end_once(lengths: QueueLengths) -> None:
    lengths.chosen("r", "a")
    assert (lengths.of("a"), lengths.known("a")) == (1, 0)
    lengths.leaves("r")
    lengths.sent("a")
    assert (lengths.of("a"), lengths.known("a")) == (1, 1)
    answer(lengths, "r", 1)
    assert lengths.of("a") == 1
    lengths.ended("a")
    lengths.ended("a")
    assert (lengths.of("a"), lengths.of("b")) == (0, 0)


def test_what_is_sent_meanwhile_is_not_in_the_length_that_the_replica_said(lengths: QueueLengths) -> None:
    for request in "rst":
        send(lengths, request)
    answer(lengths, "r", 1)
    assert lengths.of("a") == 3
    answer(lengths, "s", 2)
    answer(lengths, "t", 3)
    assert lengths.of("a") == 3
    send(lengths, "u")
    answer(lengths, "u", 9)  # others send too
    assert lengths.of("a") == 9


def test_a_request_that_is_not_sent_or_not_answered_is_forgotten(lengths: QueueLengths, clock: Clock) -> None:
    """And does not count for a later one, however soon these follow each other."""
    lengths.chosen("cancelled", "a")
    lengths.withdrawn("cancelled")
    send(lengths, "lost")
    for number in range(10):
        clock.now += 0.3
        send(lengths, f"r{number}")
        answer(lengths, f"r{number}", 1)
        lengths.ended("a")
    assert lengths.of("a") == 0


def test_what_is_sent_to_all_replicas_does_not_stay(lengths: QueueLengths) -> None:
    """A broadcast is sent and ends without an answer about the queue."""
    lengths.sent("a")
    lengths.ended("a")
    send(lengths, "r")
    answer(lengths, "r", 1)
    assert lengths.of("a") == 1


def test_a_withdrawn_request_counts_no_more(lengths: QueueLengths) -> None:
    lengths.chosen("r", "a")
    assert lengths.withdrawn("r") == "a"
    send(lengths, "s")
    answer(lengths, "s", 1)
    assert lengths.of("a") == 1


def test_a_refused_request_counts_no_more_and_others_do(lengths: QueueLengths) -> None:
    for request in "rs":
        send(lengths, request)
    lengths.heard("a", 5)
    lengths.refused("r")
    assert lengths.of("a") == 6
    lengths.chosen("r", "b")
    lengths.leaves("r")
    assert (lengths.of("a"), lengths.of("b")) == (6, 0)
    answer(lengths, "s", 6)
    assert lengths.of("a") == 6


def test_a_request_that_is_sent_again_is_the_last_again(lengths: QueueLengths, clock: Clock) -> None:
    """Otherwise those behind it stay as long as it does."""
    send(lengths, "r")
    clock.now = 0.2
    send(lengths, "lost")
    clock.now = 0.9
    lengths.heard("a", 0)
    lengths.refused("r")
    send(lengths, "r")
    clock.now = 1.5
    lengths.heard("a", 0)
    assert lengths.of("a") == 1


def test_a_probe_adds_what_is_under_way(lengths: QueueLengths, clock: Clock) -> None:
    for request in "rstu":
        send(lengths, request)
    lengths.probed("a", 1)
    assert lengths.of("a") == 5
    answer(lengths, "r", 2)
    assert lengths.of("a") == 5
    clock.now = 2.0
    lengths.probed("a", 1)
    assert lengths.of("a") == 1


def test_replicas_that_are_gone_are_forgotten(lengths: QueueLengths) -> None:
    send(lengths, "r")
    lengths.chosen("s", "a")
    lengths.retain({"b"})
    assert lengths.of("a") == 1
    lengths.leaves("s")
    assert lengths.of("a") == 0
