"""Launches of sample.cu and choose.cu, and what they give on its way to the host.

Shapes: S rows of logits, R of them sampled, M masks, V vocabulary, W words of 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loray_kernels.cuda.launch import Launcher
from loray_kernels.sampling.draws import TokenSeats

_THREADS = 512  # as in csrc/draw.cuh


def launch_sample(
    launch: Launcher,
    logits_SV: Tensor,
    choices: Sequence[Tensor],
    words_MW: Tensor | None,
    out_R2: Tensor,
    seats: TokenSeats | None,
) -> None:
    arguments = (*_logits(logits_SV), *(t.data_ptr() for t in choices), *_words(words_MW), out_R2.data_ptr())
    launch("sample_fp32", (out_R2.shape[0], 1, 1), _THREADS, (*arguments, *_seats(seats)))


def launch_choose(
    launch: Launcher,
    logits_SV: Tensor,
    num: int,
    addresses: Sequence[int],
    words_MW: Tensor | None,
    out: Tensor,
    seats: TokenSeats | None,
) -> None:
    """`addresses`: of the choices, the new edits and the forbidden tokens."""
    arguments = (*_logits(logits_SV), *addresses, *_words(words_MW), out.data_ptr())
    launch("choose_fp32", (num, 1, 1), _THREADS, (*arguments, *_seats(seats)))


def _logits(logits_SV: Tensor) -> tuple[int, int, int]:
    return logits_SV.data_ptr(), logits_SV.stride(0), logits_SV.shape[1]


def _words(words_MW: Tensor | None) -> tuple[int, int]:
    return (0, 0) if words_MW is None else (words_MW.data_ptr(), words_MW.stride(0))


def _seats(seats: TokenSeats | None) -> tuple[int, int]:
    return (0, 0) if seats is None else (seats.seats_S.data_ptr(), seats.tokens.data_ptr())


class Readback:
    """Copies a step's results to the host while the next step runs: what a call gives is read before the call after the
    next one. For one thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._turn = device.type == "cuda", 0
        self._staged = [torch.zeros(0, dtype=torch.int64)] * 2
        self._events = [torch.cuda.Event() for _ in range(2)] if self._on_gpu else []  # type: ignore[no-untyped-call]

    def __call__(self, there_N: Tensor) -> Callable[[], npt.NDArray[np.int64]]:
        """The words of `there_N`, int64; waits for them when it is called."""
        self._turn ^= 1
        turn, num = self._turn, len(there_N)
        if num > len(self._staged[turn]):
            self._staged[turn] = torch.zeros(2 * num, dtype=torch.int64, pin_memory=self._on_gpu)
        here_N = self._staged[turn][:num]
        here_N.copy_(there_N, non_blocking=True)
        if self._on_gpu:
            self._events[turn].record()
        return lambda: self.read(here_N, turn)

    def read(self, here_N: Tensor, turn: int) -> npt.NDArray[np.int64]:
        if self._on_gpu:
            self._events[turn].synchronize()
        words: npt.NDArray[np.int64] = here_N.numpy()
        return words
