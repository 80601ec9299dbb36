"""Sampling on the device: plain draws (`Sampling`), and rows whose logits requests change (`Choosing`).

A step has one copy to the device (two with masks of grammars), two launches and one read. A request's edits stay on the
device with the request; the copy has those that are new.

Shapes: S rows of logits, R of them sampled, M masks, V vocabulary, W words of 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loray_kernels.cuda.launch import Launcher
from loray_kernels.kv import to_device
from loray_kernels.sampling import (
    MAX_TOP,
    NEW_EDIT,
    Change,
    Chosen,
    Drawn,
    Draws,
    Scores,
    TokenEdits,
    TokenSlots,
    log_share,
)

MAX_VOCAB = 1024 * 512  # of draw.cuh
_THREADS = 512  # as in csrc/draw.cuh
_RESULT = 4 + 2 * MAX_TOP  # 64-bit words of a row
_EDIT_WORDS = 5  # 32 bits each, of an entry on the device
_INTEGERS = (
    *("row", "mask", "own_words", "edits", "num_edits", "first_new", "num_new", "first_forbidden", "num_forbidden"),
    *("top_k", "num_top"),
)
_NUMBERS = ("temperature", "log_min_p", "uniform", "top_p")
_CHOICE = np.dtype([*((name, "<i8") for name in _INTEGERS), *((name, "<f8") for name in _NUMBERS)])
_FORBIDDEN = np.dtype([("token", "<i4"), ("logit", "<f4")])


def launch_sample(
    launch: Launcher,
    logits_SV: Tensor,
    choices: Sequence[Tensor],
    words_MW: Tensor | None,
    out_R2: Tensor,
    slots: TokenSlots | None,
) -> None:
    arguments = (*_logits(logits_SV), *(t.data_ptr() for t in choices), *_words(words_MW), out_R2.data_ptr())
    launch("sample_fp32", (out_R2.shape[0], 1, 1), _THREADS, (*arguments, *_slots(slots)))


def _logits(logits_SV: Tensor) -> tuple[int, int, int]:
    return logits_SV.data_ptr(), logits_SV.stride(0), logits_SV.shape[1]


def _words(words_MW: Tensor | None) -> tuple[int, int]:
    return (0, 0) if words_MW is None else (words_MW.data_ptr(), words_MW.stride(0))


def _slots(slots: TokenSlots | None) -> tuple[int, int]:
    return (0, 0) if slots is None else (slots.slots_S.data_ptr(), slots.tokens.data_ptr())


def _masks(masks: Sequence[int], words_MW: Tensor | None, logits_SV: Tensor) -> Tensor | None:
    """Send the masks of grammars to the device; None where no row has one."""
    assert max(masks) < (0 if words_MW is None else len(words_MW))
    if words_MW is None or max(masks) < 0:
        return None
    assert 32 * words_MW.shape[1] >= logits_SV.shape[1]
    return to_device(words_MW.contiguous(), logits_SV.device)


class Readback:
    """Copies a step's results to the host while the next step runs: what a call gives is read before the call after the
    next one. For one thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._turn = device.type == "cuda", 0
        self._staged = [torch.zeros(0, dtype=torch.int64)] * 2
        self._events = [torch.cuda.Event() for _ in range(2)] if self._on_gpu else []  # type: ignore[no-untyped-call]

    def __call__(self, there_N: Tensor) -> Callable[[], npt.NDArray[np.int64]]:
        """Queue the copy of `there_N`, int64; the result waits for it and gives its words."""
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


class Choices(NamedTuple):
    """`Draws` on the device.

    rows_R, masks_R  int64
    numbers          fp64: temperatures, then logs of min-p, then uniform numbers
    """

    rows_R: Tensor
    masks_R: Tensor
    numbers: Tensor

    @classmethod
    def of(cls, words: Tensor, num: int) -> Choices:
        """Divide the words of `packed`, which are on the device."""
        return cls(words[:num], words[num : 2 * num], words[2 * num :].view(torch.float64))


