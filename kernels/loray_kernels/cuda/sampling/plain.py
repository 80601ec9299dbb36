"""A token for each row of logits in one launch and one read; see sample.cu and `sampling.draws`.

Shapes: S rows of logits, R of them sampled, M masks, V vocabulary, W words of 32 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loray_kernels.cuda.launch import Launcher
from loray_kernels.cuda.sampling.launch import Readback, launch_sample
from loray_kernels.sampling.draws import Drawn, Draws, TokenSeats, log_share

MAX_VOCAB = 1024 * 512  # of draw.cuh


class Choices(NamedTuple):
    """On the device. rows_R, masks_R: int64; numbers: fp64, temperatures, then logs of min-p, then uniform numbers."""

    rows_R: Tensor
    masks_R: Tensor
    numbers: Tensor

    @classmethod
    def of(cls, words: Tensor, num: int) -> Choices:
        """`packed` on the device."""
        return cls(words[:num], words[num : 2 * num], words[2 * num :].view(torch.float64))


class Sampling:
    """Owns what comes back, and what greedy rows need, for as many rows as a step has had. For one thread."""

    def __init__(self, launch: Launcher, device: torch.device) -> None:
        self._launch, self._device, self._readback = launch, device, Readback(device)
        self._grow(1)

    def __call__(self, logits_SV: Tensor, draws: Draws, seats: TokenSeats | None = None) -> Drawn:
        num, words_MW = len(draws.rows), draws.words_MW
        assert max(draws.rows) < len(logits_SV)
        assert max(draws.masks) < (0 if words_MW is None else len(words_MW))
        if num > self._out.shape[0]:
            self._grow(max(num, 2 * self._out.shape[0]))
        words = None
        if words_MW is not None and max(draws.masks) >= 0:
            assert 32 * words_MW.shape[1] >= logits_SV.shape[1]
            words = upload(words_MW.contiguous(), self._device)
        is_greedy = words is None and not any(draws.temperature) and list(draws.rows) == list(range(num))
        out_R2 = self._out[:num]
        choices = self._greedy if is_greedy else self._choices(draws)
        launch_sample(self._launch, logits_SV, choices, words, out_R2, seats)
        read = self._readback(out_R2.view(-1))
        return lambda: _tokens_and_logits(read())

    def _choices(self, draws: Draws) -> Choices:
        """One copy for all."""
        return Choices.of(upload(torch.from_numpy(packed(draws)), self._device), len(draws.rows))

    def _grow(self, num: int) -> None:
        self._out = torch.zeros(num, 2, dtype=torch.int64, device=self._device)
        rows_R = torch.arange(num, device=self._device)
        numbers = torch.zeros(3 * num, dtype=torch.float64, device=self._device)
        self._greedy = Choices(rows_R, torch.full_like(rows_R, -1), numbers)


def _tokens_and_logits(words: npt.NDArray[np.int64]) -> tuple[list[int], list[float]]:
    return words[::2].tolist(), words[1::2].astype(np.uint32).view(np.float32).tolist()


def packed(draws: Draws) -> npt.NDArray[np.int64]:
    """All of `Choices`, in 64-bit words."""
    num = len(draws.rows)
    out = np.empty(5 * num, dtype=np.int64)
    out[:num], out[num : 2 * num] = draws.rows, draws.masks
    shares = [log_share(p) for p in draws.min_p]
    out[2 * num :].view(np.float64)[:] = [*draws.temperature, *shares, *draws.uniform]
    return out


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that is queued; the tensor itself on a CPU."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
