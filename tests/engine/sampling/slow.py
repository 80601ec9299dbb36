"""Constraints whose masks take virtual time: `slow(engine)` gives an engine matchers and threads that count it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from loray.engine.engine import Engine
from loray.engine.sampling.grammar import MaskThread
from loray.spec import Constraint

EOS = 258  # of the tiny base, whose other tokens are bytes


def constraint(seconds: float, length: int) -> Constraint:
    """An answer has that many tokens and its end, and the mask of each takes `seconds`."""
    return Constraint.from_regex(f"{seconds}:{length}")


class Matcher:
    """A few bytes are allowed, by their place in the answer."""

    def __init__(self, seconds: float, length: int) -> None:
        self.seconds, self._length, self._num_read = seconds, length, 0

    def deep_copy(self) -> Matcher:
        return Matcher(self.seconds, self._length)

    def consume_token(self, token: int) -> bool:
        self._num_read += 1
        return True

    def is_stopped(self) -> bool:
        return self._num_read >= self._length

    def is_error(self) -> bool:
        return False

    def compute_ff_tokens(self) -> list[int]:
        return []

    def words(self, num_words: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
        allowed = [EOS] if self.is_stopped() else [(11 * self._num_read + 37 * i) % 256 for i in range(5)]
        bits = np.zeros(32 * num_words, dtype=np.uint8)
        bits[allowed] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)


class AtOnce:
    """As ThreadPoolExecutor, without threads."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, **options: Any) -> None:
        pass


class SlowMasks(MaskThread):
    """`seconds`: of all masks. While `is_held` nothing is computed, and `go_on` computes what was to be."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.is_held = 0.0, False
        self.__dict__["_thread"] = self
        self._held: tuple[Future[Any], Callable[..., Any], Any] | None = None

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if not self.is_held:
            return AtOnce().submit(function, *arguments)
        future: Future[Any] = Future()
        self._held = future, function, arguments
        self._entered.release()
        return future

    def go_on(self) -> None:
        self.is_held = False
        if self._held is not None:
            future, function, arguments = self._held
            future.set_result(function(*arguments))
            self._entered.acquire()

    def shutdown(self, **options: Any) -> None:
        pass

    def _fill(self, matchers: Sequence[Any], address: int, size: int) -> float:
        for row, matcher in enumerate(matchers):
            ctypes.memmove(address + row * size, matcher.words(size // 4).ctypes.data, size)
        seconds = sum(matcher.seconds for matcher in matchers)
        self.seconds += seconds
        return seconds


def slow(engine: Engine) -> SlowMasks:
    """From now on the engine's constraints are those of `constraint`."""

    def compile_(constraint: Constraint) -> Matcher:
        seconds, _, length = constraint.text.partition(":")
        return Matcher(float(seconds), int(length))

    grammars, masks = engine._grammars, SlowMasks()
    grammars._thread, grammars._compilations._compile = masks, compile_  # type: ignore[assignment]
    grammars._compilations.__dict__["_threads"] = AtOnce()
    return masks