class Sampling:
    """Samples plain draws. Owns what comes back, and what greedy rows need, for as many rows as a step has had. For one
    thread.
    """

    def __init__(self, launch: Launcher, device: torch.device) -> None:
        self._launch, self._device, self._readback = launch, device, Readback(device)
        self._grow(1)

    def __call__(self, logits_SV: Tensor, draws: Draws, slots: TokenSlots | None = None) -> Drawn:
        num, words = len(draws.rows), _masks(draws.masks, draws.words_MW, logits_SV)
        assert max(draws.rows) < len(logits_SV)
        if num > self._out.shape[0]:
            self._grow(max(num, 2 * self._out.shape[0]))
        is_greedy = words is None and not any(draws.temperature) and list(draws.rows) == list(range(num))
        out_R2 = self._out[:num]
        choices = self._greedy
        if not is_greedy:
            choices = Choices.of(to_device(torch.from_numpy(packed(draws)), self._device), num)
        launch_sample(self._launch, logits_SV, choices, words, out_R2, slots)
        read = self._readback(out_R2.view(-1))

        def drawn() -> tuple[list[int], list[float]]:
            words = read()
            return words[::2].tolist(), _numbers(words[1::2])

        return drawn

    def _grow(self, num: int) -> None:
        self._out = torch.zeros(num, 2, dtype=torch.int64, device=self._device)
        rows_R = torch.arange(num, device=self._device)
        numbers = torch.zeros(3 * num, dtype=torch.float64, device=self._device)
        self._greedy = Choices(rows_R, torch.full_like(rows_R, -1), numbers)


def packed(draws: Draws) -> npt.NDArray[np.int64]:
    """Pack all of `Choices` into 64-bit words, for one copy."""
    num = len(draws.rows)
    out = np.empty(5 * num, dtype=np.int64)
    out[:num], out[num : 2 * num] = draws.rows, draws.masks
    shares = [log_share(p) for p in draws.min_p]
    out[2 * num :].view(np.float64)[:] = [*draws.temperature, *shares, *draws.uniform]
    return out


class Choosing:
    """A Chooser, which owns what comes back, for as many rows as a step has had."""

    def __init__(self, launch: Launcher, device: torch.device) -> None:
        self._launch, self._device, self._readback = launch, device, Readback(device)
        self._out = torch.zeros(_RESULT, dtype=torch.int64, device=device)

    def __call__(
        self,
        logits_SV: Tensor,
        plain: Draws,
        changed: Draws,
        changes: Sequence[Change],
        slots: TokenSlots | None = None,
    ) -> Callable[[], Chosen]:
        num_plain, num, vocab = len(plain.rows), len(changes), logits_SV.shape[1]
        assert max((*plain.rows, *changed.rows)) < len(logits_SV)
        words, new = _masks((*plain.masks, *changed.masks), changed.words_MW, logits_SV), self._edits(changes)
        not_next = np.concatenate([np.asarray(c.forbidden, dtype=np.int32) for c in changes])
        forbidden = np.zeros(len(not_next), dtype=_FORBIDDEN)
        forbidden["token"] = not_next
        parts: list[npt.NDArray[np.generic]] = [
            packed(plain),
            _choices(changed, changes, vocab, [len(n) for n in new]),
            np.concatenate(new),
            forbidden,
        ]
        there = to_device(torch.from_numpy(np.concatenate([part.view(np.uint8) for part in parts])), self._device)
        starts = np.cumsum([0, *(part.nbytes for part in parts)]).tolist()
        num_words = 2 * num_plain + _RESULT * num
        if num_words > len(self._out):
            self._out = torch.zeros(2 * num_words, dtype=torch.int64, device=self._device)
        out = self._out[:num_words]
        if num_plain:
            choices = Choices.of(there[: starts[1]].view(torch.int64), num_plain)
            launch_sample(self._launch, logits_SV, choices, words, out[: 2 * num_plain].view(-1, 2), slots)
        addresses = [there.data_ptr() + start for start in starts[1:4]]  # of choices, new edits, forbidden tokens
        arguments = (*_logits(logits_SV), *addresses, *_words(words), out[2 * num_plain :].data_ptr(), *_slots(slots))
        self._launch("choose_fp32", (num, 1, 1), _THREADS, arguments)
        read = self._readback(out)
        return lambda: _read(read(), num_plain, changes, vocab)

    def _edits(self, changes: Sequence[Change]) -> list[npt.NDArray[np.void]]:
        """Take what is new of each row's edits; makes room for them, and for allowed tokens, on the device."""
        for allowed in (c.allowed for c in changes if c.allowed is not None):
            if allowed.there is None:
                allowed.there = to_device(allowed.words_W, self._device)
        return [np.empty(0, NEW_EDIT) if c.edits is None else self._new(c.edits) for c in changes]

    def _new(self, edits: TokenEdits) -> npt.NDArray[np.void]:
        has_room = edits.there is not None and len(edits.there) == edits.capacity
        if not has_room:
            edits.there = torch.empty(edits.capacity, _EDIT_WORDS, dtype=torch.int32, device=self._device)
        return edits.take_new(everything=not has_room)


