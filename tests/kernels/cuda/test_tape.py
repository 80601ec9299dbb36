"""What a recording refuses: steps that are wrong on purpose."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.fixtures.tape import Arena, Tape, TapeLauncher, at_address, refuse_waits

KERNEL = "take_rows_fp32"


def read_rows(kernel: str, grid: tuple[int, int, int], threads: int, arguments: Any) -> None:
    """A kernel with the arguments of take_rows that copies one number."""
    y, _, _, pool, *_ = arguments
    ctypes.memmove(y, pool, 4)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_waits(monkeypatch)


@pytest.fixture
def x() -> Tensor:
    return torch.arange(1.0, 5.0)


LAUNCHER = TapeLauncher(read_rows)


def launch(y: Tensor, pool: int) -> Tensor:
    y_at = y.data_ptr()
    LAUNCHER(KERNEL, (1, 1, 1), 32, (y_at, 1, y_at, pool, y_at, 1, y_at))
    return y


def recorded(compute: Callable[[], Tensor], arena: Arena | None = None) -> tuple[Tape, Tensor]:
    tape = LAUNCHER.tape = Tape(arena or Arena())
    return tape, tape.record(compute)


def test_a_replay_computes_again_from_what_stands_in_the_same_place(x: Tensor) -> None:
    y = torch.zeros(4)

    def step() -> Tensor:
        launch(y, x.data_ptr())
        return y + x.square()

    tape, out = recorded(step)
    for value in (2.0, 3.0):
        x.fill_(value)
        tape.replay()
        assert out.tolist() == [value + value**2, *[value**2] * 3]


REFUSED: dict[str, list[Callable[[Tensor], Any]]] = {
    "results are read": [
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x[0].item(),
        lambda x: np.asarray(x),
        lambda x: x.cpu(),
        lambda x: int(x[0]),
        lambda x: bool(x[0]),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: torch.equal(x, x),
    ],
    "something comes from the host's memory": [
        lambda _: torch.tensor([1.0]),
        lambda _: torch.as_tensor([1.0]),
        lambda _: torch.empty(2, pin_memory=True),
        lambda _: torch.zeros(2).pin_memory(),
        lambda _: torch.from_numpy(np.ones(2, np.float32)) + 1,
    ],
    "something is waited for": [
        lambda _: torch.cuda.synchronize(),
        lambda _: torch.cuda.Stream.synchronize(cast(Any, None)),
        lambda _: torch.cuda.Event.synchronize(cast(Any, None)),
        lambda _: torch.cuda.Event.query(cast(Any, None)),
    ],
}


@pytest.mark.parametrize("step", [step for steps in REFUSED.values() for step in steps])
def test_what_a_graph_cannot_have_is_refused(x: Tensor, step: Callable[[Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match=r"while a graph is recorded|neither memory that was there"):
        recorded(lambda: cast(Tensor, step(x)))


def test_a_kernel_is_given_only_what_the_recording_owns(x: Tensor) -> None:
    """Not the host's memory, nor what has been given up."""
    foreign = np.ones(4, np.float32)
    with pytest.raises(AssertionError, match="take_rows_fp32: pool is neither memory"):
        recorded(lambda: launch(x, foreign.ctypes.data))
    with pytest.raises(AssertionError, match=r"take_rows_fp32: pool .* given up"):
        recorded(lambda: launch(x, torch.empty(4).data_ptr()))


def test_what_was_there_must_still_be() -> None:
    """Also where other memory has its place meanwhile."""
    for use in (lambda y, x: launch(y, x.data_ptr()), lambda y, x: y.add_(x)):
        y, inputs = torch.zeros(4), [torch.ones(4)]

        def step(y: Tensor = y, inputs: list[Tensor] = inputs, use: Any = use) -> Tensor:
            use(y, inputs[0])
            return y

        tape, _ = recorded(step)
        tape.replay()
        inputs.clear()
        others = [torch.ones(4) for _ in range(8)]
        with pytest.raises(AssertionError, match=r"(take_rows_fp32: pool|aten::add_: argument 1) was there"):
            tape.replay()
        del others


def test_what_a_tape_only_points_to_is_not_there() -> None:
    """A tape that is kept has the address of what has gone, where other memory is now."""
    inputs = [torch.ones(4)]
    kept = at_address(inputs[0])  # as the earlier tape has it
    tape, _ = recorded(lambda: inputs[0] + 1)
    inputs.clear()
    with pytest.raises(AssertionError, match="was there when the step was recorded"):
        tape.replay()
    del kept


def test_memory_that_has_moved_is_not_there_any_more() -> None:
    x = torch.ones(4)
    tape, _ = recorded(lambda: x + 1)
    x.untyped_storage().resize_(1 << 20)
    with pytest.raises(AssertionError, match="was there when the step was recorded"):
        tape.replay()


def test_a_recording_takes_again_what_it_has_given_up(x: Tensor) -> None:
    """And so does the next one. What is kept stays."""
    places: list[int] = []

    def step() -> Tensor:
        kept = x + 2
        for _ in range(3):
            places.append((x + 1).data_ptr())
        return kept

    arena = Arena()
    _, kept = recorded(step, arena)
    second, out = recorded(step, arena)
    assert len({*places[:3]}) == 1
    assert out.data_ptr() == places[0]
    assert kept.data_ptr() not in places
    second.replay()
    assert out.tolist() == [3.0, 4.0, 5.0, 6.0]
    assert kept.isnan().all()  # only its own replay computes it


def test_a_recording_uses_nothing_that_another_one_computes(x: Tensor) -> None:
    arena = Arena()
    _, made = recorded(lambda: x + 1, arena)
    with pytest.raises(AssertionError, match="another recording computes it"):
        recorded(lambda: made * 2, arena)


def test_nothing_is_left_from_the_replay_before(x: Tensor) -> None:
    def step() -> Tensor:
        y = torch.empty(4)
        y[:2] = x[:2]
        return y

    tape, out = recorded(step)
    for _ in range(2):
        tape.replay()
        assert out[:2].tolist() == [1.0, 2.0]
        assert out[2:].isnan().all()