def _choices(draws: Draws, changes: Sequence[Change], vocab: int, num_new: Sequence[int]) -> npt.NDArray[np.void]:
    out = np.zeros(len(changes), dtype=_CHOICE)
    out["row"], out["mask"] = draws.rows, draws.masks
    out["temperature"], out["uniform"] = draws.temperature, draws.uniform
    out["log_min_p"] = [log_share(p) for p in draws.min_p]
    out["own_words"] = [0 if c.allowed is None else _address(c.allowed.there) for c in changes]
    out["edits"] = [0 if c.edits is None else _address(c.edits.there) for c in changes]
    out["num_edits"] = [0 if c.edits is None else len(c.edits) for c in changes]
    out["num_new"], out["first_new"] = num_new, np.cumsum(num_new) - num_new
    out["num_forbidden"] = [len(c.forbidden) for c in changes]
    out["first_forbidden"] = np.cumsum(out["num_forbidden"]) - out["num_forbidden"]
    out["top_k"] = [c.top_k if c.top_k < vocab else 0 for c in changes]
    out["top_p"] = [c.top_p for c in changes]
    out["num_top"] = [-1 if c.num_top is None else c.num_top for c in changes]
    return out


def _address(tensor: Tensor | None) -> int:
    assert tensor is not None
    return tensor.data_ptr()


def _read(words: npt.NDArray[np.int64], num_plain: int, changes: Sequence[Change], vocab: int) -> Chosen:
    plain, others = words[: 2 * num_plain].reshape(-1, 2), words[2 * num_plain :].reshape(-1, _RESULT)
    found = np.concatenate((plain, others[:, :2]))
    scores: list[Scores | None] = [None] * num_plain
    for row, change in zip(others, changes, strict=True):
        if change.num_top is None:
            scores.append(None)
            continue
        top = row[4 : 4 + 2 * min(change.num_top, vocab)]
        numbers = _numbers(row)
        if not math.isfinite(numbers[2]):  # the kernel has written no best tokens: what is there is an earlier step's
            scores.append(Scores(math.nan, 1, [], []))
            continue
        scores.append(Scores(numbers[2], int(row[3]), top[::2].tolist(), numbers[5 : 4 + len(top) : 2]))
    return Chosen(found[:, 0].tolist(), _numbers(found[:, 1]), scores)


def _numbers(words: npt.NDArray[np.int64]) -> list[float]:
    """Read fp32 from bits."""
    out: list[float] = words.astype(np.uint32).view(np.float32).tolist()
    return out
